"""Report of crystals: `report.html`, a self-contained page, and `metrics.json`."""

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

_MAX_ROWS, _MAX_FIGURES = 200, 12


@dataclasses.dataclass(frozen=True)
class ReportedCrystal:
    """Properties of one crystal, as plain values; empty if there is a reason for it.

    Attributes:
      index: Index of the crystal in its file.
      name: Name or formula.
      reason: Reason why there is no result, or "".
      remark: Reason why a part is missing or unreliable, or "".
      outside_domain: Reason why the crystal is outside the domain of the force field, or "".
      n_atoms: Number of atoms of the cell.
      energy: Energy (eV).
      cell: Lengths (Å) and angles (degrees) of the relaxed cell, six numbers.
      volume: Volume of the relaxed cell (Å³).
      volumes: Volumes of the equation of state (Å³).
      energies: Energies at these volumes (eV).
      curve: Volumes (Å³) and energies (eV) of the fitted curve.
      bulk_modulus: Bulk modulus (GPa).
      derivative: Derivative of the bulk modulus with respect to pressure.
      lowest_frequency: Lowest phonon frequency (THz); negative if imaginary.
      zero_point_energy: Zero-point energy per cell (eV).
      heat_capacity: Heat capacity per cell (k_B).
      supercell: Numbers of cells of the supercell of the phonons.
      supercell_spacing: Smallest distance of its lattice planes (Å).
      interaction_range: Distance up to which atoms interact (Å).
      distances: Positions of the wave vectors on the path.
      ticks: Positions and labels of the special points.
      bands: Frequencies on the path (THz).
    """

    index: int
    name: str
    reason: str = ""
    remark: str = ""
    outside_domain: str = ""
    n_atoms: int = 0
    energy: float = math.nan
    cell: Sequence[float] = ()
    volume: float = math.nan
    volumes: Sequence[float] = ()
    energies: Sequence[float] = ()
    curve: Sequence[Sequence[float]] = ()
    bulk_modulus: float = math.nan
    derivative: float = math.nan
    lowest_frequency: float = math.nan
    zero_point_energy: float = math.nan
    heat_capacity: float = math.nan
    supercell: Sequence[int] = ()
    supercell_spacing: float = math.nan
    interaction_range: float = math.nan
    distances: Sequence[float] = ()
    ticks: Sequence[Sequence[Any]] = ()
    bands: Sequence[Sequence[float]] = ()


def write_crystal_report(
    workdir: str | os.PathLike,
    results: Sequence[ReportedCrystal],
    *,
    title: str,
    info: Mapping[str, Mapping[str, Any]],
    files: Sequence[str] = (),
    imaginary: float = -0.1,
) -> Path:
    """Write `report.html` and `metrics.json` to `workdir`, each atomically.

    Args:
      workdir: Folder of the report.
      results: Properties of the crystals.
      title: Headline of the page.
      info: Sections of names and values.
      files: Names of further files in the workdir, to list on the page.
      imaginary: Frequency (THz) below which a mode counts as imaginary.

    Returns:
      Path of `report.html`.
    """
    done = [r for r in results if not r.reason]
    content = {
        "crystals": len(results),
        "without_result": len(results) - len(done),
        "with_imaginary_modes": sum(r.lowest_frequency < imaginary for r in done),
        "outside_domain": sum(bool(r.outside_domain) for r in done),
    }
    body = [*_table(done), *_figures(done), *_reasons(results)]
    return write_summary(workdir, title, content, body, info, files)


def _table(done: Sequence[ReportedCrystal]) -> Iterator[str]:
    yield page.heading("Properties")
    header = (
        "crystal",
        "atoms",
        "a, b, c (Å)",
        "angles (°)",
        "volume (Å³/atom)",
        "energy (eV/atom)",
        "bulk modulus (GPa)",
        "derivative of the bulk modulus",
        "lowest phonon (THz)",
        "supercell",
        "zero-point energy (meV/atom)",
    )
    rows = [
        (
            r.name,
            r.n_atoms,
            ", ".join(f"{x:.3f}" for x in r.cell[:3]),
            ", ".join(f"{x:.1f}" for x in r.cell[3:]),
            f"{r.volume / r.n_atoms:.3f}",
            f"{r.energy / r.n_atoms:.4f}",
            page.number(r.bulk_modulus),
            page.number(r.derivative),
            page.number(r.lowest_frequency),
            "×".join(map(str, r.supercell)),
            page.number(1e3 * r.zero_point_energy / r.n_atoms),
        )
        for r in done[:_MAX_ROWS]
    ]
    yield page.table(header, rows) if rows else page.paragraph("No crystal has a result.")
    yield page.paragraph(
        "Bulk moduli are those of Birch-Murnaghan equations of state with relaxed atoms. A negative "
        "phonon frequency is imaginary: the crystal is not at a minimum, or the supercell is too "
        "small."
    )


def _figures(done: Sequence[ReportedCrystal]) -> Iterator[str]:
    for r in done[:_MAX_FIGURES]:
        if len(r.curve) or len(r.bands):
            yield page.heading(r.name)
            yield page.figure(
                crystal_figure(r),
                "Left: energy per atom against volume per atom, and the fitted equation of state. "
                "Right: phonons along the special points of the Brillouin zone.",
                wide=True,
            )


def crystal_figure(crystal: ReportedCrystal) -> Figure:
    """Draw the equation of state and the phonons of a crystal."""
    fig, axes = figures.figure("Equation of state", "Phonons", size=(9.2, 3.6))
    n, ax = crystal.n_atoms, axes[0]
    ax.set(xlabel="volume (Å³/atom)", ylabel="energy (meV/atom)")
    if len(crystal.curve):
        volumes, energies = np.asarray(crystal.curve)
        level = energies.min()
        ax.plot(volumes / n, 1e3 * (energies - level) / n, color=figures.BLUE, linewidth=1.4)
        points = 1e3 * (np.asarray(crystal.energies, float) - level) / n
        ax.plot(np.asarray(crystal.volumes) / n, points, "o", color=figures.VERMILLION, ms=4)
    else:
        figures.mark_empty(ax)
    ax = axes[1]
    ax.set(ylabel="frequency (THz)")
    if len(crystal.bands):
        ax.plot(crystal.distances, crystal.bands, color=figures.BLUE, linewidth=1.0)
        ax.axhline(0, color=figures.GREY, linewidth=0.6)
        ax.set_xlim(crystal.distances[0], crystal.distances[-1])
        for position, _ in crystal.ticks:
            ax.axvline(position, color=figures.GREY, linewidth=0.6)
        ax.set_xticks([p for p, _ in crystal.ticks])
        ax.set_xticklabels([{"G": "Γ"}.get(label, label) for _, label in crystal.ticks])
    else:
        figures.mark_empty(ax)
    return fig


def _reasons(results: Sequence[ReportedCrystal]) -> Iterator[str]:
    rows = [(r.name, r.reason or r.remark) for r in results if r.reason or r.remark]
    if rows:
        yield page.heading("Missing and unreliable results")
        yield page.table(("crystal", "reason"), rows[:_MAX_ROWS])
