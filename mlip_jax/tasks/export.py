"""Task `export`: convert a force field to files that programs can read without this package."""

from __future__ import annotations

import logging
from pathlib import Path

import ml_collections

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.config import ConfigError
from mlip_jax.importers import load_force_field, parameters
from mlip_jax.simulation.export import DESCRIPTION, PROGRAM, export_stablehlo
from mlip_jax.simulation.trust import atom_domain, domain
from mlip_jax.workdir import claimed

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Write the files that configs/export.py lists, and return the workdir.

    With several processes, only the leader does the work; the others wait for it.

    Raises:
      ConfigError, WorkdirError, CheckpointError, ValueError: The message explains how to fix the
        problem.
    """
    config = configs.complete(config, defaults.export_defaults())
    if not config.force_field:
        raise ConfigError("force_field is required, e.g. --config.force_field=runs/spice")
    workdir = Path(workdir)
    if distributed.leader():
        with claimed(workdir, configs.identity(config)):
            potential = load_force_field(config.force_field)
            export_stablehlo(
                potential,
                workdir,
                max_atoms=config.max_atoms,
                max_pairs=config.max_pairs,
                max_long_range_pairs=config.max_long_range_pairs,
                periodic=config.periodic,
                dtype=config.dtype,
                platforms=tuple(config.platforms),
            )
            parameters.save(potential, workdir)
            names = [PROGRAM, DESCRIPTION, parameters.WEIGHTS, parameters.DESCRIPTION]
            if (known := atom_domain.of(config.force_field)) is not None:
                known.save(workdir / domain.FILE)
                names.append(domain.FILE)
            for name in names:
                log.info("%s: %d bytes", workdir / name, (workdir / name).stat().st_size)
    distributed.barrier("exported")
    return workdir
