"""Report of a training run: `report.html`, a self-contained page, and `metrics.json`."""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mlip_jax.reports import domain, errors, sections, unseen
from mlip_jax.reports import html_page as page
from mlip_jax.reports.predictions import Predictions
from mlip_jax.reports.unseen import UnseenStructures
from mlip_jax.simulation.trust.atom_domain import DomainEvaluation
from mlip_jax.workdir import write_text

SPLITS = ("train", "valid", "test")


def write_report(
    workdir: str | os.PathLike,
    predictions: dict[str, Predictions],
    *,
    title: str,
    info: dict[str, dict[str, str | int | float]],
    metrics_csv: Path | None,
    seconds: float,
    notes: Sequence[str] = (),
    evaluation: DomainEvaluation | None = None,
    sizes: Mapping[str, int] | None = None,
    unseen_structures: Mapping[str, UnseenStructures] | None = None,
) -> Path:
    """Write `report.html` and `metrics.json` to `workdir`, each atomically.

    Args:
      workdir: Folder of the report; created if missing.
      predictions: Predictions by split: "train", "valid", "test". Splits may be missing, empty or
        without labels, which the report states. Figures and tables show the test split, or, if it
        has no structures, the validation or training split.
      title: Headline of the page.
      info: Sections of names and values: data, model, training, versions, hardware.
      metrics_csv: Metrics file of the training loop, see `read_metrics`; may be None or missing.
      seconds: Wall time of the training in seconds.
      notes: Notes at the top of the page.
      evaluation: Errors of structures of the split shown in detail, with their distance from the
        training set; None if unknown.
      sizes: Number of structures of each split. None if `predictions` contains all of them rather
        than a sample.
      unseen_structures: Structures with elements that training lacks, by split; `predictions` do
        not contain them.

    Returns:
      Path of `report.html`.

    Raises:
      ValueError: `predictions` has a key that is not a split.
    """
    unknown = sorted(set(predictions) - set(SPLITS))
    if unknown:
        raise ValueError(f"predictions: unknown splits {unknown}; must be among {list(SPLITS)}")
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    unseen_metrics = unseen.metrics(unseen_structures or {})
    content = sections.ReportData(
        splits={name: predictions[name] for name in SPLITS if name in predictions},
        metrics=metrics(predictions, seconds)
        | {
            "domain_auc": domain_auc(evaluation),
            "split_sizes": dict(sizes or {}),
            unseen.KEY: unseen_metrics,
        },
        curves=read_metrics(metrics_csv),
    )
    # Write the metrics first, so that they exist even if a figure fails.
    write_text(
        workdir / "metrics.json", json.dumps(content.metrics, indent=2, allow_nan=False) + "\n"
    )
    body = [
        page.heading(title, 1),
        *sections.headline(content, notes),
        *sections.error_table(content),
        *unseen.section(unseen_metrics),
        *sections.learning_curves(content),
        *sections.parity(content),
        *sections.drift(content),
        *sections.per_group(content),
        *sections.worst_cases(content),
        *domain_section(evaluation),
        *sections.provenance(info),
    ]
    write_text(workdir / "report.html", page.render(title, body))
    return workdir / "report.html"


def metrics(predictions: dict[str, Predictions], seconds: float) -> dict:
    """Return the JSON-safe content of `metrics.json`; None for missing splits.

    Details (errors per element, subset and size, outliers) are those of `shown_split`: the test
    split or, if it has no structures, the validation or training split.
    """
    shown = next(
        (
            name
            for name in reversed(SPLITS)
            if name in predictions and predictions[name].num_structures
        ),
        None,
    )
    result = {
        name: errors.summary(predictions[name]) if name in predictions else None
        for name in reversed(SPLITS)
    }
    result |= {"seconds": seconds, "shown_split": shown, "per_element_correction": {}}
    if shown is None:
        return errors.json_safe(result)
    p = predictions[shown]
    fits = {
        f"fitted_on_{name}": predictions[name] for name in ("valid", "test") if name in predictions
    }
    return errors.json_safe(result | details(p, fits | {f"fitted_on_{shown}": p}))


def details(p: Predictions, fits: dict[str, Predictions]) -> dict:
    """Return errors per element, subset and size, outliers, and gains of per-element corrections.

    Args:
      p: Predictions.
      fits: Predictions that the per-element corrections are fitted to, by name.
    """
    outliers = errors.force_outliers(p)
    return {
        "per_element_correction": {
            name: errors.per_element_correction(p, fit) for name, fit in fits.items()
        },
        "per_element": errors.per_element(p),
        "per_subset": errors.per_subset(p),
        "per_size": errors.per_size(p),
        "worst_molecules": errors.worst_molecules(p),
        "force_outlier_threshold_ev_per_ang": errors.OUTLIER_THRESHOLD,
        "force_outliers": outliers[: sections.MAX_OUTLIERS],
    }


def domain_auc(evaluation: DomainEvaluation | None) -> dict | None:
    """Return the area under the ROC curve of the distance for large errors, by kind of error."""
    if evaluation is None:
        return None
    kinds = {"energy": evaluation.energy_error, "force": evaluation.force_error}
    return errors.json_safe(
        {kind: domain.roc(evaluation.distance, error)[2] for kind, error in kinds.items()}
    )


def domain_section(evaluation: DomainEvaluation | None) -> Iterator[str]:
    """Yield the section on the distance from the training set, if it is known."""
    if evaluation is not None:
        yield from domain.section(
            "Errors against the distance from the training set",
            evaluation.distance,
            {
                "energy": (1e3 * evaluation.energy_error, "meV/atom"),
                "forces": (1e3 * evaluation.force_error, "meV/Å"),
            },
        )


def read_metrics(path: str | os.PathLike | None) -> dict[str, np.ndarray]:
    """Read the columns (R,) of a CSV file with a header row.

    Cells that are empty, missing or not numbers become NaN. Without a path, or if the file is
    missing or empty, there are no columns: a run that logged nothing still has a report.
    """
    if path is None or not Path(path).is_file():
        return {}
    # A run that was killed may leave an incomplete line and arbitrary bytes.
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.reader(line.replace("\0", "") for line in file)
        header = [name.strip() for name in next(reader, [])]
        rows = [row for row in reader if row]
    return {
        name: np.array([_float(row[i]) if i < len(row) else np.nan for row in rows])
        for i, name in enumerate(header)
    }


def _float(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return np.nan
