"""Report of relaxations: `report.html`, a self-contained page, and `metrics.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlip_jax.reports import html_page as page
from mlip_jax.reports import sections
from mlip_jax.reports.molecules import Picture, molecule_figure
from mlip_jax.reports.relaxation.figures import cell_figure, distribution_figure
from mlip_jax.reports.relaxation.results import MAX_OUTSIDE, Relaxations, metrics, reasons_by_count
from mlip_jax.workdir import write_text

_MAX_REASONS = 25
_OUTSIDE = "Outside the domain"


def write_relaxation_report(
    workdir: str | os.PathLike,
    results: Relaxations,
    *,
    title: str,
    seconds: float,
    info: Mapping[str, Mapping[str, Any]],
    pictures: Sequence[Picture] = (),
    files: Sequence[str] = (),
) -> Path:
    """Write `report.html` and `metrics.json` to `workdir`, each atomically.

    Args:
      workdir: Folder of the report.
      results: Result of `read_results`.
      title: Headline of the page.
      seconds: Time that the relaxations took, in seconds.
      info: Sections of names and values: settings, force field, hardware.
      pictures: Molecules before and after.
      files: Names of further files in the workdir, to list on the page.

    Returns:
      Path of `report.html`.
    """
    workdir = Path(workdir)
    content = metrics(results, seconds)
    # Write the metrics first, so that they exist even if a figure fails.
    write_text(
        workdir / "metrics.json",
        json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n",
    )
    body = [
        page.heading(title, 1),
        *_headline(content),
        *_distributions(results),
        *_cells(results),
        *_pictures(pictures),
        *_reasons(results),
        *_outside(results),
        *sections.provenance(info, files),
    ]
    write_text(workdir / "report.html", page.render(title, body))
    return workdir / "report.html"


def _headline(content: Mapping[str, Any]) -> Iterator[str]:
    total, share = content["molecules"], content["converged_share"]
    percent = "–" if share is None else f"{100 * share:.4g}"
    steps, gained = content["steps"] or {}, content["energy_gained_ev"] or {}
    outside = content["outside_domain"]
    domain = (
        []
        if outside is None
        else [
            (
                "outside the domain",
                page.number(outside),
                "",
                page.link(_OUTSIDE, "relaxed geometries, listed below")
                if outside
                else "relaxed geometries farther from the training split than 99 % of the "
                "validation split",
            )
        ]
    )
    yield page.cards(
        [
            (
                "molecules",
                page.number(total),
                "",
                f"{page.number(content['steps_in_all'])} steps in total",
            ),
            (
                "converged",
                percent,
                "%",
                f"{page.number(content['converged'])} of {page.number(total)}; "
                f"{page.number(content['step_limit'])} at the step limit, "
                f"{page.number(content['diverged'])} diverged",
            ),
            (
                "failed",
                page.number(content["failed"]),
                "",
                "not relaxed; reasons below" if content["failed"] else "not relaxed",
            ),
            (
                "speed",
                page.number(content["molecules_per_second"]),
                "molecules/s",
                f"{page.duration(content['seconds'])} in total, including compilation",
            ),
            (
                "steps, median",
                _count(steps.get("median")),
                "",
                f"95 % need at most {_count(steps.get('p95'))}",
            ),
            (
                "energy decrease, median",
                page.number(gained.get("median")),
                "eV",
                f"mean {page.number(gained.get('mean'))} eV",
            ),
            *domain,
        ]
    )


def _count(steps: float | None) -> str:
    """Format a quantile of numbers of steps, which may be between two integers."""
    return "–" if steps is None else f"{steps:,.6g}"


def _distributions(results: Relaxations) -> Iterator[str]:
    yield page.heading("Distributions")
    if not results.of("converged", "step limit").any():
        yield page.paragraph("No molecule was relaxed.")
        return
    yield page.figure(
        distribution_figure(results),
        (
            "Steps, energy at the start minus energy at the end, root mean square distance between "
            "start and end after alignment, and largest force on an atom, for molecules that "
            "converged or reached the step limit. Vertical lines are medians."
        ),
        wide=True,
    )


def _cells(results: Relaxations) -> Iterator[str]:
    if not len(results.volume_change):
        return
    yield page.heading("Cells")
    yield page.figure(
        cell_figure(results),
        (
            "Relative change of the volume, and pressure of the relaxed structure: minus a third of "
            "the trace of its stress."
        ),
        wide=True,
    )


def _pictures(pictures: Sequence[Picture]) -> Iterator[str]:
    if pictures:
        yield page.heading("Molecules before and after")
        yield page.figure(
            molecule_figure(pictures),
            (
                "Molecules at the start (top) and relaxed (bottom), aligned and viewed from the "
                "same direction, ordered from small to large changes of the geometry."
            ),
            wide=True,
        )


def _reasons(results: Relaxations) -> Iterator[str]:
    """Yield a table of the reasons why molecules did not converge, the most frequent first."""
    yield page.heading("Not converged")
    if not results.reasons:
        yield page.paragraph("All molecules converged.")
        return
    rows = [
        (
            kind or "–",
            status,
            count,
            f"{100 * count / len(results):.3g} %",
            example if len(example) < 160 else example[:159] + "…",
        )
        for (status, kind), (count, example) in reasons_by_count(results)
    ]
    yield page.table(("reason", "status", "molecules", "share", "example"), rows[:_MAX_REASONS])
    if len(rows) > _MAX_REASONS:
        yield page.paragraph(
            f"{len(rows) - _MAX_REASONS} rarer reasons are omitted; results.csv contains all."
        )


def _outside(results: Relaxations) -> Iterator[str]:
    """Yield a table of the first molecules whose relaxed geometries are outside the domain."""
    if not results.outside_names:
        return
    yield page.heading(_OUTSIDE)
    total = int((results.outside == 1).sum())
    yield page.paragraph(
        "The relaxed geometries of these molecules are unlike the training data, so their energies "
        "may be wrong. In results.csv, outside_domain is 1 for these molecules."
        + (f" The first {len(results.outside_names)} of {total:,}:" * (total > MAX_OUTSIDE))
    )
    yield page.table(("molecule", "index in results.csv", "status"), results.outside_names)
