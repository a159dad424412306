"""Report of a search for minima: `report.html`, a self-contained page, and `metrics.json`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from matplotlib.figure import Figure

from mlip_jax.reports import figures, sections
from mlip_jax.reports import html_page as page
from mlip_jax.reports.molecules import Picture, molecule_figure
from mlip_jax.simulation.relaxation.minima import MinimaResult
from mlip_jax.structure import electronic_value
from mlip_jax.workdir import write_text

_KCAL = units.mol / units.kcal  # kcal/mol per eV
_MOST_ROWS, _MOST_LEVELS, _MOST_PICTURES, _MOST_ATOMS = 60, 12, 5, 120


@dataclasses.dataclass(frozen=True)
class ReportedMinimum:
    """Minimum of a molecule.

    Attributes:
      energy: Energy in eV.
      positions: Positions in Å, (n, 3).
      round: Round of the search that found the minimum first.
      times: Number of times that the minimum was found.
    """

    energy: float
    positions: Any
    round: int
    times: int

    def to_atoms(self, molecule: MoleculeMinima) -> Atoms:
        """Return the minimum as ASE `Atoms` with its energy as a single-point result."""
        atoms = Atoms(
            molecule.numbers,
            self.positions,
            cell=molecule.cell,
            pbc=molecule.cell is not None,
            info={"charge": molecule.charge} if molecule.charge else {},
        )
        atoms.calc = SinglePointCalculator(atoms, energy=self.energy)
        return atoms


@dataclasses.dataclass(frozen=True)
class MoleculeMinima:
    """Molecule with its minima in the order of energy, or the reason why there are none.

    Attributes:
      number: Index of the molecule in its file.
      name: Name of the molecule.
      failure: Reason why the molecule was not searched, or "".
      numbers: Atomic numbers, (n,).
      charge: Total charge in e.
      cell: Cell vectors in Å, (3, 3), None if not periodic.
      minima: Minima, the lowest first.
      relaxed: Number of geometries relaxed per round.
      new: Number of minima found first per round.
      left_out: Number of relaxed geometries that are not minima of the molecule, by reason.
    """

    number: int
    name: str
    failure: str = ""
    numbers: Sequence[int] = ()
    charge: float = 0.0
    cell: Any = None
    minima: Sequence[ReportedMinimum] = ()
    relaxed: Sequence[int] = ()
    new: Sequence[int] = ()
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, number: int, name: str, failure: str, found: MinimaResult | None) -> MoleculeMinima:
        """Create an instance from the result of a search, which is None after a failure."""
        if found is None or not found.minima:
            left_out = {} if found is None else dict(found.left_out)
            return cls(number, name, failure, left_out=left_out)
        first = found.minima[0].atoms
        return cls(
            number,
            name,
            failure,
            first.numbers.tolist(),
            electronic_value(first, "charge"),
            first.cell.array.tolist() if first.pbc.any() else None,
            [
                ReportedMinimum(m.energy, m.atoms.positions.tolist(), m.round, m.times)
                for m in found.minima
            ],
            found.relaxed,
            found.new,
            dict(found.left_out),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MoleculeMinima:
        """Create an instance from the result of `to_json`."""
        return cls(**{**values, "minima": [ReportedMinimum(**m) for m in values["minima"]]})


@dataclasses.dataclass(frozen=True)
class ReferenceMinimum:
    """Energies of the reference method for a minimum of the force field.

    Attributes:
      molecule: Molecule of the minimum.
      rank: Index of the minimum in the order of the force field's energies.
      energy: Energy at the minimum of the force field in eV, NaN if the method failed.
      relaxed: Energy after relaxation with the reference method in eV, NaN if it failed or did not
        converge.
    """

    molecule: MoleculeMinima
    rank: int
    energy: float
    relaxed: float


def metrics(
    molecules: Sequence[MoleculeMinima], judgements: Sequence[ReferenceMinimum]
) -> dict[str, Any]:
    """Return the content of `metrics.json`; None for unknown values.

    Energies are in kcal/mol, the usual unit for conformers.
    """
    found = [m for m in molecules if m.minima]
    by_molecule = {number: _compare(own) for number, own in _grouped(judgements).items()}
    compared = [c for c in by_molecule.values() if c is not None]
    return {
        "molecules": len(molecules),
        "without_minima": len(molecules) - len(found),
        "minima": sum(len(m.minima) for m in found),
        "relaxed": sum(sum(m.relaxed) for m in found),
        "lowest_found_later": sum(m.minima[0].round > 0 for m in found),
        "judged": None
        if not compared
        else {
            "molecules": len(compared),
            **{
                name: float(np.mean([c[name] for c in compared]))
                for name in (
                    "relative_mae_kcal_mol",
                    "lowest_above_best_kcal_mol",
                    "lowest_is_best",
                )
            },
            "rank_correlation": _mean([c["rank_correlation"] for c in compared]),
        },
        "by_molecule": [
            {
                "molecule": m.number,
                "name": m.name,
                "failure": m.failure,
                "minima": len(m.minima),
                "new": list(m.new),
                "relaxed": list(m.relaxed),
                "left_out": dict(m.left_out),
                "judged": by_molecule.get(m.number),
            }
            for m in molecules
        ],
    }


def _grouped(judgements: Sequence[ReferenceMinimum]) -> dict[int, list[ReferenceMinimum]]:
    """Group reference minima by the index of their molecule."""
    groups: dict[int, list[ReferenceMinimum]] = {}
    for judgement in judgements:
        groups.setdefault(judgement.molecule.number, []).append(judgement)
    return groups


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _compare(judgements: Sequence[ReferenceMinimum]) -> dict[str, Any] | None:
    """Compare the minima of one molecule with the reference method.

    Compute the errors of relative energies, and the energy of the force field's lowest minimum,
    once relaxed with the reference method, above the lowest energy found this way. Return None if
    fewer than two minima have reference energies, or if the lowest minimum has none.
    """
    known = [j for j in judgements if math.isfinite(j.energy) and math.isfinite(j.relaxed)]
    if len(known) < 2 or known[0].rank:
        return None
    own = _KCAL * np.array([j.molecule.minima[j.rank].energy for j in known])
    there, relaxed = (
        _KCAL * np.array([getattr(j, name) for j in known]) for name in ("energy", "relaxed")
    )
    errors = (own - own.mean()) - (there - there.mean())  # (k,) for k minima
    above = float(relaxed[0] - relaxed.min())
    ranks = [np.argsort(np.argsort(x)) for x in (own, there)]
    return {
        "minima": len(known),
        "relative_mae_kcal_mol": float(np.abs(errors).mean()),
        "lowest_above_best_kcal_mol": above,
        "lowest_is_best": above < 0.1,
        "rank_correlation": float(np.corrcoef(*ranks)[0, 1]) if len(known) > 2 else None,
    }


def write_minima_report(
    workdir: str | os.PathLike,
    molecules: Sequence[MoleculeMinima],
    judgements: Sequence[ReferenceMinimum],
    *,
    title: str,
    info: Mapping[str, Mapping[str, Any]],
    files: Sequence[str] = (),
) -> Path:
    """Write `report.html` and `metrics.json` to `workdir`, each atomically.

    Args:
      workdir: Folder of the report.
      molecules: Molecules with their minima.
      judgements: Reference energies of the lowest minima; may be empty.
      title: Headline of the page.
      info: Sections of names and values.
      files: Names of further files in the workdir, to list on the page.

    Returns:
      Path of `report.html`.
    """
    workdir, content = Path(workdir), metrics(molecules, judgements)
    write_text(
        workdir / "metrics.json",
        json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n",
    )
    body = [
        page.heading(title, 1),
        *_headline(content),
        *_levels(molecules),
        *_reference(judgements, content),
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
                "lowest found by dynamics",
                page.number(content["lowest_found_later"]),
                "",
                "molecules of which no starting geometry led to the lowest minimum",
            ),
            *(
                []
                if judged is None
                else [
                    (
                        "energies between minima",
                        page.number(judged["relative_mae_kcal_mol"]),
                        "kcal/mol",
                        "mean error against the reference method",
                    ),
                    (
                        "the lowest one",
                        page.number(judged["lowest_above_best_kcal_mol"]),
                        "kcal/mol",
                        "above the best of those judged, once the reference method has relaxed them",
                    ),
                ]
            ),
        ]
    )


def _levels(molecules: Sequence[MoleculeMinima]) -> Iterator[str]:
    shown = [m for m in molecules if m.minima][:_MOST_LEVELS]
    yield page.heading("Energies of the minima")
    yield page.figure(
        levels_figure(shown),
        (
            "A line for each minimum, above the lowest one of its molecule. Blue: found from the starting geometries; "
            "vermillion: found first by dynamics."
        ),
        wide=True,
    )


def levels_figure(molecules: Sequence[MoleculeMinima]) -> Figure:
    """Draw the energies of the minima as lines, one column per molecule."""
    fig, ax = figures.figure("Minima", size=(9.2, 3.8))
    for column, m in enumerate(molecules):
        for minimum in m.minima:
            ax.hlines(
                _KCAL * (minimum.energy - m.minima[0].energy),
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
    ax.set(ylabel="kcal/mol", ylim=(-0.3, None))
    ax.grid(visible=False, axis="x")
    return fig


def _reference(judgements: Sequence[ReferenceMinimum], content: Mapping[str, Any]) -> Iterator[str]:
    if not judgements:
        return
    yield page.heading("Beside the reference method")
    yield page.figure(
        reference_figure(judgements),
        (
            "Energies of the lowest minima above their mean for each molecule, by the force field and by the reference "
            "method at the same geometries."
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
            "lowest above the best (kcal/mol)",
        ),
        rows[:_MOST_ROWS],
    )


def reference_figure(judgements: Sequence[ReferenceMinimum]) -> Figure:
    """Draw energies of minima by the force field against energies by the reference method."""
    fig, ax = figures.figure("Energies of minima")
    points: list[np.ndarray] = []
    for group in _grouped(judgements).values():
        own = np.array(
            [[j.molecule.minima[j.rank].energy, j.energy] for j in group if math.isfinite(j.energy)]
        ).reshape(-1, 2)
        if len(own):
            points.append(_KCAL * (own - own.mean(0)))
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
        ("molecule", "minima", "new in each round", "relaxed in each round", "left out"),
        rows[:_MOST_ROWS],
    )
    if len(rows) > _MOST_ROWS:
        yield page.paragraph(f"{len(rows) - _MOST_ROWS} more are in metrics.json.")


def _pictures(molecules: Sequence[MoleculeMinima]) -> Iterator[str]:
    """Yield a figure with the lowest and the second lowest minimum of some molecules."""
    pictures = []
    for m in molecules:
        if len(m.minima) > 1 and len(m.numbers) <= _MOST_ATOMS and len(pictures) < _MOST_PICTURES:
            second, first = (m.minima[k].to_atoms(m) for k in (1, 0))
            pictures.append(
                Picture(
                    figures.escape_label(m.name, 18),
                    second,
                    first,
                    f"+{_KCAL * (m.minima[1].energy - m.minima[0].energy):.2f} kcal/mol above",
                )
            )
    if pictures:
        yield page.heading("The lowest minima")
        yield page.figure(
            molecule_figure(pictures, ("second lowest", "lowest")),
            ("The second lowest minimum and the lowest, turned onto each other."),
            wide=True,
        )
