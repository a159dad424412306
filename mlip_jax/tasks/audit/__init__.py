"""Task `audit`: examine a force field with generated geometries, and write a report."""

from __future__ import annotations

import logging
import platform
from pathlib import Path

import jax
import ml_collections

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.config import ConfigError
from mlip_jax.datasets import source
from mlip_jax.reports.simulations.audit import write_audit_report
from mlip_jax.simulation.audit.audit import AuditResult, audit
from mlip_jax.simulation.ensemble_mean import level_of_theory
from mlip_jax.workdir import claimed

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Audit the force field of `config`; return the path of the report.

    Raises:
      ConfigError, WorkdirError, CheckpointError, ImportError, ValueError: The message explains how to
        fix the problem.
    """
    config = configs.complete(config, defaults.audit_defaults())
    if not config.force_field:
        raise ConfigError("force_field is required, e.g. --config.force_field=runs/spice")
    if distributed.count() > 1:
        raise ConfigError(f"an audit runs in one process, but this run has {distributed.count()}")
    with claimed(workdir, configs.identity(config)) as workdir:
        result = audit(
            config.force_field,
            checks=tuple(config.checks),
            reference=config.oracle.method,
            reference_options=source.reader_options(config.oracle.options),
            num_conformers=config.num_conformers,
            picoseconds=config.picoseconds,
            temperature=config.temperature,
            dtype=config.dtype,
        )
        report = write_audit_report(
            workdir,
            result,
            title=f"Audit of {Path(config.force_field).name}",
            info=_settings(config, result),
        )
    for name, value in result.scores.items():
        log.info("%s: %.4g", name, value)
    log.info("report: %s", report)
    return report


def _settings(config, result: AuditResult) -> dict[str, dict[str, object]]:
    """Return names and values of force field and settings for the report."""
    potential = result.potential
    return {
        "Force field": {
            "from": config.force_field,
            "digest": potential.digest(),
            "forces": potential.origin_of_forces,
            "level of theory": level_of_theory(potential),
        },
        "Settings (ps, K)": {
            name: str(value)
            for name, value in configs.to_dict(config).items()
            if name not in ("task", "force_field")
        },
        "Hardware": {"device": jax.devices()[0].device_kind, "system": platform.platform()},
    }
