"""Space groups that a relaxation keeps, as ase.constraints.FixSymmetry does.

The minimizer moves atoms and cell along symmetrized forces and a symmetrized stress, the averages over
all operations. These are determined once: a deformation that keeps the space group commutes with its
rotations, so the Cartesian rotations do not change.
"""

from __future__ import annotations

import importlib.util

import numpy as np
from ase import Atoms
from ase.constraints import FixSymmetry

from mlip_jax.simulation.relaxation.state import Symmetry, empty_symmetry

# _TOLERANCE: largest deviation of a rotation from an orthogonal matrix, of the projection of the
# stress from commuting, and of the sum of the rotations about a site without forces from zero.
_TOLERANCE = 1e-4
_NO_SPGLIB = "keeping the space group requires spglib: pip install spglib, or mlip-flax[crystals]"


def is_kept(atoms: Atoms) -> bool:
    """Return whether the structure has the constraint FixSymmetry."""
    return any(isinstance(c, FixSymmetry) for c in atoms.constraints)


def check_symprec(symprec: float | None) -> None:
    """Raise ValueError if a tolerance (Å) is invalid, or spglib is not installed; None is valid."""
    if symprec is None:
        return
    if not (np.isfinite(symprec) and symprec > 0):
        raise ValueError(f"symprec must be positive (Å), received {symprec}")
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


def operations(atoms: Atoms) -> Symmetry:
    """Return the operations of the constraint FixSymmetry of a structure, as NumPy arrays.

    The average over all operations is the one over pure translations, followed by that over one
    operation for each rotation.
    """
    constraint, n = _constraint(atoms), len(atoms)
    turns = np.asarray(constraint.rotations).reshape(-1, 9)
    images = np.asarray(constraint.symm_map, np.int32)
    _, first = np.unique(turns, axis=0, return_index=True)
    rotations = _cartesian(np.asarray(constraint.rotations)[first], atoms.cell.complete().array)
    symmetry = empty_symmetry((), n, float)
    symmetry.rotations[: len(first)] = rotations / len(first)
    for k, image in enumerate(images[first]):
        symmetry.sources[k, image] = np.arange(n)
    pure = (turns == np.eye(3, dtype=int).ravel()).all(axis=1)
    symmetry.translated[:] = images[pure].min(axis=0)
    symmetry.stress[:] = sum(np.kron(r.T, r.T) for r in rotations) / len(first)
    return symmetry


def _constraint(atoms: Atoms) -> FixSymmetry:
    """Return the only constraint FixSymmetry of a structure."""
    (constraint,) = (c for c in atoms.constraints if isinstance(c, FixSymmetry))
    return constraint


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
    images = np.asarray(constraints[0].symm_map)
    if _moves_fixed_atoms(rotations, images, mobile):
        return "FixAtoms must fix all or none of the atoms that FixSymmetry makes equivalent"
    if mask is not None and not _commute(operations(atoms).stress, mask.ravel()):
        return (
            "mask must treat components of the strain equally if FixSymmetry makes them equivalent"
        )
    return ""


def _moves_fixed_atoms(rotations, images, mobile) -> bool:
    """Return whether symmetrized forces on mobile atoms depend on forces on fixed ones.

    They do if mobile and fixed atoms are equivalent and their sites allow forces.
    """
    first = images.min(axis=0)  # of equivalent atoms, (n,)
    mixed = np.flatnonzero(mobile != mobile[first])
    sites = np.einsum("ra,rxy->axy", (images[:, mixed] == mixed).astype(float), rotations)
    return bool((np.abs(sites) > _TOLERANCE).any())


def _commute(projection, kept) -> bool:
    """Return whether a projection commutes with the selection of components."""
    return np.abs(projection * (kept[:, None] - kept.astype(float)[None])).max() < _TOLERANCE
