"""Report of a property predictor: `report.html`, `metrics.json` and predictions per structure."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.datasets.identity import readable_name
from mlip_jax.datasets.property_data import Target
from mlip_jax.foreign_text import TableWriter
from mlip_jax.reports import domain, errors, figures, intervals, sections, unseen
from mlip_jax.reports import html_page as page
from mlip_jax.reports.training import read_metrics
from mlip_jax.reports.unseen import UnseenStructures
from mlip_jax.workdir import atomic_open, write_text

_MAX_WORST = 10


@dataclasses.dataclass(frozen=True)
class PredictedProperties:
    """Labels and predictions of S structures with A atoms in total.

    Attributes:
      molecule: Names of the molecules, (S,).
      n_atoms: Number of atoms per structure, (S,).
      labels: Labels by property in its unit: (S,) for scalars, (S, 3) for vectors, (A,) for
        properties of atoms. Unknown labels are NaN.
      predicted: Predictions by property, of the same shapes and units.
      distance: Distance from the training molecules (domain.py) in units of the border of the
        domain, (S,); None if unknown.
      half_width: Half the width of the prediction intervals of scalars by property, (S,); infinite
        if there are too few validation structures. None without intervals.
      coverage: Requested probability that an interval contains the label.
    """

    molecule: np.ndarray
    n_atoms: np.ndarray
    labels: Mapping[str, np.ndarray]
    predicted: Mapping[str, np.ndarray]
    distance: np.ndarray | None = None
    half_width: Mapping[str, np.ndarray] | None = None
    coverage: float = float("nan")

    def absolute(self, name: str) -> np.ndarray:
        """Return |error| per structure, averaged over components or atoms, (S,); NaN if unknown."""
        error = np.abs(self.predicted[name] - self.labels[name])
        if error.ndim == 1 and len(error) == len(self.n_atoms):
            return error
        if error.ndim == 2:
            return error.mean(1)
        ends = np.cumsum(self.n_atoms)
        return np.array([error[end - n : end].mean() for n, end in zip(self.n_atoms, ends)])


def write_property_report(
    workdir: str | os.PathLike,
    outcomes: Mapping[str, PredictedProperties],
    targets: Sequence[Target],
    *,
    title: str,
    metrics_csv: Path,
    seconds: float,
    notes: Sequence[str],
    best_step: int,
    info: Mapping[str, Any],
    unseen_structures: Mapping[str, UnseenStructures] | None = None,
) -> Path:
    """Write report.html, metrics.json and predictions_PART.csv to `workdir`, each atomically.

    Args:
      workdir: Folder of the report.
      outcomes: Predictions by split: "train", "valid", and "test GEOMETRY" per source of test
        geometries.
      targets: Properties. After denoising there are none, and the report shows only the learning
        curves.
      title: Headline of the page.
      metrics_csv: Metrics file of the training loop.
      seconds: Training time in seconds.
      notes: Notes at the top of the page.
      best_step: Step of the evaluated checkpoint.
      info: Metadata of the run.
      unseen_structures: Structures with elements that training lacks, by split; `outcomes` do not
        contain them.

    Returns:
      Path of report.html.
    """
    workdir = Path(workdir)
    scores = {
        part: {t.name: score(outcome.absolute(t.name)) for t in targets}
        for part, outcome in outcomes.items()
    }
    first = next((part for part in outcomes if part.startswith("test ")), None)
    numbers = {
        "task": "property",
        "seconds": seconds,
        "best_step": best_step,
        "scores": scores,
        "domain_auc": {
            t.name: domain.roc(outcomes[first].distance, outcomes[first].absolute(t.name))[2]
            for t in targets
        }
        if first and outcomes[first].distance is not None
        else None,
        intervals.KEY: intervals.metrics(outcomes),
        unseen.KEY: unseen.metrics(unseen_structures or {}),
        "test": {f"{t.name}_mae": scores[first][t.name]["mae"] for t in targets} if first else None,
    }
    write_text(workdir / "metrics.json", json.dumps(errors.json_safe(numbers), indent=2) + "\n")
    for part, outcome in outcomes.items():
        write_predictions(workdir / f"predictions_{_file(part)}.csv", outcome, targets)
    body = [
        page.heading(title, 1),
        *(page.callout(note) for note in notes),
        *_table(scores, outcomes, targets),
        *intervals.section(numbers[intervals.KEY], targets),
        *unseen.section(numbers[unseen.KEY]),
        *_figures(outcomes, targets, first, metrics_csv),
        *_domain(outcomes, targets, first),
        *_worst(outcomes, targets, first),
        *sections.provenance(_provenance(info, best_step, seconds)),
    ]
    write_text(workdir / "report.html", page.render(title, body))
    return workdir / "report.html"


def score(absolute: np.ndarray) -> dict[str, float]:
    """Return the mean of |error|, its standard error over structures, RMSE, median and count."""
    known = absolute[np.isfinite(absolute)]
    if not len(known):
        return {
            "mae": float("nan"),
            "stderr": float("nan"),
            "rmse": float("nan"),
            "median": float("nan"),
            "count": 0,
        }
    return {
        "mae": float(known.mean()),
        "stderr": float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else np.nan,
        "rmse": float(np.sqrt((known**2).mean())),
        "median": float(np.median(known)),
        "count": len(known),
    }


def write_predictions(path: Path, outcome: PredictedProperties, targets: Sequence[Target]) -> None:
    """Write a line per structure: label and prediction of scalars, |error| of other properties."""
    with atomic_open(path, "w", newline="") as file:
        writer = TableWriter(file)
        writer.writerow(
            [
                "molecule",
                "n_atoms",
                *(
                    f"{t.name}{end}"
                    for t in targets
                    for end in (("", "_predicted") if t.kind == "scalar" else ("_absolute_error",))
                ),
                *(
                    f"{name}_{end}"
                    for name in outcome.half_width or ()
                    for end in ("lower", "upper")
                ),
            ]
        )
        columns = []
        for t in targets:
            columns += (
                [outcome.labels[t.name], outcome.predicted[t.name]]
                if t.kind == "scalar"
                else [outcome.absolute(t.name)]
            )
        for name, width in (outcome.half_width or {}).items():
            columns += [outcome.predicted[name] - width, outcome.predicted[name] + width]
        for s, (molecule, n) in enumerate(zip(outcome.molecule, outcome.n_atoms)):
            writer.writerow([molecule, n, *(f"{column[s]:.7g}" for column in columns)])


def _file(part: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in part).strip("_")


def _table(scores, outcomes, targets) -> Iterator[str]:
    """Yield a table of errors per split and property."""
    if not targets:
        yield page.paragraph(
            "This run only learned to predict noise; use it to initialize other runs."
        )
        return
    yield page.heading("Errors")
    header = ["", "structures"]
    for t in targets:
        header += [
            f"{t.name} MAE ({t.unit})" if t.unit else f"{t.name} MAE",
            "± standard error",
            "RMSE",
            "median",
        ]
    yield page.table(
        header,
        [
            (
                split,
                max(score[t.name]["count"] for t in targets),
                *(
                    score[t.name][key]
                    for t in targets
                    for key in ("mae", "stderr", "rmse", "median")
                ),
            )
            for split, score in scores.items()
        ],
    )
    if sum(part.startswith("test ") for part in outcomes) < 2:
        return
    yield page.paragraph(
        "All rows 'test ...' contain the same molecules, at geometries of different origin. Labels "
        "are those of the reference geometry."
    )


def _figures(outcomes, targets, first, metrics_csv) -> Iterator[str]:
    """Yield parity plots of the first test split, and learning curves."""
    parity = []
    for t in targets:
        if first and t.kind == "scalar":
            outcome = outcomes[first]
            fig, ax = figures.figure(t.name)
            figures.parity(
                ax,
                outcome.labels[t.name],
                outcome.predicted[t.name],
                color=figures.BLUE,
                axis=f"{t.name} ({t.unit})" if t.unit else t.name,
                error=outcome.absolute(t.name),
                unit=t.unit,
            )
            parity.append(page.figure(fig, f"Predicted against reference {t.name}, {first}."))
    layout = [("Loss", "loss", {"train_loss": "train", "valid_loss": "valid"})]
    layout += [
        (
            t.name,
            f"MAE ({t.unit})" if t.unit else "MAE",
            {f"train_{t.name}_mae": "train", f"valid_{t.name}_mae": "valid"},
        )
        for t in targets
    ]
    layout += [
        ("Alignment", "penalty", {"train_alignment": "train", "valid_alignment": "valid"}),
        ("Learning rate", "learning rate", {"learning_rate": "train"}),
    ]
    curves = figures.learning_curves(read_metrics(metrics_csv), layout)
    if parity:
        yield page.grid(parity)
    if curves is not None:
        yield page.figure(curves, "Loss, errors and learning rate during training.", wide=True)


def _domain(outcomes, targets, first) -> Iterator[str]:
    outcome = outcomes.get(first)
    if outcome is None or outcome.distance is None:
        return
    yield from domain.section(
        "Errors against the distance from the training molecules",
        outcome.distance,
        {f"{t.name}, {first}": (outcome.absolute(t.name), t.unit) for t in targets},
    )


def _worst(outcomes, targets, first) -> Iterator[str]:
    """Yield a table of the molecules with the largest errors per scalar property."""
    for t in targets:
        if not first or t.kind != "scalar":
            continue
        outcome, absolute = outcomes[first], outcomes[first].absolute(t.name)
        order = [
            s
            for s in np.argsort(-np.nan_to_num(absolute, nan=-1.0))[:_MAX_WORST]
            if np.isfinite(absolute[s])
        ]
        yield page.heading(f"Molecules with the largest errors: {t.name}, {first}")
        yield page.table(
            ["molecule", "atoms", "reference", "predicted", "error"],
            [
                (
                    readable_name(str(outcome.molecule[s])),
                    int(outcome.n_atoms[s]),
                    float(outcome.labels[t.name][s]),
                    float(outcome.predicted[t.name][s]),
                    float(outcome.predicted[t.name][s] - outcome.labels[t.name][s]),
                )
                for s in order
            ],
        )


def _provenance(
    info: Mapping[str, Any], best_step: int, seconds: float
) -> dict[str, dict[str, Any]]:
    config, statistics = info["config"], info["statistics"]
    parts = {
        name: {k: str(v) for k, v in config[name].items()}
        for name in ("data", "property", "init", "align", "model", "optimizer", "train")
    }
    return {
        "Result": {
            "best checkpoint at step": best_step,
            "training steps": info["updates"],
            "training seconds": round(seconds, 1),
            "training structures": statistics["num_structures"],
            "level of theory": statistics["level_of_theory"],
        },
        **{name.capitalize(): values for name, values in parts.items()},
        "Versions": info["versions"],
    }
