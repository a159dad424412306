"""Checks of the molecules that are to be relaxed, and their entries in the queue."""

from __future__ import annotations

import time
from collections.abc import Generator

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixSymmetry

from mlip_jax.datasets.smiles.embedding import MoleculeRecord
from mlip_jax.potential import Potential
from mlip_jax.simulation.relaxation.cells.filters import CellFilter
from mlip_jax.simulation.relaxation.cells.inputs import (
    cell_fields,
    find_cell_obstacle,
    overlap_in_cell,
    strain_mask,
)
from mlip_jax.simulation.relaxation.cells.symmetry import find_symmetry_obstacle, is_kept
from mlip_jax.simulation.relaxation.loop import SHORTEST
from mlip_jax.simulation.relaxation.pool import QueuedMolecule
from mlip_jax.structure import STATES, electronic_value


def find_obstacle(
    atoms: Atoms,
    potential: Potential,
    cell_filter: CellFilter | None = None,
    molecules_only: bool = False,
    constraints: tuple[type, ...] = (FixAtoms, FixSymmetry),
) -> str:
    """Return the reason why a molecule or a periodic structure cannot be relaxed, or "".

    Args:
      atoms: The structure.
      potential: The force field.
      cell_filter: Filter that relaxes the cell, or None.
      molecules_only: Whether periodic structures cannot be relaxed.
      constraints: Supported constraints.
    """
    if not isinstance(atoms, Atoms):
        return f"expected ASE's Atoms, received {atoms!r}"
    if len(atoms) == 0:
        return "the molecule has no atoms"
    if not np.isfinite(atoms.positions).all():
        bad = int(np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))[0])
        return f"positions are not finite: atom {bad} is at {atoms.positions[bad].tolist()}"
    if atoms.pbc.any() and molecules_only:
        return "the structure is periodic; only molecules are supported here"
    if atoms.pbc.any():
        reason = find_cell_obstacle(atoms, potential, cell_filter)
        if reason:
            return reason
    unsupported = [type(c).__name__ for c in atoms.constraints if not isinstance(c, constraints)]
    if unsupported:
        supported = " and ".join(c.__name__ for c in constraints)
        return f"the supported constraints are {supported}, received {', '.join(unsupported)}"
    if is_kept(atoms):
        mask = None if cell_filter is None else strain_mask(atoms, cell_filter)
        if reason := find_symmetry_obstacle(atoms, mobile_atoms(atoms), mask):
            return reason
    try:
        for name in STATES:
            electronic_value(atoms, name)
        potential.check_elements(atoms.numbers)
    except ValueError as error:
        return str(error)
    return overlap_in_cell(atoms, SHORTEST) if atoms.pbc.any() else _overlap(atoms.positions)


def _overlap(positions: np.ndarray) -> str:
    """Return a message about the closest two atoms if they overlap, or ""."""
    if len(positions) < 2:
        return ""
    from scipy.spatial import cKDTree

    distances, nearest = cKDTree(positions).query(positions, k=2)
    first = int(np.argmin(distances[:, 1]))
    if distances[first, 1] >= SHORTEST:
        return ""
    i, j = sorted((first, int(nearest[first][nearest[first] != first][0])))
    return f"atoms {i} and {j} overlap: their distance is {distances[first, 1]:.3g} Å"


def fixed_atoms(atoms: Atoms) -> np.ndarray:
    """Return the sorted indices of the fixed atoms."""
    indices = [c.get_indices() for c in atoms.constraints if isinstance(c, FixAtoms)]
    return np.unique(np.concatenate(indices)).astype(int) if indices else np.zeros(0, int)


def mobile_atoms(atoms: Atoms) -> np.ndarray:
    """Return whether each atom may move, (n,) bool."""
    mobile = np.ones(len(atoms), bool)
    mobile[fixed_atoms(atoms)] = False
    return mobile


def queued_molecule(
    number: int, atoms: Atoms, dtype, cell_filter: CellFilter | None = None
) -> QueuedMolecule:
    """Convert a molecule to an entry of the queue."""
    # centered at the origin: float32 has fewer digits far from it
    return QueuedMolecule(
        number,
        atoms.numbers,
        (atoms.positions - atoms.positions.mean(0)).astype(dtype),
        mobile_atoms(atoms),
        *(electronic_value(atoms, name) for name in STATES),
        *(cell_fields(atoms, cell_filter) if atoms.pbc.any() else ()),
    )


def close_records(records: Generator[MoleculeRecord]) -> None:
    """Close a generator of molecules that threads of a `Relaxer` read, such as embedded ones.

    A thread that serves a device may be waiting for a molecule, so retry for 10 s.
    """
    for _ in range(100):
        try:
            return records.close()
        except ValueError:  # the generator is running in that thread
            time.sleep(0.1)
