"""Result of relaxing one molecule or periodic structure."""

from __future__ import annotations

import dataclasses

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress
from ase.units import GPa

from mlip_jax.potential import Potential
from mlip_jax.simulation.relaxation.inputs import fixed_atoms
from mlip_jax.simulation.relaxation.state import Outcome
from mlip_jax.simulation.relaxation.status import RelaxationStatus

# _RISE: maximum rise of the energy between start and end that rounding can explain, eV.
_RISE = 1e-3


@dataclasses.dataclass(frozen=True)
class Relaxation:
    """Result of relaxing one molecule or periodic structure.

    Attributes:
      atoms: Relaxed molecule, with a calculator that holds energy and forces, and the stress if
        the cell was relaxed; the input if the status is "failed".
      status: "converged": the largest force is below fmax. "step limit": it was not after
        max_steps. "diverged": a value is not finite, atoms overlap, an atom left the others, a cell
        collapsed, or the energy rose although forces are its gradient. "failed": the relaxation
        could not be started; see `reason`.
      reason: Reason for "diverged" or "failed"; otherwise "".
      steps: Number of minimizer steps.
      energy_start: Energy of the first geometry (eV), including the reference energies; NaN if
        unknown.
      energy: Energy of the last geometry (eV), likewise.
      fmax_start: Largest norm of the force on a mobile atom in the first geometry (eV/Å). If the
        cell is relaxed, also of the forces on the cell, as in ASE's cell filters.
      fmax: The same in the last geometry (eV/Å).
      frames: With trajectory_every, every `trajectory_every`-th step and the last one, with
        energies and forces; otherwise None.
      cell_start: Lattice vectors of the first geometry (Å), (3, 3), if the structure is periodic;
        otherwise None.
    """

    atoms: Atoms
    status: str
    reason: str = ""
    steps: int = 0
    energy_start: float = np.nan
    energy: float = np.nan
    fmax_start: float = np.nan
    fmax: float = np.nan
    frames: list[Atoms] | None = None
    cell_start: np.ndarray | None = None

    @property
    def converged(self) -> bool:
        """Return whether the status is "converged"."""
        return self.status == "converged"

    @property
    def pressure(self) -> float:
        """Pressure of the last geometry (GPa); NaN if the cell was not relaxed."""
        stress = self.atoms.calc.results.get("stress") if self.atoms.calc else None
        return np.nan if stress is None else float(-np.mean(stress[:3]) / GPa)


def build_result(
    potential: Potential,
    atoms: Atoms,
    outcome: Outcome,
    frames: list[Atoms] | None,
    scalar_pressure: float = 0.0,
) -> Relaxation:
    """Build the result of one molecule from its last evaluation.

    Args:
      potential: The force field.
      atoms: The input.
      outcome: Last evaluation, without padding molecules.
      frames: Frames so far, or None.
      scalar_pressure: External pressure (eV/Å³).
    """
    code = RelaxationStatus(int(outcome.code))
    status, reason = code.label, code.message
    reference = potential.reference_energies[atoms.numbers].sum()
    start, end = (float(reference + np.float64(e)) for e in (outcome.energy_start, outcome.energy))
    last = build_frame(potential, atoms, outcome)
    rise = end - start
    if scalar_pressure and last.pbc.any():  # the enthalpy decreases instead of the energy
        rise += scalar_pressure * (last.cell.volume - atoms.cell.volume)
    # along forces that are not its gradient, the energy may rise
    if potential.conservative and status != "diverged" and rise > _RISE:
        status, reason = "diverged", f"the energy rose by {rise:.3g} eV"
    return Relaxation(
        last,
        status,
        reason.format(nearest=float(outcome.nearest)),
        int(outcome.steps),
        start,
        end,
        float(outcome.fmax_start),
        float(outcome.fmax),
        frames,
        atoms.cell.array.copy() if atoms.pbc.any() else None,
    )


def build_frame(potential: Potential, atoms: Atoms, outcome: Outcome) -> Atoms:
    """Return the atoms with positions, cell, energy, forces and stress of an evaluation.

    Momenta belong to the geometry before the relaxation and are omitted: dynamics would continue
    with them.
    """
    n = len(atoms)
    frame, fixed = atoms.copy(), fixed_atoms(atoms)
    frame.arrays.pop("momenta", None)
    origin, start = atoms.positions.mean(0), atoms.positions[fixed]
    results = {"forces": outcome.forces[:n].astype(np.float64)}
    if outcome.stress is not None:
        deformation = np.linalg.solve(atoms.cell.complete().array, outcome.cell.astype(np.float64))
        frame.set_cell(atoms.cell.array @ deformation, apply_constraint=False)
        origin, start = origin @ deformation, start @ deformation
        if atoms.pbc.all():
            results["stress"] = full_3x3_to_voigt_6_stress(outcome.stress.astype(np.float64))
    frame.set_positions(outcome.positions[:n].astype(np.float64) + origin, apply_constraint=False)
    # exactly, without the rounding to the dtype
    frame.positions[fixed] = start
    energy = potential.reference_energies[atoms.numbers].sum() + np.float64(outcome.energy)
    frame.calc = SinglePointCalculator(frame, energy=float(energy), **results)
    return frame
