"""Evaluation of a trained property predictor, its domain and its report."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax import distributed
from mlip_jax.datasets.identity import stable_ids
from mlip_jax.datasets.property_data import Target
from mlip_jax.graphs.shapes import GrowingBudget
from mlip_jax.predictor import EMBEDDING, Predictor
from mlip_jax.reports.property import PredictedProperties, write_property_report
from mlip_jax.reports.unseen import UnseenStructures
from mlip_jax.simulation.geometry_sources import Geometries
from mlip_jax.simulation.trust.domain import FILE as DOMAIN_FILE
from mlip_jax.simulation.trust.domain import Domain
from mlip_jax.simulation.trust.intervals import FILE as INTERVALS_FILE
from mlip_jax.simulation.trust.intervals import EnsembleIntervals, ValidationErrors
from mlip_jax.tasks.property_training.data import PropertyData, PropertyInputs
from mlip_jax.training.data import Split
from mlip_jax.training.evaluation import restore_best
from mlip_jax.training.recorder import writing

log = logging.getLogger(__name__)


def report_run(
    config,
    workdir: Path,
    data: PropertyData,
    inputs: PropertyInputs,
    targets: Sequence[Target],
    *,
    seconds: float,
    info: dict[str, Any],
) -> Path:
    """Evaluate the best checkpoint on all splits, fit the domain and write the report.

    Args:
      config: Config of the task.
      workdir: Directory of the run.
      data: Samples of all splits.
      inputs: Structures that the predictor was trained, validated and tested on.
      targets: Properties of the predictor.
      seconds: Training time (s).
      info: Metadata of the run, for the report.

    Returns:
      Path of the report. Only the leader writes it.
    """
    best = restore_best(workdir)
    if not distributed.leader():
        return workdir / "report.html"
    predictor = Predictor.from_checkpoint(best.arrays, best.metadata)
    outcomes, features = {}, {}
    budget = GrowingBudget()  # the splits share a compiled program
    for name, split in inputs.splits.items() if targets else ():
        if not len(split):
            continue
        is_test = name.startswith("test ")
        geometries = inputs.tests[name.removeprefix("test ")][1] if is_test else None
        max_size = config.report.max_domain if name == "train" else len(split)
        outcomes[name], features[name] = _evaluate(
            predictor, split.sample(max_size, config.seed), targets, data, geometries, budget
        )
    with writing(workdir):
        domain = _fit_domain(outcomes, features, targets)
        if domain is not None:
            domain.save(workdir / DOMAIN_FILE)
            outcomes = _add_distances(outcomes, features, domain)
            outcomes = _add_intervals(workdir, outcomes, targets, config.report.coverage)
        report = write_property_report(
            workdir,
            outcomes,
            targets,
            title=f"{', '.join(config.property.targets) or 'denoising'} on {data.loaded.name}",
            metrics_csv=workdir / "metrics.csv",
            seconds=seconds,
            notes=data.loaded.notes,
            best_step=best.step,
            info=info,
            unseen_structures={
                name: UnseenStructures(numbers) for name, numbers in data.unseen.items()
            },
        )
    _log_errors(outcomes, targets)
    log.info("report: %s", report)
    return report


def _log_errors(outcomes: dict[str, PredictedProperties], targets: Sequence[Target]) -> None:
    """Log the mean absolute errors of the test splits."""
    for name, outcome in outcomes.items():
        if name.startswith("test "):
            log.info(
                "%s: mean absolute error of %s",
                name,
                ", ".join(
                    f"{t.name} {np.nanmean(outcome.absolute(t.name)):.4g} {t.unit}".rstrip()
                    for t in targets
                ),
            )


def _fit_domain(
    outcomes: dict[str, PredictedProperties],
    features: dict[str, np.ndarray],
    targets: Sequence[Target],
) -> Domain | None:
    """Fit the domain of the predictor, or return None without validation structures."""
    if "valid" not in features:
        return None
    known = np.isfinite(features["valid"]).all(1)
    if not known.any():
        return None
    errors = {
        t.name: outcomes["valid"].absolute(t.name)[known] for t in targets if t.kind != "atom"
    }
    return Domain.fit(features["train"], features["valid"][known], errors)


def _add_distances(
    outcomes: dict[str, PredictedProperties], features: dict[str, np.ndarray], domain: Domain
) -> dict[str, PredictedProperties]:
    """Return the outcomes with the distances of their structures, in units of the border."""
    return {
        name: dataclasses.replace(o, distance=domain.distance(features[name]) / domain.border)
        if features[name].shape[1] == len(domain.center)
        else o
        for name, o in outcomes.items()
    }


def _add_intervals(
    workdir: Path,
    outcomes: dict[str, PredictedProperties],
    targets: Sequence[Target],
    coverage: float,
) -> dict[str, PredictedProperties]:
    """Fit prediction intervals to the validation split, and return the test splits with them."""
    names = [t.name for t in targets if t.kind == "scalar"]
    valid = outcomes["valid"]
    if not names or valid.distance is None:
        return outcomes
    errors = ValidationErrors(
        stable_ids(valid.molecule),
        valid.distance,
        {n: valid.labels[n] for n in names},
        {n: valid.predicted[n] for n in names},
    )
    errors.save(workdir / INTERVALS_FILE)
    fitted = EnsembleIntervals.fit([errors], names)
    return {
        part: dataclasses.replace(
            o,
            half_width={n: fitted.half_width(n, o.distance[None], None, coverage) for n in names},
            coverage=coverage,
        )
        if part.startswith("test ") and o.distance is not None
        else o
        for part, o in outcomes.items()
    }


def _evaluate(
    predictor: Predictor,
    split: Split,
    targets: Sequence[Target],
    data: PropertyData,
    geometries: Geometries | None,
    budget: GrowingBudget,
) -> tuple[PredictedProperties, np.ndarray]:
    """Predict a split and return labels, predictions and the embeddings of its structures."""
    columns = split.rows.take(split.indices)
    predicted = predictor.predict(columns, budget=budget, with_embedding=True)
    labels = {
        t.name: t.to_physical(
            columns.atom_properties[t.name] if t.kind == "atom" else columns.properties[t.name],
            columns,
        )
        for t in targets
    }
    names = columns.molecule
    if geometries is not None:  # computed geometries have no names of their own
        names = data.loaded.store.take(data.index[geometries.samples]).molecule
    outcome = PredictedProperties(
        names, columns.n_atoms, labels, {t.name: predicted[t.name] for t in targets}
    )
    if geometries is None or (np.diff(geometries.samples) > 0).all():
        return outcome, predicted[EMBEDDING]
    return _average_conformers(outcome, predicted[EMBEDDING], geometries.samples)


def _average_conformers(
    outcome: PredictedProperties, features: np.ndarray, samples: np.ndarray
) -> tuple[PredictedProperties, np.ndarray]:
    """Average scalar predictions and features over the consecutive conformers of each sample."""
    first = np.flatnonzero(np.diff(samples, prepend=-1))
    counts = np.diff(np.append(first, len(samples)))
    averaged = {k: np.add.reduceat(v, first) / counts for k, v in outcome.predicted.items()}
    return PredictedProperties(
        outcome.molecule[first],
        outcome.n_atoms[first],
        {name: values[first] for name, values in outcome.labels.items()},
        averaged,
    ), np.add.reduceat(features, first, axis=0) / counts[:, None]
