"""Report of an evaluation of force fields: `report.html` and `metrics.json`.

Its sections are those of the report of a training run. Without labels, it has only counts and the
structures that are outside the domain.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.datasets.identity import readable_name
from mlip_jax.reports import ensemble, errors, sections, training
from mlip_jax.reports import html_page as page
from mlip_jax.reports.predictions import Predictions
from mlip_jax.reports.sections import EVALUATED
from mlip_jax.simulation.structure_predictions import StructurePredictions
from mlip_jax.simulation.trust.atom_domain import DomainEvaluation
from mlip_jax.simulation.trust.ensemble_calibration import Calibration, EnsembleErrors
from mlip_jax.wording import count_of
from mlip_jax.workdir import write_text

_MAX_ROWS = 20
_OUTSIDE = "Structures outside the domain"


def evaluation_metrics(
    labelled: Predictions,
    predictions: StructurePredictions,
    *,
    has_labels: bool,
    seconds: float,
    skipped: Mapping[str, int],
    domain: DomainEvaluation | None = None,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Return the JSON-safe content of metrics.json.

    It has the errors, under "evaluated", and the details of the metrics of a training run.

    Args:
      labelled: Labels beside predictions.
      predictions: All predictions.
      has_labels: Whether there are labels; otherwise there are no errors, and "evaluated" is None.
      seconds: Time of the predictions.
      skipped: Number of skipped structures by reason.
      domain: Distances from the training atoms beside errors.
      calibration: Calibration of the ensemble.
    """
    outside = predictions.outside_domain
    result: dict[str, Any] = {
        EVALUATED: errors.summary(labelled) if has_labels else None,
        "shown_split": EVALUATED if has_labels else None,
        "seconds": seconds,
        "num_structures": len(predictions),
        "num_with_energy": int(np.isfinite(labelled.energy).sum()),
        "num_with_forces": int(
            np.logical_or.reduceat(np.isfinite(labelled.forces).any(1), labelled.offsets[:-1]).sum()
        ),
        "num_outside_domain": None if outside is None else int(outside.sum()),
        "skipped": dict(skipped),
        "domain_auc": training.domain_auc(domain),
    }
    if has_labels:
        result |= training.details(labelled, {f"fitted_on_{EVALUATED}": labelled})
    if has_labels and calibration is not None:
        spread = _ensemble_errors(labelled, predictions)
        result["expected_errors"] = ensemble.scores(calibration, spread)
    return errors.json_safe(result)


def write_evaluation_report(
    workdir: str | os.PathLike,
    labelled: Predictions,
    predictions: StructurePredictions,
    metrics: dict[str, Any],
    *,
    title: str,
    notes: Sequence[str],
    info: Mapping[str, Mapping[str, Any]],
    files: Sequence[str],
    domain: DomainEvaluation | None = None,
    calibration: Calibration | None = None,
) -> Path:
    """Write metrics.json and report.html to `workdir`, each atomically; return the report's path.

    Args:
      workdir: Folder of the report.
      labelled: Labels beside predictions.
      predictions: All predictions.
      metrics: Result of `evaluation_metrics`.
      title: Headline of the page.
      notes: Notes at the top of the page.
      info: Sections of names and values.
      files: Names of the other files in the workdir.
      domain: Distances from the training atoms beside errors.
      calibration: Calibration of the ensemble.
    """
    workdir = Path(workdir)
    write_text(workdir / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    content = sections.ReportData({EVALUATED: labelled}, metrics, {})
    has_labels = content.shown is not None
    body = [
        page.heading(title, 1),
        page.cards(_cards(content)),
        *(page.callout(note) for note in notes),
        *_skipped(metrics["skipped"]),
    ]
    if has_labels:
        body += [
            *sections.nonfinite(content),
            *sections.error_table(content),
            *sections.parity(content),
            *sections.drift(content),
            *sections.per_group(content),
            *sections.worst_cases(content),
            *training.domain_section(domain),
        ]
    if has_labels and calibration is not None:
        spread = _ensemble_errors(labelled, predictions)
        body += [
            page.heading("Expected errors of the ensemble"),
            *ensemble.section(calibration, spread, metrics["expected_errors"]),
        ]
    body += [*_outside(labelled, predictions), *sections.provenance(info, files)]
    write_text(workdir / "report.html", page.render(title, body))
    return workdir / "report.html"


def _cards(content: sections.ReportData) -> list[tuple[str, str, str, str]]:
    """Return cards with errors, counts and time."""
    metrics, cards = content.metrics, []
    if content.shown is not None:
        cards += sections.error_cards(content)
        corrected = metrics["per_element_correction"][f"fitted_on_{EVALUATED}"]
        after = page.number(corrected["mae_after_mev_per_atom"])
        detail = "fitted to the errors of the same structures"
        cards.append(("energy MAE after a per-element correction", after, "meV/atom", detail))
    skipped = sum(metrics["skipped"].values())
    cards.append(("structures", f"{metrics['num_structures']:,}", "", f"{skipped:,} skipped"))
    if metrics["num_outside_domain"] is not None:
        count = metrics["num_outside_domain"]
        share = 100 * count / metrics["num_structures"]
        detail = f"{share:.3g} % of the structures"
        if count:
            detail = page.link(_OUTSIDE, f"{detail}, listed below")
        cards.append(("outside the domain", f"{count:,}", "", detail))
    return [*cards, ("time", page.duration(metrics["seconds"]), "", "")]


def _skipped(skipped: Mapping[str, int]) -> Iterator[str]:
    """Yield a note on skipped structures, with the most frequent reasons."""
    if skipped:
        reasons = [f"{count:,} × {reason}" for reason, count in list(skipped.items())[:10]]
        reasons += [f"{len(skipped) - 10} other reasons"] if len(skipped) > 10 else []
        yield page.callout(
            f"Skipped: {count_of(sum(skipped.values()), 'structure', ',')}: {'; '.join(reasons)}. "
            "skipped.csv lists them."
        )


def _outside(labelled: Predictions, predictions: StructurePredictions) -> Iterator[str]:
    """Yield a table of the structures that are farthest outside the domain."""
    if predictions.outside_domain is None:
        return
    yield page.heading(_OUTSIDE)
    if predictions.unseen is not None and predictions.unseen.any():
        yield page.paragraph(
            f"{int(predictions.unseen.sum()):,} structures have a charge, a number of unpaired "
            "electrons or a periodicity that never occurs in the training data."
        )
    if predictions.farthest is None:
        return
    order = np.argsort(-predictions.farthest, kind="stable")[:_MAX_ROWS]
    rows = [
        (
            readable_name(str(labelled.molecule[s])),
            str(labelled.source[s]),
            int(labelled.sizes[s]),
            float(predictions.farthest[s]),
        )
        for s in order
        if predictions.farthest[s] > 1
    ]
    if not rows:
        yield page.paragraph("All atoms are close to training atoms.")
        return
    yield page.paragraph(
        "An atom of these structures is farther from the training atoms than nearly all validation "
        "atoms, so their predictions are unreliable. The structures with the largest distances:"
    )
    yield page.table(("molecule", "structure", "atoms", "distance (1: boundary)"), rows)


def _ensemble_errors(labelled: Predictions, predictions: StructurePredictions) -> EnsembleErrors:
    """Return errors beside spreads."""
    return EnsembleErrors(
        labelled.sizes,
        errors.energy_errors(labelled) / labelled.sizes,
        predictions.energy_std / labelled.sizes,
        errors.force_errors(labelled),
        np.sqrt(np.mean(predictions.forces_std**2, axis=1)),
    )
