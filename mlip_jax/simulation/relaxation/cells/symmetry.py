"""Space groups that a relaxation keeps, as ase.constraints.FixSymmetry does.

The minimizer moves atoms and cell along symmetrized forces and a symmetrized stress. Both are
projections, P f and S s. They are computed once: a deformation that keeps the space group commutes
with its rotations, so the Cartesian rotations R do not change.
"""

from __future__ import annotations

import importlib.util

import numpy as np
from ase import Atoms
from ase.constraints import FixSymmetry

from mlip_jax.simulation.relaxation.state import Symmetry

# _TOLERANCE: largest deviation of a rotation from an orthogonal matrix, and of projections from
# commuting.
_TOLERANCE = 1e-4
_NO_SPGLIB = "keeping the space group requires spglib: pip install spglib, or mlip-flax[crystals]"


def is_kept(atoms: Atoms) -> bool:
    """Return whether the structure has the constraint FixSymmetry."""
    return any(isinstance(c, FixSymmetry) for c in atoms.constraints)


def check_spglib() -> None:
    """Raise ValueError if spglib is not installed."""
    if importlib.util.find_spec("spglib") is None:
        raise ValueError(_NO_SPGLIB)


def keep_symmetry(atoms: Atoms, symprec: float) -> Atoms:
    """Return a periodic structure with refined symmetry and the constraint FixSymmetry.

    Structures that have the constraint, and those that are not periodic, are returned unchanged.

    Args:
      atoms: The structure.
      symprec: Tolerance of the space group (Å).
    """
    if is_kept(atoms) or not atoms.pbc.any():
        return atoms
    kept = atoms.copy()
    others = list(kept.constraints)
    kept.set_constraint()
    kept.set_constraint([FixSymmetry(kept, symprec=symprec), *others])
    return kept


def projections(atoms: Atoms) -> Symmetry:
    """Return the projections of the constraint FixSymmetry of a structure, as NumPy arrays."""
    (constraint,) = (c for c in atoms.constraints if isinstance(c, FixSymmetry))
    n, cell = len(atoms), atoms.cell.complete().array
    rotations = _cartesian(constraint.rotations, cell)
    forces, stress = np.zeros((n, 3, n, 3)), np.zeros((9, 9))
    for rotation, image in zip(rotations, constraint.symm_map):
        forces[image, :, np.arange(n)] += rotation / len(rotations)
        stress += np.kron(rotation.T, rotation.T) / len(rotations)
    return Symmetry(forces.reshape(3 * n, 3 * n), stress)


def _cartesian(rotations, cell):
    """Return the rotations of fractional coordinates as Cartesian matrices, (R, 3, 3)."""
    return np.einsum("cx,rcd,yd->rxy", cell, np.asarray(rotations, float), np.linalg.inv(cell))


def find_symmetry_obstacle(atoms: Atoms, mobile: np.ndarray, mask: np.ndarray | None) -> str:
    """Return the reason why the symmetry of a structure cannot be kept, or "".

    Args:
      atoms: Structure with the constraint FixSymmetry.
      mobile: Whether each atom may move, (n,).
      mask: Components of the strain that relax, (3, 3); None for a fixed cell.
    """
    constraints = [c for c in atoms.constraints if isinstance(c, FixSymmetry)]
    if not atoms.pbc.any():
        return "FixSymmetry requires a periodic structure"
    if len(constraints) > 1:
        return "there are several constraints FixSymmetry"
    if np.shape(constraints[0].symm_map)[1:] != (len(atoms),):
        return "FixSymmetry is that of a structure with another number of atoms"
    rotations = _cartesian(constraints[0].rotations, atoms.cell.complete().array)
    if np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max() > _TOLERANCE:
        return "the cell does not have the symmetry of FixSymmetry. Create the constraint again."
    projection = projections(atoms)
    if not _commute(projection.forces, np.repeat(mobile, 3)):
        return "FixAtoms must fix all or none of the atoms that FixSymmetry makes equivalent"
    if mask is not None and not _commute(projection.stress, mask.ravel()):
        return (
            "mask must treat components of the strain equally if FixSymmetry makes them equivalent"
        )
    return ""


def _commute(projection, kept) -> bool:
    """Return whether a projection commutes with the selection of components."""
    return np.abs(projection * (kept[:, None] - kept.astype(float)[None])).max() < _TOLERANCE
