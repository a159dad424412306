"""Python function `active_learning`: molecules and a budget go in, a force field comes out.

from mlip_jax import active_learning

result = active_learning(["CCO", "CCN", ...], budget=300, workdir="runs/budget")
atoms.calc = result.calculator()
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from ase import Atoms
from ase.io import read

from mlip_jax import config as configs
from mlip_jax.config import ConfigError
from mlip_jax.datasets import atoms_list
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.foreign_text import one_line
from mlip_jax.potential import Potential
from mlip_jax.simulation.calculators.calculator import MLIPCalculator
from mlip_jax.simulation.calculators.ensemble import EnsembleCalculator
from mlip_jax.sweeps.overrides import override
from mlip_jax.tasks.active_learning import run
from mlip_jax.workdir import workdir_or_temporary, write_text


@dataclasses.dataclass(frozen=True)
class ActiveLearningResult:
    """Result of active learning.

    Attributes:
      members: Trained force fields, whose mean is the result.
      labels: Structures with the labels of the reference method, as calculator results. Their info
        has "split" ("train" or "valid"), "round", "molecule" and "kind".
      metrics: Content of metrics.json: "rounds" by strategy, and "comparison" with the controls.
      workdir: Folder of the run; None if it was temporary.
      report: Path of the HTML report; None if it was temporary.
    """

    members: tuple[Potential, ...]
    labels: list[Atoms]
    metrics: dict[str, Any]
    workdir: Path | None = None
    report: Path | None = None

    def calculator(self, dtype: str = "float32") -> MLIPCalculator | EnsembleCalculator:
        """Return a calculator for ASE: of the mean of the members if there are several."""
        if len(self.members) == 1:
            return MLIPCalculator(self.members[0], dtype)
        return EnsembleCalculator(self.members, dtype)


def active_learning(
    molecules: str | Path | Sequence[str] | Sequence[Atoms],
    budget: int,
    workdir: str | Path | None = None,
    *,
    config: str | Path | ml_collections.ConfigDict = "active_learning",
    overrides: Mapping[str, Any] | None = None,
) -> ActiveLearningResult:
    """Train a force field within a budget of labels, or resume a run in `workdir`.

    >>> result = active_learning(list_of_smiles, 300, "runs/budget")  # doctest: +SKIP
    >>> atoms.calc = result.calculator()  # doctest: +SKIP

    Args:
      molecules: List of SMILES or of ASE's Atoms (labels are not used), or the path of a file of
        molecules or of a store.
      budget: Number of calculations of the reference method.
      workdir: Folder of the run. None works in a temporary folder, which is removed at the end.
      config: Name of a shipped config, a config file, or a config of task "active_learning".
      overrides: Config fields by dotted name, such as {"oracle.method": "package.module:Class",
        "rounds.num_rounds": 3}.

    Raises:
      ConfigError, WorkdirError, DatasetError, OracleError, TrainingError, CheckpointError: The
        message explains how to fix the problem.
    """
    if isinstance(config, ml_collections.ConfigDict):
        config = copy.deepcopy(config)
    else:
        config = configs.load_file(str(config))
    config = override(config, {"budget": budget, **(overrides or {})})
    if config.get("task") != "active_learning":
        raise ConfigError(
            f"active_learning runs configs of that task; this one has {config.get('task')!r}"
        )
    with workdir_or_temporary(workdir) as folder:
        config.input = str(_molecule_file(molecules, folder))
        report = run(config, folder)
        metrics = parse_json(read_bytes(folder / "metrics.json"))
        return ActiveLearningResult(
            tuple(Potential.load(path) for path in metrics["force_field"]),
            read(folder / "labels.xyz", ":"),
            metrics,
            None if workdir is None else folder,
            None if workdir is None else report,
        )


def _molecule_file(molecules: Any, folder: Path) -> Path:
    """Return the path of the molecules; lists are written to the folder of the run.

    Raises:
      DatasetError: The list is empty, or mixes SMILES and Atoms.
    """
    if isinstance(molecules, str | Path):
        return Path(molecules)
    items = list(molecules)
    folder.mkdir(parents=True, exist_ok=True)
    if items and all(isinstance(item, str) for item in items):
        path, text = folder / "molecules.smi", "".join(f"{one_line(s)}\n" for s in items)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
        return path
    if items and all(isinstance(item, Atoms) for item in items):
        path = folder / "structures.traj"
        structures, _ = atoms_list.from_atoms(items)
        atoms_list.write_trajectory(path, structures)
        return path
    raise DatasetError("molecules: expected a path, a list of SMILES, or a list of ASE's Atoms")
