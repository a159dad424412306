"""Geometries that can be labeled: finite, with the bonds of the molecule that they come from."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.data import covalent_radii

from mlip_jax.datasets.builtin.labels import is_intact
from mlip_jax.datasets.quality.geometry import bond_limit, shortest_periodic
from mlip_jax.structure import Structure

_CLOSEST = 0.6  # shortest distance in periodic structures, in sums of covalent radii of H


def is_physical(start: Atoms, positions: np.ndarray) -> bool:
    """Return whether positions are finite and no bond of the molecule broke or formed.

    Bonds are those of the starting geometry. In periodic structures, only overlapping atoms are
    unphysical.

    Args:
      start: Starting geometry.
      positions: Positions to check (Å), (n, 3).
    """
    if not np.isfinite(positions).all():
        return False
    if start.pbc.any():
        closest = shortest_periodic(positions, start.cell.array, start.pbc)
        return bool(closest > _CLOSEST * 2 * covalent_radii[1])
    return is_intact(positions, covalent_radii[start.numbers], bonded_pairs(start))


def bonded_pairs(atoms: Atoms) -> np.ndarray:
    """Return whether each pair of atoms is bonded, by the distances, (n, n) bool."""
    distances = np.linalg.norm(atoms.positions[:, None] - atoms.positions[None], axis=-1)
    numbers = atoms.numbers
    bonded = distances < bond_limit(numbers[:, None], numbers[None])
    np.fill_diagonal(bonded, False)
    return bonded


def environment(atoms: Atoms, index: int) -> str:
    """Return an atom with the elements that are bonded to it, such as "S(C, C, O, O)"."""
    symbols = atoms.get_chemical_symbols()
    neighbors = sorted(symbols[k] for k in np.flatnonzero(bonded_pairs(atoms)[index]))
    return f"{symbols[index]}({', '.join(neighbors)})"


def to_atoms(structure: Structure) -> Atoms:
    """Return a structure as ASE's Atoms with its charge and number of unpaired electrons."""
    info = {"charge": float(structure.charge)}
    info |= {"num_unpaired_electrons": int(structure.spin)} if structure.spin else {}
    return Atoms(
        structure.numbers,
        structure.positions,
        cell=structure.cell,
        pbc=False if structure.pbc is None else structure.pbc,
        info=info,
    )
