"""Task `generate_conformers`: conformers of a user's molecules with GFN2-xTB energies and forces, as GEOM has them."""

from __future__ import annotations

import json
import logging
import resource
import time
from pathlib import Path
from typing import Any

import ml_collections

from mlip_jax import config as configs
from mlip_jax import defaults
from mlip_jax.config import ConfigError
from mlip_jax.workdir import claimed, write_json

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Make the files of `config` in `workdir`, or go on with them; returns the folder of the files, WORKDIR/data.

    WORKDIR/summary.json says what is in them and what they cost: processor seconds of the worker processes of each
    start, and per conformer where one start made everything.

    Raises:
      ConfigError, WorkdirError, DatasetError, ImportError, OSError: With what to do about it.
    """
    config = configs.complete(config, defaults.conformers_defaults())
    if not config.smiles:
        raise ConfigError("smiles: give a file of molecules, --config.smiles=FILE.smi (or .csv)")
    from mlip_jax.datasets.builtin import storage
    from mlip_jax.datasets.builtin.conformer_sets import ConformerOptions, Selection, generate_conformers

    with claimed(workdir, configs.identity(config)) as folder:
        started, before = time.monotonic(), _processor_seconds()
        files = generate_conformers(
            folder / "data", config.smiles, options=ConformerOptions(**config.conformers.to_dict()),
            selection=Selection(count=config.num_molecules, **config.select.to_dict()), subset=config.subset,
            seed=config.seed, molecules_per_file=config.molecules_per_file,
            num_processes=config.num_processes or None)
        cost = {"wall seconds": time.monotonic() - started, "processor seconds": _processor_seconds() - before}
        _tell(folder / "summary.json", [storage.summarize(path) for path in files], cost)
    return folder / "data"


def _processor_seconds() -> float:
    """Of the worker processes that have ended, and of this one."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF))


def _tell(path: Path, files: list[dict[str, Any]], cost: dict[str, float]) -> None:
    starts = json.loads(path.read_text())["starts"] if path.exists() else []
    total = {name: sum(f[name] for f in files) for name in ("molecules", "conformations")}
    dropped: dict[str, int] = {}
    for file in files:
        for reason, number in file["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + number
    write_json(path, total | {"dropped": dropped, "starts": [*starts, cost], "files": files})
    log.info("%d conformers of %d molecules; this start took %.0f s of processors, %.0f s of time", total[
        "conformations"], total["molecules"], cost["processor seconds"], cost["wall seconds"])
