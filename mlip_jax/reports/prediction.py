"""Report on predictions for the molecules of a file: predicted values and their reliability."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.datasets.identity import display_name, readable_name
from mlip_jax.datasets.property_data import Target
from mlip_jax.foreign_text import table_rows
from mlip_jax.reports import attributions, figures, sections
from mlip_jax.reports import html_page as page
from mlip_jax.reports.attributions import AttributedMolecule
from mlip_jax.reports.relaxation.results import kind_of_reason
from mlip_jax.workdir import write_text

OUTSIDE = "Molecules outside the domain"
_MAX_ROWS = 20


def write_prediction_report(
    workdir: str | os.PathLike,
    results: Path,
    targets: Sequence[Target],
    *,
    title: str,
    seconds: float,
    info: Mapping[str, Mapping[str, Any]],
    attributed: Mapping[str, Sequence[AttributedMolecule]],
) -> Path:
    """Write report.html for a file of predictions (tasks/predict.py) to `workdir`; return its path.

    Args:
      workdir: Folder of the report.
      results: CSV file of predictions.
      targets: Properties that were predicted.
      title: Headline of the page.
      seconds: Time that the predictions took.
      info: Sections of names and values.
      attributed: Molecules with the attributions of their atoms, by scalar property.
    """
    with open(results, newline="", encoding="utf-8") as file:
        rows = list(table_rows(file))
    done = [row for row in rows if row["status"] == "predicted"]
    outside = [row for row in done if row["outside_domain"] == "1"]
    body = [
        page.heading(title, 1),
        page.cards(
            [
                (
                    "molecules",
                    f"{len(done):,}",
                    "",
                    f"of {len(rows):,}; {len(rows) - len(done):,} failed",
                ),
                ("outside the domain", f"{len(outside):,}", "", _outside_detail(outside)),
                ("time", page.duration(seconds), "", ""),
            ]
        ),
    ]
    if outside:
        body.append(
            page.callout(
                f"{len(outside):,} of {len(done):,} molecules are outside the domain of the "
                "predictor. Their predictions are unreliable; check them before you use them."
            )
        )
    body += [
        *_figures(done, targets),
        *_extremes(done, targets),
        *(
            part
            for t in targets
            for part in attributions.section(t.name, t.unit, attributed.get(t.name, ()))
        ),
        *_outside(outside),
        *_failures(rows),
        *sections.provenance(dict(info)),
    ]
    write_text(Path(workdir) / "report.html", page.render(title, body))
    return Path(workdir) / "report.html"


def _outside_detail(outside) -> str:
    """Return the explanation of the card on the domain, with a link to the molecules outside."""
    if outside:
        return page.link(OUTSIDE, "listed below")
    return "farther from the training split than 99 % of the validation split"


def _figures(done, targets) -> Iterator[str]:
    """Yield a histogram and the expected errors per scalar property."""
    for t in targets:
        if t.kind != "scalar" or not done:
            continue
        values = _column(done, t.name)
        fig, axes = figures.figure(t.name, "Expected error", size=(9.2, 3.6))
        axes[0].hist(values, bins=min(40, max(5, len(values) // 5)), color=figures.BLUE)
        axes[0].set(xlabel=f"{t.name} ({t.unit})" if t.unit else t.name, ylabel="molecules")
        axes[0].yaxis.get_major_locator().set_params(integer=True)
        distance, expected = (
            _column(done, name) for name in ("domain_distance", f"{t.name}_expected_error")
        )
        axes[1].scatter(distance, expected, s=9, color=figures.BLUE, alpha=0.5, linewidths=0)
        axes[1].axvline(1, color=figures.GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes[1].set(
            xlabel="distance from the training molecules (1: boundary)",
            ylabel=f"expected |error| ({t.unit})" if t.unit else "expected |error|",
        )
        yield page.figure(
            fig,
            f"Predictions of {t.name}, and their expected errors: those of validation molecules at "
            "the same distance from the training molecules. Molecules outside the domain have none.",
            wide=True,
        )


def _extremes(done, targets) -> Iterator[str]:
    """Yield a table of the lowest and highest values per scalar property."""
    for t in targets:
        if t.kind != "scalar" or not done:
            continue
        order = np.argsort(_column(done, t.name))
        half = _MAX_ROWS // 2
        chosen = order if len(order) <= _MAX_ROWS else np.concatenate([order[:half], order[-half:]])
        yield page.heading(f"Lowest and highest {t.name}")
        if any(row.get(f"{t.name}_upper") for row in done):
            yield page.paragraph(
                "The requested coverage of intervals is expected for molecules that are drawn like "
                "those of validation, not for molecules outside the domain."
            )
        yield page.table(
            [
                "molecule",
                "SMILES",
                f"{t.name} ({t.unit})" if t.unit else t.name,
                "expected |error|",
                "interval",
                "domain",
            ],
            [
                (
                    _name(done[i]),
                    readable_name(done[i]["smiles"]),
                    float(done[i][t.name]),
                    _known(done[i][f"{t.name}_expected_error"]),
                    _interval(done[i], t.name),
                    page.mark("outside") if done[i]["outside_domain"] == "1" else "inside",
                )
                for i in chosen
            ],
        )


def _name(row) -> str:
    return display_name(row["name"], row["smiles"], None, f"molecule {row['index']}")


def _known(cell: str) -> float | str:
    """Return the number of a cell, or "unknown" if it is empty: outside the domain."""
    return float(cell) if cell else "unknown"


def _interval(row, name: str) -> str:
    """Return the prediction interval of a molecule, or "unknown"."""
    lower, upper = row.get(f"{name}_lower"), row.get(f"{name}_upper")
    return f"{float(lower):.4g} to {float(upper):.4g}" if lower and upper else "unknown"


def _failures(rows) -> Iterator[str]:
    """Yield the most frequent reasons of failures, and a table of failed molecules."""
    failed = [row for row in rows if row["status"] == "failed"]
    if not failed:
        return
    yield page.heading("Failed molecules")
    kinds = collections.Counter(kind_of_reason(row["reason"]) for row in failed)
    for reason, count in kinds.most_common(5):
        yield page.paragraph(f"{count:,} × {reason}")
    yield page.table(
        ["molecule", "SMILES", "reason"],
        [(_name(row), row["smiles"], row["reason"]) for row in failed[:_MAX_ROWS]],
    )


def _outside(outside) -> Iterator[str]:
    """Yield a table of the molecules that are farthest outside the domain."""
    if not outside:
        return
    order = np.argsort(-_column(outside, "domain_distance"), kind="stable")[:_MAX_ROWS]
    yield page.heading(OUTSIDE)
    yield page.paragraph(
        "In the table of results, outside_domain is 1 for these molecules. The farthest ones:"
    )
    yield page.table(
        ["molecule", "SMILES", "distance (1: boundary)"],
        [
            (
                _name(outside[i]),
                readable_name(outside[i]["smiles"]),
                float(outside[i]["domain_distance"] or "nan"),
            )
            for i in order
        ],
    )


def _column(rows, name: str) -> np.ndarray:
    return np.array([float(row[name] or "nan") for row in rows])
