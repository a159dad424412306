"""Report of an audit: `report.html`, a self-contained page, and `metrics.json`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mlip_jax.reports import figures, sections
from mlip_jax.reports import html_page as page
from mlip_jax.simulation.audit.audit import AuditResult
from mlip_jax.simulation.audit.checks import AuditCheck
from mlip_jax.workdir import write_text


def metrics(result: AuditResult) -> dict[str, Any]:
    """Return the content of `metrics.json`; None for unknown values."""
    return {
        "scores": result.scores,
        "notes": list(result.notes),
        "checks": {
            name: {
                "rows": [{key: _finite(v) for key, v in row.items()} for row in check.rows],
                "skipped": check.skipped,
                "curves": [
                    {
                        "molecule": curve.name,
                        "coordinate": curve.label,
                        "x": curve.x.tolist(),
                        "energy_ev": curve.energy.tolist(),
                        "reference_ev": None
                        if curve.reference is None
                        else curve.reference.tolist(),
                    }
                    for curve in check.curves
                ],
            }
            for name, check in result.checks.items()
        },
    }


def write_audit_report(
    workdir: str | os.PathLike,
    result: AuditResult,
    *,
    title: str,
    info: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Write `report.html` and `metrics.json` to `workdir`, each atomically.

    Args:
      workdir: Folder of the report.
      result: Result of the audit.
      title: Headline of the page.
      info: Sections of names and values.

    Returns:
      Path of `report.html`.
    """
    workdir = Path(workdir)
    write_text(workdir / "metrics.json", json.dumps(metrics(result), indent=2) + "\n")
    parts = [page.heading(title, 1), *map(page.callout, result.notes), _cards(result)]
    for check in result.checks.values():
        parts += _section(check, result.options.reference)
    parts += sections.provenance(info, ["metrics.json"])
    write_text(workdir / "report.html", page.render(title, parts))
    return workdir / "report.html"


def _cards(result: AuditResult) -> str:
    """Return one card per score; a unit in parentheses at the end of its name is separate."""
    cards = []
    for name, value in result.scores.items():
        label, _, unit = name.partition(" (")
        cards.append((label, page.number(value), unit.removesuffix(")"), ""))
    return page.cards(cards)


def _section(check: AuditCheck, reference: str) -> Iterator[str]:
    """Yield the section of a check: description, table, curves and omissions."""
    yield page.heading(check.name)
    yield page.paragraph(check.description)
    if check.rows:
        header = list(check.rows[0])
        yield page.table(header, [[row[name] for name in header] for row in check.rows])
    if check.curves:
        yield page.figure(
            _figure(check),
            f"Energies of the force field (solid) and of {reference} (dashed), if compared.",
            wide=True,
        )
    if check.skipped:
        yield page.paragraph(f"Skipped: {'; '.join(check.skipped)}.")


def _figure(check: AuditCheck) -> Figure:
    """Draw the curves of a check, one panel each."""
    curves = check.curves
    rows = math.ceil(len(curves) / 2)
    fig, axes = figures.figure(*(curve.name for curve in curves), size=(9.0, 2.6 * rows))
    for ax, curve in zip([axes] if len(curves) == 1 else axes, curves):
        ax.plot(curve.x, curve.energy, color=figures.BLUE)
        if curve.reference is not None:
            ax.plot(curve.x, curve.reference, "--", color=figures.VERMILLION)
        ax.set_xlabel(curve.label)
        ax.set_ylabel("energy (eV)")
    return fig


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
