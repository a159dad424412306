"""Task `force2geo_eval`: relax unseen molecules with force fields and evaluate the geometries.

A reference method, the oracle, computes the energies and forces by which they are evaluated.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import ml_collections

from mlip_jax import config as configs
from mlip_jax import defaults
from mlip_jax.config import ConfigError
from mlip_jax.datasets import source
from mlip_jax.importers import load_force_field
from mlip_jax.potential import Potential
from mlip_jax.reports.force2geo.report import write_report
from mlip_jax.simulation.ensemble_mean import level_of_theory
from mlip_jax.simulation.reference.oracle import Method, Oracle
from mlip_jax.simulation.reference.result_cache import ResultCache
from mlip_jax.simulation.relaxation.journal import FAILURES
from mlip_jax.simulation.relaxation.metrics import Limits
from mlip_jax.tasks.relaxation_evaluation.evaluation import evaluate_relaxed, evaluate_starts, relax
from mlip_jax.tasks.relaxation_evaluation.molecules import choose_starts
from mlip_jax.workdir import claimed

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Evaluate force fields by `config`, or resume a run in `workdir`; return the report's path.

    Raises:
      ConfigError, WorkdirError, DatasetError, CheckpointError, OracleError, ImportError: The
        message explains how to fix the problem.
      RuntimeError: All relaxations failed. The report is written before.
    """
    config = configs.complete(config, defaults.force2geo_defaults())
    paths = force_fields(config.force_field)
    limits = Limits(config.metrics.chemical_accuracy, config.metrics.fmax, config.metrics.min_gap)
    method = Method(config.oracle.method, source.reader_options(config.oracle.options))
    _check(config)
    with claimed(workdir, configs.identity(config)) as folder:
        potentials = {name: load_force_field(path) for name, path in paths.items()}
        starts, notes = choose_starts(config, folder, paths, potentials)
        with (
            ResultCache(config.oracle.cache or folder / "oracle.jsonl") as results,
            ResultCache(folder / "relaxations.jsonl") as relaxations,
        ):
            oracle = Oracle(method, results, num_processes=config.oracle.num_processes or None)
            molecules = evaluate_starts(oracle, starts, config)
            evaluated, statuses = [], []
            for name, potential in potentials.items():
                relaxed = relax(name, potential, starts, config.relax, relaxations)
                statuses += [result["status"] for result in relaxed.values()]
                evaluated.append(evaluate_relaxed(oracle, name, starts, relaxed))
        notes += _compare_levels(potentials, method.name)
        report = write_report(
            folder,
            molecules,
            evaluated,
            limits,
            notes=notes,
            num_bootstrap=config.metrics.num_bootstrap,
            seed=config.seed,
            info=_settings(config, method, paths, potentials),
        )
    log.info("report: %s", report)
    if statuses and all(status in FAILURES for status in statuses):
        raise RuntimeError(f"all relaxations failed or diverged: see the reasons in {report}")
    return report


def force_fields(text: str | None) -> dict[str, str]:
    """Parse a list of force fields and return {name: path}.

    A path is a workdir or anything else that `importers.load_force_field` loads.

    >>> force_fields("runs/spice, painn=runs/spice_painn")
    {'spice': 'runs/spice', 'painn': 'runs/spice_painn'}

    Raises:
      ConfigError: There is no path, or two force fields have the same name.
    """
    paths: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in (text or "").split(","))):
        name, equals, path = (p.strip() for p in part.rpartition("="))
        name = name or Path(path).name
        if not path or name in paths:
            raise ConfigError(
                f"force_field: expected 'path' or 'name=path,name2=path2' with different names, "
                f"received {text!r}"
            )
        paths[name] = path
    if not paths:
        raise ConfigError(
            "force_field is required, e.g. --config.force_field=runs/spice, or several as "
            "name=path,name2=path2"
        )
    return paths


def _check(config) -> None:
    """Raise ConfigError if options contradict each other."""
    if config.data.reference == "data" and not config.data.reference_stage:
        raise ConfigError(
            "data.reference_stage is required: data.reference='data' uses its last snapshot"
        )


def _compare_levels(potentials: dict[str, Potential], oracle: str) -> list[str]:
    """Return a note per force field whose level of theory differs from the oracle's."""
    notes = []
    for name, potential in potentials.items():
        level = level_of_theory(potential)
        if oracle.lower() not in level.lower():
            notes.append(
                f"{name} was trained on {level} labels, but the oracle is {oracle}. Where the two "
                "methods differ, even a perfect force field has errors in this report."
            )
    return notes


def _settings(config, method, paths, potentials) -> dict[str, dict[str, Any]]:
    """Return names and values of the settings and the force fields for the report."""
    data_fields = (
        "path",
        "stage",
        "reference",
        "reference_stage",
        "selection",
        "num_molecules",
        "first",
        "allow_seen",
    )
    info = {
        "molecules": {key: config.data[key] for key in data_fields} | {"seed": config.seed},
        "relaxation": dict(config.relax),
        "oracle": dict(config.oracle) | {"version": method.settings()["version"]},
    }
    info = {
        name: {k: "unset" if v is None else v for k, v in items.items()}
        for name, items in info.items()
    }
    for name, potential in potentials.items():
        model = (potential.metadata.get("config") or {}).get("model", {})
        info[f"force field {name}"] = {
            "workdir": paths[name],
            "model": model.get("name"),
            "digest of parameters": potential.digest(),
            "labels": level_of_theory(potential),
        }
    return info
