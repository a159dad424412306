"""Python functions that do what the command line does: `train`, `evaluate` and `load`.

    from mlip_jax import evaluate, load, train

    result = train("spice:painn", list_of_atoms, overrides={"train.num_steps": 2000})
    result.metrics["test"]["force_mae_mev_per_ang"]
    atoms.calc = load("runs/spice")
    evaluate("runs/a,runs/b", "molecules.xyz").energies

They run the same tasks in this process. Structures are a list of ASE's Atoms, or the path of a file
or store. Without a workdir, no file is kept.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from ase import Atoms

from mlip_jax import config as configs
from mlip_jax.compilation_cache import keep_compiled_programs
from mlip_jax.config import ConfigError
from mlip_jax.datasets import atoms_list
from mlip_jax.datasets.given_structures import set_structures
from mlip_jax.defaults import evaluate_defaults, fine_tune_defaults
from mlip_jax.defaults.bundled import BUNDLED
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.importers import split_force_fields
from mlip_jax.potential import Potential, read_checkpoint
from mlip_jax.predictor import TASK as PROPERTY
from mlip_jax.predictor import Predictor
from mlip_jax.reports.training import read_metrics
from mlip_jax.simulation.calculators.calculator import MLIPCalculator
from mlip_jax.simulation.calculators.ensemble import EnsembleCalculator
from mlip_jax.simulation.force_fields import load_each
from mlip_jax.simulation.trust import atom_domain
from mlip_jax.simulation.trust.domain import Domain
from mlip_jax.simulation.trust.ensemble_calibration import Calibration
from mlip_jax.sweeps.overrides import override
from mlip_jax.tasks.evaluate import evaluate_config
from mlip_jax.tasks.fine_tune import fine_tune_config
from mlip_jax.tasks.force_field_evaluation.result import EvaluationResult
from mlip_jax.workdir import workdir_or_temporary

log = logging.getLogger(__name__)

_TRAINING_TASKS = ("train", PROPERTY)


def load(
    model: Any = BUNDLED, *, dtype: str = "float32", calibration: str | Path | None = None
) -> MLIPCalculator | EnsembleCalculator | Predictor:
    """Load a trained model: a calculator for ASE, or a predictor of properties.

    >>> atoms.calc = load("runs/spice")  # doctest: +SKIP
    >>> atoms.calc = load()  # doctest: +SKIP

    Args:
      model: The name of a published force field, by default that of the package; workdir of a
        training run, "so3lr:params.pkl" or another importer with its file, a
        `Potential`, a calculator; several, as a sequence or as in "runs/a,runs/b", are an ensemble.
      dtype: "float32" or "float64", for calculators.
      calibration: Calibration of an ensemble, the workdir of a run of configs/ensemble.py.

    Returns:
      `MLIPCalculator` for one force field, with its domain if it is known; `EnsembleCalculator` for
      several; `Predictor` for a run of task "property".

    Raises:
      CheckpointError, ValueError, FileNotFoundError: The model cannot be loaded.
    """
    items = split_force_fields(model)
    if len(items) > 1:
        known = None if calibration is None else Calibration.load(calibration)
        return EnsembleCalculator(load_each(items), dtype, known)
    if calibration is not None:
        raise ValueError("calibration is for an ensemble, but there is one force field")
    (item,) = items
    if isinstance(item, str) and Path(item).is_dir():
        restored = read_checkpoint(item)
        if restored.metadata["config"].get("task") == PROPERTY:
            return Predictor.load(item)
    return MLIPCalculator(item, dtype)


def evaluate(
    force_field: Any,
    structures: Sequence[Atoms] | Atoms | str | Path,
    workdir: str | Path | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    **fields: Any,
) -> EvaluationResult:
    """Evaluate force fields on structures, and compare with labels if there are any.

    >>> result = evaluate("runs/spice", "test.xyz")  # doctest: +SKIP
    >>> errors = result.metrics["evaluated"]  # doctest: +SKIP
    >>> errors["force_mae_mev_per_ang"]  # doctest: +SKIP

    Args:
      force_field: One or several force fields, as for `load`.
      structures: ASE's Atoms, or the path of a file or store. Labels of Atoms are the results of
        their calculator for the present positions, or info["energy"] and arrays["forces"].
      workdir: Folder of the report and the predictions; an interrupted evaluation resumes there.
        None writes no file.
      overrides: Config fields by dotted name, such as {"data.reader_options":
        "energy_key=dft_energy"}.
      **fields: Config fields of the task, such as dtype="float64", calibration="runs/ensemble".

    Raises:
      ConfigError, WorkdirError, DatasetError, CheckpointError, ValueError: The message explains how
        to fix the problem.
    """
    config = override(evaluate_defaults(), {**fields, **(overrides or {})})
    if isinstance(force_field, str | Path):
        config.force_field = str(force_field)
    atoms = None
    if isinstance(structures, str | Path):
        config.data.path = str(structures)
    else:
        atoms = atoms_list.as_list(structures)
    result = evaluate_config(config, workdir, force_field, atoms)
    if result is None:
        raise RuntimeError("only the leader of several processes has the result")
    return result


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """Result of a training run.

    Attributes:
      model: The trained force field, or the predictor of a run of task "property".
      metrics: Content of metrics.json: errors by split, in metrics["test"] and so on.
      history: Columns of metrics.csv by name, (R,) each: losses and errors during training. Empty
        after `fine_tune`.
      domain: Domain of the force field, or None.
      workdir: Folder of the run, or None if no folder was given.
      report: Path of report.html, or None if no folder was given.
    """

    model: Potential | Predictor
    metrics: dict[str, Any]
    history: dict[str, np.ndarray]
    domain: Domain | None = None
    workdir: Path | None = None
    report: Path | None = None

    def calculator(self, dtype: str = "float32") -> MLIPCalculator:
        """Return a calculator for ASE.

        Raises:
          ValueError: The run trained a predictor of properties.
        """
        if not isinstance(self.model, Potential):
            raise ValueError("this run trained a predictor of properties: use model.predict")
        return MLIPCalculator(self.model, dtype, self.domain)


def train(
    config: str | Path | ml_collections.ConfigDict,
    structures: Sequence[Atoms] | str | Path | None = None,
    workdir: str | Path | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Train a force field or a predictor of properties, or resume a run in `workdir`.

    >>> result = train("spice:painn", "own.xyz", "runs/own")  # doctest: +SKIP
    >>> atoms.calc = result.calculator()  # doctest: +SKIP

    Args:
      config: Name of a shipped config ("spice:painn"), a config file, or a config of task "train"
        or "property".
      structures: ASE's Atoms with energies and forces (see `evaluate`), or with the properties of
        property.targets in info or arrays; or the path of a file or store. None uses the data of the
        config.
      workdir: Folder of the run. None trains in a temporary folder, which is removed at the end.
      overrides: Config fields by dotted name, such as {"train.num_steps": 2000, "data.elements":
        None}.

    Raises:
      ConfigError, WorkdirError, DatasetError, TrainingError, CheckpointError: The message explains
        how to fix the problem.
    """
    keep_compiled_programs()
    if isinstance(config, ml_collections.ConfigDict):
        config = copy.deepcopy(config)
    else:
        config = configs.load_file(str(config))
    config = override(config, overrides or {})
    if config.get("task") not in _TRAINING_TASKS:
        raise ConfigError(
            f"train runs configs of the tasks {', '.join(_TRAINING_TASKS)}; this config has the "
            f"task {config.get('task')!r}"
        )
    with workdir_or_temporary(workdir) as folder:
        if structures is not None:
            set_structures(config, structures, folder)
        report = importlib.import_module(f"mlip_jax.tasks.{config.task}").run(config, folder)
        return _read_result(config.task, folder, None if workdir is None else report)


