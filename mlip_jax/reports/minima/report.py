"""Report of a search for minima: `report.html`, a self-contained page, and `metrics.json`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mlip_jax.reports import figures, sections
from mlip_jax.reports import html_page as page
from mlip_jax.reports.minima.results import (
    KCAL_PER_EV,
    MoleculeMinima,
    ReferenceMinimum,
    group_by_molecule,
    metrics,
)
from mlip_jax.reports.molecules import Picture, molecule_figure
from mlip_jax.workdir import write_text

_MAX_RANKS = 5  # minima of a molecule in the table
_MAX_ROWS, _MAX_LEVELS, _MAX_PICTURES, _MAX_ATOMS = 60, 12, 5, 120


def write_minima_report(
    workdir: str | os.PathLike,
    molecules: Sequence[MoleculeMinima],
    references: Sequence[ReferenceMinimum],
    *,
    title: str,
    info: Mapping[str, Mapping[str, Any]],
    files: Sequence[str] = (),
    temperature: float = 298.15,
) -> Path:
    """Write `report.html` and `metrics.json` to `workdir`, each atomically.

    Args:
      workdir: Folder of the report.
      molecules: Molecules with their minima.
      references: Reference energies of the lowest minima; may be empty.
      title: Headline of the page.
      info: Sections of names and values.
      files: Names of further files in the workdir, to list on the page.
      temperature: Temperature of the populations (K).

    Returns:
      Path of `report.html`.
    """
    workdir, content = Path(workdir), metrics(molecules, references, temperature)
    write_text(
        workdir / "metrics.json",
        json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n",
    )
    body = [
        page.heading(title, 1),
        *_headline(content),
        *_levels(molecules),
        *_populations(content, temperature),
        *_reference(references, content),
        *_molecules(content),
        *_pictures(molecules),
        *sections.provenance(info, files),
    ]
    write_text(workdir / "report.html", page.render(title, body))
    return workdir / "report.html"


def _headline(content: Mapping[str, Any]) -> Iterator[str]:
    judged = content["judged"]
    yield page.cards(
        [
            (
                "minima",
                page.number(content["minima"]),
                "",
                f"of {page.number(content['molecules'])} molecules, from "
                f"{page.number(content['relaxed'])} relaxations",
            ),
            (
                "lowest minimum from dynamics",
                page.number(content["lowest_found_later"]),
                "",
                "molecules whose lowest minimum was not reached from any initial geometry",
            ),
            *(
                []
                if judged is None
                else [
                    (
                        "relative energies",
                        page.number(judged["relative_mae_kcal_mol"]),
                        "kcal/mol",
                        "mean error against the reference method",
                    ),
                    (
                        "lowest minimum",
                        page.number(judged["lowest_above_best_kcal_mol"]),
                        "kcal/mol",
                        "above the best reference minimum, after relaxation with the reference "
                        "method",
                    ),
                ]
            ),
        ]
    )


def _levels(molecules: Sequence[MoleculeMinima]) -> Iterator[str]:
    shown = [m for m in molecules if m.minima][:_MAX_LEVELS]
    yield page.heading("Energies of the minima")
    yield page.figure(
        levels_figure(shown),
        (
            "Energy of each minimum above the lowest one of its molecule. Blue: reached from the "
            "initial geometries; vermillion: reached first from dynamics."
        ),
        wide=True,
    )


def _populations(content: Mapping[str, Any], temperature: float) -> Iterator[str]:
    """Yield a table of the lowest minima with energies and populations."""
    rows = [
        (m["name"], rank, f"{energy:.2f}", f"{100 * population:.1f}")
        for m in content["by_molecule"]
        for rank, (energy, population) in enumerate(
            zip(m["relative_energies_kcal_mol"], m["populations"])
        )
        if rank < _MAX_RANKS
    ]
    yield page.table(
        ("molecule", "minimum", "energy (kcal/mol)", f"population at {temperature:g} K (%)"),
        rows[:_MAX_ROWS],
    )
    yield page.paragraph(
        "Populations are Boltzmann weights of the energies alone, without vibrations. All minima "
        "are in minima.csv and metrics.json."
    )


def levels_figure(molecules: Sequence[MoleculeMinima]) -> Figure:
    """Draw the energies of the minima as lines, one column per molecule."""
    fig, ax = figures.figure("Minima", size=(9.2, 3.8))
    for column, m in enumerate(molecules):
        for minimum in m.minima:
            ax.hlines(
                KCAL_PER_EV * (minimum.energy - m.minima[0].energy),
                column - 0.38,
                column + 0.38,
                linewidth=1.4,
                color=figures.VERMILLION if minimum.round else figures.BLUE,
            )
    names = [figures.escape_label(m.name, 16) for m in molecules]
    ax.set_xticks(
        range(len(names)),
        names,
        rotation=30 if len(names) > 4 else 0,
        ha="right" if len(names) > 4 else "center",
        fontsize=8,
    )
    highest = max(KCAL_PER_EV * (m.minima[-1].energy - m.minima[0].energy) for m in molecules)
    ax.set(ylabel="kcal/mol", ylim=(-0.3, max(1.05 * highest, 1.0)))
    ax.grid(visible=False, axis="x")
    return fig


def _reference(references: Sequence[ReferenceMinimum], content: Mapping[str, Any]) -> Iterator[str]:
    if not references:
        return
    yield page.heading("Comparison with the reference method")
    yield page.figure(
        reference_figure(references),
        (
            "Energies of the lowest minima minus their mean per molecule, from the force field and "
            "from the reference method at the same geometries."
        ),
    )
    rows = [
        (
            m["name"],
            m["judged"]["minima"],
            m["judged"]["relative_mae_kcal_mol"],
            m["judged"]["rank_correlation"],
            m["judged"]["lowest_above_best_kcal_mol"],
        )
        for m in content["by_molecule"]
        if m["judged"]
    ]
    yield page.table(
        (
            "molecule",
            "minima",
            "error (kcal/mol)",
            "rank correlation",
            "lowest above best (kcal/mol)",
        ),
        rows[:_MAX_ROWS],
    )


def reference_figure(references: Sequence[ReferenceMinimum]) -> Figure:
    """Draw energies of minima by the force field against energies by the reference method."""
    fig, ax = figures.figure("Energies of minima")
    points: list[np.ndarray] = []
    for group in group_by_molecule(references).values():
        energies = np.array(
            [[j.molecule.minima[j.rank].energy, j.energy] for j in group if math.isfinite(j.energy)]
        ).reshape(-1, 2)
        if len(energies):
            points.append(KCAL_PER_EV * (energies - energies.mean(0)))
    x = np.concatenate(points) if points else np.zeros((0, 2))
    reach = 1.1 * max(np.abs(x).max(initial=0.0), 0.1)
    ax.plot([-reach, reach], [-reach, reach], color=figures.GREY, linewidth=0.8)
    ax.plot(x[:, 1], x[:, 0], ".", color=figures.BLUE, markersize=5, alpha=0.7)
    ax.set(
        xlabel="reference method (kcal/mol)",
        ylabel="force field (kcal/mol)",
        xlim=(-reach, reach),
        ylim=(-reach, reach),
    )
    return fig


def _molecules(content: Mapping[str, Any]) -> Iterator[str]:
    yield page.heading("Molecules")
    rows = [
        (
            m["name"],
            m["minima"],
            " + ".join(map(str, m["new"])),
            " + ".join(map(str, m["relaxed"])),
            m["failure"]
            or ", ".join(f"{count} {reason}" for reason, count in m["left_out"].items()),
        )
        for m in content["by_molecule"]
    ]
    yield page.table(
        ("molecule", "minima", "new per round", "relaxed per round", "discarded"), rows[:_MAX_ROWS]
    )
    if len(rows) > _MAX_ROWS:
        yield page.paragraph(f"{len(rows) - _MAX_ROWS} more are in metrics.json.")


def _pictures(molecules: Sequence[MoleculeMinima]) -> Iterator[str]:
    """Yield a figure with the lowest and the second lowest minimum of some molecules."""
    pictures = []
    for m in molecules:
        if len(m.minima) > 1 and len(m.numbers) <= _MAX_ATOMS and len(pictures) < _MAX_PICTURES:
            second, first = (m.minima[k].to_atoms(m) for k in (1, 0))
            above = KCAL_PER_EV * (m.minima[1].energy - m.minima[0].energy)
            name = figures.escape_label(m.name, 18)
            pictures.append(Picture(name, second, first, f"+{above:.2f} kcal/mol above"))
    if pictures:
        yield page.heading("The lowest minima")
        yield page.figure(
            molecule_figure(pictures, ("second lowest", "lowest")),
            "The second lowest and the lowest minimum, aligned.",
            wide=True,
        )
