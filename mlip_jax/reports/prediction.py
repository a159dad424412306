"""Report on predictions for the molecules of a file: predicted values and their reliability."""

from __future__ import annotations

import collections
import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.datasets.property_data import Target
from mlip_jax.reports import figures, sections
from mlip_jax.reports import html_page as page
from mlip_jax.workdir import write_text

_MOST = 20  # maximum number of lines of a table


def write_prediction_report(
    workdir: str | os.PathLike,
    results: Path,
    targets: Sequence[Target],
    *,
    title: str,
    seconds: float,
    info: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Write report.html for a file of predictions (tasks/predict.py) to `workdir`; return its path.

    Args:
      workdir: Folder of the report.
      results: CSV file of predictions.
      targets: Properties that were predicted.
      title: Headline of the page.
      seconds: Time that the predictions took.
      info: Sections of names and values.
    """
    with open(results, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
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
                (
                    "outside of the domain",
                    f"{len(outside):,}",
                    "",
                    "farther from training than 99 % of validation",
                ),
                ("time", page.duration(seconds), "", ""),
            ]
        ),
    ]
    if outside:
        body.append(
            page.callout(
                f"{len(outside):,} of {len(done):,} molecules lie outside of what the predictor was "
                "trained on: do not trust their numbers unseen."
            )
        )
    body += [
        *_figures(done, targets),
        *_extremes(done, targets),
        *_failures(rows),
        *sections.provenance(dict(info)),
    ]
    write_text(Path(workdir) / "report.html", page.render(title, body))
    return Path(workdir) / "report.html"


def _figures(done, targets) -> Iterator[str]:
    """Yield a histogram and the expected errors per scalar property."""
    made = []
    for t in targets:
        if t.kind != "scalar" or not done:
            continue
        values = _column(done, t.name)
        fig, axes = figures.figure(t.name, "Expected error", size=(9.2, 3.6))
        axes[0].hist(values, bins=min(40, max(5, len(values) // 5)), color=figures.BLUE)
        axes[0].set(xlabel=f"{t.name} ({t.unit})" if t.unit else t.name, ylabel="molecules")
        distance, inside = (
            _column(done, "domain_distance"),
            np.array([r["outside_domain"] == "0" for r in done]),
        )
        for chosen, color, label in (
            (inside, figures.BLUE, "inside"),
            (~inside, figures.VERMILLION, "outside"),
        ):
            axes[1].scatter(
                distance[chosen],
                _column(done, f"{t.name}_expected_error")[chosen],
                s=9,
                color=color,
                alpha=0.5,
                linewidths=0,
                label=label,
            )
        axes[1].axvline(1, color=figures.GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes[1].set(
            xlabel="distance from the training molecules (1: border)",
            ylabel=f"expected |error| ({t.unit})" if t.unit else "expected |error|",
        )
        axes[1].legend(frameon=False, fontsize=9)
        made.append(
            page.figure(
                fig,
                f"What was predicted for {t.name}, and the error of validation molecules that lie "
                "as far from the training molecules.",
                wide=True,
            )
        )
    yield from made


def _extremes(done, targets) -> Iterator[str]:
    """Yield a table of the lowest and highest values per scalar property."""
    for t in targets:
        if t.kind != "scalar" or not done:
            continue
        order = np.argsort(_column(done, t.name))
        chosen = (
            order
            if len(order) <= _MOST
            else np.concatenate([order[: _MOST // 2], order[-_MOST // 2 :]])
        )
        yield page.heading(f"Lowest and highest {t.name}")
        yield page.table(
            [
                "molecule",
                "SMILES",
                f"{t.name} ({t.unit})" if t.unit else t.name,
                "expected |error|",
                "domain",
            ],
            [
                (
                    done[i]["name"] or done[i]["index"],
                    done[i]["smiles"],
                    float(done[i][t.name]),
                    float(done[i][f"{t.name}_expected_error"]),
                    "outside" if done[i]["outside_domain"] == "1" else "inside",
                )
                for i in chosen
            ],
        )


def _failures(rows) -> Iterator[str]:
    """Yield the most frequent reasons of failures, and a table of failed molecules."""
    failed = [row for row in rows if row["status"] == "failed"]
    if not failed:
        return
    yield page.heading("Not predicted")
    for reason, count in collections.Counter(
        row["reason"].partition(": ")[0] for row in failed
    ).most_common(5):
        yield page.paragraph(f"{count:,} × {reason}")
    yield page.table(
        ["molecule", "SMILES", "reason"],
        [(row["name"] or row["index"], row["smiles"], row["reason"]) for row in failed[:_MOST]],
    )


def _column(rows, name: str) -> np.ndarray:
    return np.array([float(row[name]) for row in rows])
