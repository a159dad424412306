"""Results of a search for minima, and their comparison with the reference method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator

from mlip_jax.simulation.relaxation.minima_result import MinimaResult, boltzmann_populations
from mlip_jax.structure import electronic_state, electronic_value

KCAL_PER_EV = units.mol / units.kcal  # kcal/mol per eV


@dataclasses.dataclass(frozen=True)
class ReportedMinimum:
    """Minimum of a molecule.

    Attributes:
      energy: Energy in eV.
      positions: Positions in Å, (n, 3).
      round: Round of the search that found the minimum first.
      times: Number of times that the minimum was found.
      mirror_images: 2 if the minimum stands for itself and its mirror image, otherwise 1.
    """

    energy: float
    positions: Any
    round: int
    times: int
    mirror_images: int = 1

    def to_atoms(self, molecule: MoleculeMinima) -> Atoms:
        """Return the minimum as ASE `Atoms` with its energy as a single-point result."""
        atoms = Atoms(
            molecule.numbers,
            self.positions,
            cell=molecule.cell,
            pbc=molecule.cell is not None,
            info={"charge": molecule.charge} if molecule.charge else {},
        )
        if molecule.masses is not None:
            atoms.set_masses(molecule.masses)
        if molecule.unpaired is not None:
            atoms.info["num_unpaired_electrons"] = molecule.unpaired
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
      unpaired: Number of unpaired electrons, None if it is not stated.
      masses: Masses (amu), (n,), None for the natural masses of the elements.
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
    unpaired: int | None = None
    masses: Sequence[float] | None = None

    @classmethod
    def from_result(
        cls, number: int, name: str, failure: str, result: MinimaResult | None
    ) -> MoleculeMinima:
        """Create an instance from the result of a search, which is None after a failure."""
        if result is None or not result.minima:
            left_out = {} if result is None else dict(result.left_out)
            return cls(number, name, failure, left_out=left_out)
        first = result.minima[0].atoms
        unpaired = electronic_state(first).get("num_unpaired_electrons")
        return cls(
            number,
            name,
            failure,
            first.numbers.tolist(),
            electronic_value(first, "charge"),
            first.cell.array.tolist() if first.pbc.any() else None,
            [
                ReportedMinimum(
                    m.energy, m.atoms.positions.tolist(), m.round, m.times, m.mirror_images
                )
                for m in result.minima
            ],
            result.relaxed,
            result.new,
            dict(result.left_out),
            None if unpaired is None else int(unpaired),
            first.get_masses().tolist() if first.has("masses") else None,
        )

    def relative_energies(self) -> np.ndarray:
        """Return the energies of the minima above the lowest one (kcal/mol), (K,)."""
        energies = np.array([m.energy for m in self.minima])
        return KCAL_PER_EV * (energies - energies.min(initial=np.inf))

    def populations(self, temperature: float) -> np.ndarray:
        """Return the Boltzmann populations of the minima at a temperature (K), (K,)."""
        return boltzmann_populations(
            [m.energy for m in self.minima], [m.mirror_images for m in self.minima], temperature
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
    molecules: Sequence[MoleculeMinima],
    references: Sequence[ReferenceMinimum],
    temperature: float = 298.15,
) -> dict[str, Any]:
    """Return the content of `metrics.json`; None for unknown values.

    Energies are in kcal/mol, the usual unit for conformers; populations are those at a temperature
    (K).
    """
    searched = [m for m in molecules if m.minima]
    by_molecule = {
        number: _compare(group) for number, group in group_by_molecule(references).items()
    }
    compared = [c for c in by_molecule.values() if c is not None]
    return {
        "molecules": len(molecules),
        "without_minima": len(molecules) - len(searched),
        "minima": sum(len(m.minima) for m in searched),
        "relaxed": sum(sum(m.relaxed) for m in searched),
        "lowest_found_later": sum(m.minima[0].round > 0 for m in searched),
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
                "relative_energies_kcal_mol": m.relative_energies().tolist(),
                "populations": m.populations(temperature).tolist(),
                "judged": by_molecule.get(m.number),
            }
            for m in molecules
        ],
    }


def group_by_molecule(references: Sequence[ReferenceMinimum]) -> dict[int, list[ReferenceMinimum]]:
    """Group reference minima by the index of their molecule."""
    groups: dict[int, list[ReferenceMinimum]] = {}
    for reference in references:
        groups.setdefault(reference.molecule.number, []).append(reference)
    return groups


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _compare(references: Sequence[ReferenceMinimum]) -> dict[str, Any] | None:
    """Compare the minima of one molecule with the reference method.

    Compute the errors of relative energies, and the energy of the force field's lowest minimum,
    once relaxed with the reference method, above the lowest energy found this way. Return None if
    fewer than two minima have reference energies, or if the lowest minimum has none.
    """
    known = [j for j in references if math.isfinite(j.energy) and math.isfinite(j.relaxed)]
    if len(known) < 2 or known[0].rank:
        return None
    predicted = KCAL_PER_EV * np.array([r.molecule.minima[r.rank].energy for r in known])
    reference, relaxed = (
        KCAL_PER_EV * np.array([getattr(r, name) for r in known]) for name in ("energy", "relaxed")
    )
    errors = (predicted - predicted.mean()) - (reference - reference.mean())  # (k,) for k minima
    above = float(relaxed[0] - relaxed.min())
    ranks = [np.argsort(np.argsort(x)) for x in (predicted, reference)]
    return {
        "minima": len(known),
        "relative_mae_kcal_mol": float(np.abs(errors).mean()),
        "lowest_above_best_kcal_mol": above,
        "lowest_is_best": above < 0.1,
        "rank_correlation": float(np.corrcoef(*ranks)[0, 1]) if len(known) > 2 else None,
    }
