"""Task `generate_conformers`: generate conformers of a user's molecules, in the style of GEOM.

The conformers have GFN2-xTB energies and forces.
"""

from __future__ import annotations

import logging
import resource
import time
from pathlib import Path
from typing import Any

import ml_collections

from mlip_jax import config as configs
from mlip_jax import defaults
from mlip_jax.config import ConfigError
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.wording import count_of
from mlip_jax.workdir import claimed, write_json

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Generate the conformers of `config`, or resume a run in `workdir`; return WORKDIR/data.

    WORKDIR/summary.json lists the contents of the files and the cost of each start: wall time and
    processor time of all processes, in seconds.

    Raises:
      ConfigError, WorkdirError, DatasetError, ImportError, OSError: The message explains how to fix
        the problem.
      RuntimeError: All molecules failed. The summary is written before.
    """
    config = configs.complete(config, defaults.conformers_defaults())
    if not config.smiles:
        raise ConfigError(
            "smiles is required: a file of molecules, e.g. --config.smiles=molecules.smi"
        )
    from mlip_jax.datasets.builtin import storage
    from mlip_jax.datasets.builtin.conformer_sets import (
        ConformerOptions,
        Selection,
        generate_conformers,
    )

    with claimed(workdir, configs.identity(config)) as folder:
        started, before = time.monotonic(), _processor_seconds()
        files = generate_conformers(
            folder / "data",
            config.smiles,
            options=ConformerOptions(**config.conformers.to_dict()),
            selection=Selection(count=config.num_molecules, **config.select.to_dict()),
            subset=config.subset,
            seed=config.seed,
            molecules_per_file=config.molecules_per_file,
            num_processes=config.num_processes or None,
        )
        cost = {
            "wall seconds": time.monotonic() - started,
            "processor seconds": _processor_seconds() - before,
        }
        summaries = [storage.summarize(path) for path in files]
        _write_summary(folder / "summary.json", summaries, cost)
        if not any(summary["conformations"] for summary in summaries):
            raise RuntimeError(
                f"no conformer of any molecule of {config.smiles} was generated: see the reasons in "
                f"{folder / 'summary.json'}"
            )
    return folder / "data"


def _processor_seconds() -> float:
    """Return the processor time of this process and its finished worker processes, in seconds."""
    return sum(
        sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)
    )


def _write_summary(path: Path, files: list[dict[str, Any]], cost: dict[str, float]) -> None:
    """Write summary.json, to which each start appends its cost, and log the totals."""
    starts = parse_json(read_bytes(path))["starts"] if path.exists() else []
    total = {name: sum(f[name] for f in files) for name in ("molecules", "conformations")}
    dropped: dict[str, int] = {}
    for file in files:
        for reason, number in file["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + number
    write_json(path, total | {"dropped": dropped, "starts": [*starts, cost], "files": files})
    log.info(
        "%s of %s; this start took %.0f s (processor time %.0f s)",
        count_of(total["conformations"], "conformer"),
        count_of(total["molecules"], "molecule"),
        cost["wall seconds"],
        cost["processor seconds"],
    )
