"""Task `diversity_report`: draw the curves of a diversity study from the folders of its sweeps."""

from __future__ import annotations

import logging
from pathlib import Path

import ml_collections

from mlip_jax import config as configs
from mlip_jax import defaults
from mlip_jax.config import ConfigError
from mlip_jax.reports.diversity import report

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Write WORKDIR/diversity.html and diversity.csv of all evaluated runs; return the page's path.

    Raises:
      ConfigError: No sweeps are given.
      ValueError: The sweeps contain no results.
    """
    config = configs.complete(config, defaults.diversity_report_defaults())
    sweeps = [part.strip() for part in config.sweeps.split(",") if part.strip()]
    if not sweeps:
        raise ConfigError(
            "sweeps is required: the folders of sweeps, e.g. "
            "--config.sweeps=runs/n_fixed,runs/ns_fixed"
        )
    page = report.write_report(workdir, report.read_results(sweeps), config.metric)
    log.info("report: %s", page)
    return page
