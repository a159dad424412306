"""Task `active_learning`: train a force field within a budget of labels."""

from __future__ import annotations

import logging
from pathlib import Path

import ml_collections

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.config import ConfigError
from mlip_jax.datasets import source
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.label_budget.candidates import CONFORMERS, MODES
from mlip_jax.label_budget.candidates import RANDOM as RANDOM_DISPLACEMENTS
from mlip_jax.label_budget.choice import DIVERSITY, RANDOM, UNCERTAINTY
from mlip_jax.label_budget.exploration import DYNAMICS, RELAXATIONS
from mlip_jax.label_budget.uncertainty import ENSEMBLE
from mlip_jax.reports.label_budget.report import write_label_report
from mlip_jax.simulation.reference.oracle import Method, Oracle
from mlip_jax.simulation.reference.result_cache import ResultCache
from mlip_jax.tasks.active_learning.inputs import prepare
from mlip_jax.tasks.active_learning.outputs import label_metrics, write_labels
from mlip_jax.tasks.active_learning.rounds import final_force_field, run_strategy
from mlip_jax.tasks.force_field_training.repeated_warnings import repeated_warnings_once
from mlip_jax.training.options import check
from mlip_jax.workdir import claimed, write_json

log = logging.getLogger(__name__)

CACHE = "oracle.jsonl"
KINDS = (CONFORMERS, MODES, RANDOM_DISPLACEMENTS, DYNAMICS, RELAXATIONS)  # of candidates
CONTROLS = {"none": (), "random": (RANDOM,), "ablation": (RANDOM, UNCERTAINTY, DIVERSITY)}


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Spend the budget of `config`, or resume a run in `workdir`; return the path of the report.

    Raises:
      ConfigError, WorkdirError, DatasetError, CheckpointError, OracleError, TrainingError,
        ImportError, OSError: The message explains how to fix the problem. All labels so far are
        kept.
    """
    config = configs.complete(config, defaults.active_learning_defaults())
    _check(config)
    method = Method(config.oracle.method, source.reader_options(config.oracle.options))
    with (
        repeated_warnings_once(),
        claimed(workdir, configs.identity(config)) as folder,
        ResultCache(folder / CACHE) as cache,
    ):
        oracle = Oracle(
            method,
            cache,
            num_processes=config.oracle.num_processes or None,
            timeout=config.oracle.timeout,
        )
        inputs = prepare(config, folder, oracle)
        main = config.choose.strategy
        strategies = [main, *(s for s in CONTROLS[config.control] if s != main)]
        evaluations = {strategy: run_strategy(inputs, strategy) for strategy in strategies}
        metrics = label_metrics(inputs, evaluations, main)
        write_json(folder / "metrics.json", metrics)
        write_labels(folder / "labels.xyz", folder, main, len(evaluations[main]))
        pool = parse_json(read_bytes(folder / "pool.json"))
        report = write_label_report(folder, metrics, inputs.test, pool, _settings(config))
    log.info("force field: %s", final_force_field(evaluations[main]))
    log.info("report: %s", report)
    return report


def _check(config: ml_collections.ConfigDict) -> None:
    """Raise ConfigError if fields are missing or contradict each other."""
    if not config.input:
        raise ConfigError("input is required, e.g. --config.input=molecules.smi")
    if distributed.count() > 1:
        raise ConfigError(
            f"active learning runs in one process, but this run has {distributed.count()}"
        )
    if config.choose.uncertainty == ENSEMBLE and config.rounds.members < 2:
        raise ConfigError(
            "choose.uncertainty='ensemble' needs rounds.members of at least 2, received "
            f"{config.rounds.members}. Set --config.choose.uncertainty=features for one force field."
        )
    low, high = config.propose.temperatures
    if low > high:
        raise ConfigError(f"propose.temperatures must ascend, received ({low:g}, {high:g})")
    if not config.propose.kinds:
        raise ConfigError("propose.kinds is empty. Name at least one kind of candidates.")
    check(config)


def _settings(config: ml_collections.ConfigDict) -> dict[str, dict[str, object]]:
    """Return names and values of the settings for the report."""
    plain = configs.to_dict(config)
    parts = {"Settings": {k: str(v) for k, v in plain.items() if not isinstance(v, dict)}}
    for name, part in plain.items():
        if isinstance(part, dict):
            parts[name] = {k: str(v) for k, v in part.items()}
    return parts
