"""Report of reaction paths: `report.html`, a self-contained page, and `metrics.json`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mlip_jax.reports import figures
from mlip_jax.reports import html_page as page
from mlip_jax.reports.simulations.summary import write_summary

_MAX_ROWS, _MAX_PROFILES = 500, 24


@dataclasses.dataclass(frozen=True)
class ReportedPath:
    """Path of one reaction, as plain values.

    Attributes:
      index: Index of the path in its file.
      name: Name or formula.
      status: "converged", "step limit", "diverged" or "failed".
      reason: Reason for "failed", or "".
      n_atoms: Number of atoms.
      steps: Number of steps.
      fmax: Largest force on the band (eV/Å).
      barrier: Energy of the highest image minus that of the first one (eV).
      reverse_barrier: The same minus that of the last one (eV).
      reaction_energy: Energy of the last image minus that of the first one (eV).
      distances: Length of the path up to each image (Å).
      energies: Energies of the images (eV).
    """

    index: int
    name: str
    status: str
    reason: str = ""
    n_atoms: int = 0
    steps: int = 0
    fmax: float = math.nan
    barrier: float = math.nan
    reverse_barrier: float = math.nan
    reaction_energy: float = math.nan
    distances: Sequence[float] = ()
    energies: Sequence[float] = ()


def write_reaction_report(
    workdir: str | os.PathLike,
    paths: Sequence[ReportedPath],
    *,
    title: str,
    info: Mapping[str, Mapping[str, Any]],
    files: Sequence[str] = (),
) -> Path:
    """Write `report.html` and `metrics.json` to `workdir`, each atomically.

    Args:
      workdir: Folder of the report.
      paths: Paths of the reactions.
      title: Headline of the page.
      info: Sections of names and values.
      files: Names of further files in the workdir, to list on the page.

    Returns:
      Path of `report.html`.
    """
    done = [p for p in paths if len(p.energies)]
    statuses = ("converged", "step limit", "diverged", "failed")
    content = {"paths": len(paths)} | {
        s.replace(" ", "_"): sum(p.status == s for p in paths) for s in statuses
    }
    body = [*_table(done), *_profiles(done), *_failures(paths)]
    return write_summary(workdir, title, content, body, info, files)


def _table(done: Sequence[ReportedPath]) -> Iterator[str]:
    yield page.heading("Barriers")
    header = (
        "reaction",
        "status",
        "steps",
        "barrier (eV)",
        "reverse barrier (eV)",
        "reaction energy (eV)",
        "largest force (eV/Å)",
    )
    rows = [
        (
            p.name,
            p.status,
            p.steps,
            f"{p.barrier:.4f}",
            f"{p.reverse_barrier:.4f}",
            f"{p.reaction_energy:.4f}",
            page.number(p.fmax),
        )
        for p in done[:_MAX_ROWS]
    ]
    yield page.table(header, rows) if rows else page.paragraph("No path has a result.")


def _profiles(done: Sequence[ReportedPath]) -> Iterator[str]:
    for p in done[:_MAX_PROFILES]:
        yield page.figure(
            profile_figure(p),
            f"{p.name}: energies of the images relative to the first one, against the length of the "
            "path.",
        )


def profile_figure(path: ReportedPath) -> Figure:
    """Draw the energies of the images against the length of the path."""
    fig, ax = figures.figure(figures.escape_label(path.name, 40), size=(5.2, 3.6))
    energies = np.asarray(path.energies) - path.energies[0]
    ax.plot(path.distances, energies, "-", color=figures.BLUE, linewidth=1.2)
    ax.plot(path.distances, energies, "o", color=figures.BLUE, ms=4)
    highest = int(np.argmax(energies))
    ax.plot(path.distances[highest], energies[highest], "o", color=figures.VERMILLION, ms=6)
    ax.axhline(0, color=figures.GREY, linewidth=0.6)
    ax.set(xlabel="length of the path (Å)", ylabel="energy (eV)")
    return fig


def _failures(paths: Sequence[ReportedPath]) -> Iterator[str]:
    rows = [(p.name, p.reason) for p in paths if p.reason]
    if rows:
        yield page.heading("Paths without a result")
        yield page.table(("reaction", "reason"), rows[:_MAX_ROWS])
