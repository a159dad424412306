"""Task `convert`: convert a data set to a store. The workdir is the store."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import ml_collections

from mlip_jax import config as configs
from mlip_jax import defaults
from mlip_jax.datasets.quality import check_report
from mlip_jax.datasets.quality.checks import Findings
from mlip_jax.datasets.quality.filters import Filters
from mlip_jax.datasets.quality.problems import Problem
from mlip_jax.datasets.source import locate, reader_options
from mlip_jax.datasets.store.conversion import ConversionSpec, convert
from mlip_jax.datasets.store.store import Store
from mlip_jax.wording import count_of
from mlip_jax.workdir import claimed, write_text

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Convert the data of `config` to the store `workdir`, or resume a conversion; return its path.

    Raises:
      ConfigError, WorkdirError, DatasetError: The message explains how to fix the problem.
    """
    config = configs.complete(config, defaults.convert_defaults())
    with claimed(workdir, configs.identity(config)) as folder:
        data = config.data
        filters = {f.name: data[f.name] for f in dataclasses.fields(Filters)}
        spec = ConversionSpec(
            locate(data),
            data.reader,
            reader_options(data.reader_options),
            filters,
            config.store.dtype,
            config.store.atoms_per_shard,
        )
        convert(
            spec,
            folder,
            num_processes=config.store.num_processes or None,
            reject_invalid=data.reject_invalid,
            confirm_units=data.confirm_units,
        )
        store = Store(folder)
        findings = Findings.from_json(store.manifest["findings"])
        problems = [Problem(**p) for p in store.manifest["problems"]]
        write_text(folder / "checks.md", check_report.to_markdown(findings, problems))
        for line in check_report.lines(findings, problems):
            log.log(
                logging.WARNING if line.startswith(("error", "warning")) else logging.INFO, line
            )
        counts = store.manifest["counts"]
        log.info(
            "%s: %s of %s (%s); skipped by the reader: %s; removed by filters: %s",
            folder,
            count_of(len(store), "structure"),
            count_of(store.manifest["molecules"], "molecule"),
            store.level_of_theory,
            counts["skipped"] or "none",
            counts["removed"] or "none",
        )
    return folder