def fine_tune(
    structures: Sequence[Atoms] | str | Path,
    force_field: Any = BUNDLED,
    workdir: str | Path | None = None,
    *,
    pool: Sequence[Atoms] | str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Fine-tune a force field on labeled structures by the best of several recipes, or resume.

    >>> result = fine_tune("own.xyz", "runs/spice", "runs/tuned")  # doctest: +SKIP
    >>> atoms.calc = result.calculator()  # doctest: +SKIP
    >>> expected_errors = result.metrics["expected_error"]  # doctest: +SKIP

    Args:
      structures: Labeled structures, as for `train`.
      force_field: Force field to start from, as for `load`.
      workdir: Folder of the run. None fine-tunes in a temporary folder, which is removed at the end.
      pool: Unlabeled structures, or their file. The most useful ones to label are written to
        next_structures.xyz in the workdir.
      overrides: Config fields of configs/fine_tune.py by dotted name, such as {"num_steps": 500,
        "max_forgetting": 0.2}.

    Raises:
      ConfigError, WorkdirError, DatasetError, TrainingError, CheckpointError, ValueError: The
        message explains how to fix the problem.
    """
    config = override(fine_tune_defaults(), overrides or {})
    if isinstance(force_field, str | Path):
        config.force_field = str(force_field)
    with workdir_or_temporary(workdir) as folder:
        set_structures(config, structures, folder)
        if pool is not None:
            config.pool.path = _pool_file(pool, folder)
        report = fine_tune_config(config, folder, force_field)
        return TrainingResult(
            model=Potential.load(folder),
            metrics=parse_json(read_bytes(folder / "metrics.json")),
            history={},
            domain=atom_domain.load_domain(folder),
            workdir=None if workdir is None else folder,
            report=None if workdir is None else report,
        )


def _pool_file(pool: Sequence[Atoms] | str | Path, folder: Path) -> str:
    """Return the path of unlabeled structures; Atoms are written to a file next to the run."""
    if isinstance(pool, str | Path):
        return str(pool)
    path = folder / "data" / "pool.traj"
    path.parent.mkdir(parents=True, exist_ok=True)
    atoms_list.write_trajectory(path, atoms_list.from_atoms(atoms_list.as_list(pool))[0])
    return str(path)


def _read_result(task: str, folder: Path, report: Path | None) -> TrainingResult:
    """Read the results of a finished run into memory."""
    return TrainingResult(
        model=Predictor.load(folder) if task == PROPERTY else Potential.load(folder),
        metrics=parse_json(read_bytes(folder / "metrics.json")),
        history=read_metrics(folder / "metrics.csv"),
        domain=None if task == PROPERTY else atom_domain.load_domain(folder),
        workdir=None if report is None else folder,
        report=report,
    )
