"""Report of vibrations: `report.html`, a self-contained page, and `metrics.json`."""

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

_MAX_ROWS, _MAX_SPECTRA = 60, 6
_WIDTH = 15.0  # width of the lines of the figure, 1/cm


@dataclasses.dataclass(frozen=True)
class ReportedVibrations:
    """Vibrations of one molecule; empty if there is a reason for it.

    Attributes:
      index: Index of the molecule in its file.
      name: Name of the molecule.
      reason: Reason why there is no result, or "".
      outside: Reason why the molecule is outside the domain of the force field, or "".
      energy: Energy of the minimum (eV).
      fmax: Largest force (eV/Å).
      frequencies: Wave numbers (1/cm), ascending; imaginary ones are negative.
      reduced_masses: Reduced masses (amu).
      thermochemistry: Fields of `Thermochemistry`.
    """

    index: int
    name: str
    reason: str = ""
    outside: str = ""
    energy: float = math.nan
    fmax: float = math.nan
    frequencies: Sequence[float] = ()
    reduced_masses: Sequence[float] = ()
    thermochemistry: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_imaginary(self) -> int:
        """Return the number of imaginary modes."""
        return sum(frequency < 0 for frequency in self.frequencies)


def write_vibrations_report(
    workdir: str | os.PathLike,
    results: Sequence[ReportedVibrations],
    *,
    title: str,
    info: Mapping[str, Mapping[str, Any]],
    files: Sequence[str] = (),
) -> Path:
    """Write `report.html` and `metrics.json` to `workdir`, each atomically.

    Args:
      workdir: Folder of the report.
      results: Vibrations of the molecules.
      title: Headline of the page.
      info: Sections of names and values.
      files: Names of further files in the workdir, to list on the page.

    Returns:
      Path of `report.html`.
    """
    done = [r for r in results if not r.reason]
    content = {
        "molecules": len(results),
        "without_result": len(results) - len(done),
        "with_imaginary_modes": sum(r.num_imaginary > 0 for r in done),
        "outside_domain": sum(bool(r.outside) for r in done),
    }
    body = [*_table(done), *_spectra(done), *_failures(results)]
    return write_summary(workdir, title, content, body, info, files)


def _table(done: Sequence[ReportedVibrations]) -> Iterator[str]:
    """Yield the table of thermochemistry."""
    yield page.heading("Thermochemistry")
    rows = [
        (
            r.name,
            len(r.frequencies),
            r.num_imaginary,
            min(r.frequencies, default=math.nan),
            f"{r.thermochemistry['zero_point_energy']:.4f}",
            f"{r.thermochemistry['free_energy'] - r.energy:.4f}",
            f"{1000 * r.thermochemistry['entropy']:.4f}",
            r.thermochemistry["symmetry_number"],
            page.mark("outside") if r.outside else "inside",
        )
        for r in done[:_MAX_ROWS]
    ]
    yield page.table(
        (
            "molecule",
            "modes",
            "imaginary",
            "lowest (1/cm)",
            "zero-point energy (eV)",
            "free energy above the minimum (eV)",
            "entropy (meV/K)",
            "symmetry number",
            "domain",
        ),
        rows,
    )
    yield page.paragraph(
        "Imaginary modes, with negative frequencies, contribute to no quantity: such a structure is "
        'not a minimum. Domain: "inside" also if the domain of the force field is unknown.'
    )


def _spectra(done: Sequence[ReportedVibrations]) -> Iterator[str]:
    shown = [r for r in done if len(r.frequencies)][:_MAX_SPECTRA]
    if shown:
        yield page.heading("Spectrum")
        yield page.figure(
            spectrum_figure(shown),
            "Density of the vibrations: each mode is a Lorentzian line, without intensities.",
            wide=True,
        )


def spectrum_figure(results: Sequence[ReportedVibrations]) -> Figure:
    """Draw the modes of each molecule as lines with a common width."""
    fig, ax = figures.figure("Spectrum", size=(9.2, 3.6))
    highest = max(max(r.frequencies) for r in results)
    grid = np.linspace(0, max(1.1 * highest, 100.0), 2000)
    for offset, r in enumerate(results):
        real = np.array([frequency for frequency in r.frequencies if frequency > 0])
        lines = 1 / (1 + ((grid[:, None] - real) / (_WIDTH / 2)) ** 2)
        density = lines.sum(1) / max(lines.sum(1).max(initial=0.0), 1e-12)
        ax.plot(grid, density + 1.1 * offset, linewidth=1.2, label=figures.escape_label(r.name, 24))
    ax.set(xlabel="wave number (1/cm)", ylabel="density (arbitrary)", xlim=(0, grid[-1]))
    ax.set_ylim(0, 1.1 * len(results) + 0.35 * max(len(results), 2))  # with space for the legend
    ax.set_yticks([])
    figures.add_legend(ax)
    return fig


def _failures(results: Sequence[ReportedVibrations]) -> Iterator[str]:
    failed = [r for r in results if r.reason]
    if failed:
        yield page.heading("Molecules without a result")
        yield page.table(("molecule", "reason"), [(r.name, r.reason) for r in failed[:_MAX_ROWS]])
