"""Checks of the molecules that are to be relaxed, and their entries in the queue."""

from __future__ import annotations

import time
from collections.abc import Generator

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms

from mlip_jax.datasets.smiles.embedding import MoleculeRecord
from mlip_jax.potential import Potential
from mlip_jax.simulation.relaxation.cells.filters import CellFilter
from mlip_jax.simulation.relaxation.cells.inputs import (
    cell_fields,
    find_cell_obstacle,
    overlap_in_cell,
)
from mlip_jax.simulation.relaxation.loop import SHORTEST
from mlip_jax.simulation.relaxation.pool import QueuedMolecule
from mlip_jax.structure import STATES, electronic_value


def find_obstacle(atoms: Atoms, potential: Potential, cell_filter: CellFilter | None = None) -> str:
    """Return the reason why a molecule or a periodic structure cannot be relaxed, or ""."""
    if not isinstance(atoms, Atoms):
        return f"expected ASE's Atoms, received {atoms!r}"
    if len(atoms) == 0:
        return "the molecule has no atoms"
    if not np.isfinite(atoms.positions).all():
        bad = int(np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))[0])
        return f"positions are not finite: atom {bad} is at {atoms.positions[bad].tolist()}"
    if atoms.pbc.any():
        reason = find_cell_obstacle(atoms, potential, cell_filter)
        if reason:
            return reason
    unsupported = [type(c).__name__ for c in atoms.constraints if not isinstance(c, FixAtoms)]
    if unsupported:
        return f"FixAtoms is the only supported ASE constraint, received {', '.join(unsupported)}"
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
    indices = [constraint.get_indices() for constraint in atoms.constraints]
    return np.unique(np.concatenate(indices)).astype(int) if indices else np.zeros(0, int)


def queued_molecule(
    number: int, atoms: Atoms, dtype, cell_filter: CellFilter | None = None
) -> QueuedMolecule:
    """Convert a molecule to an entry of the queue."""
    mobile = np.ones(len(atoms), bool)
    mobile[fixed_atoms(atoms)] = False
    # centered at the origin: float32 has fewer digits far from it
    return QueuedMolecule(
        number,
        atoms.numbers,
        (atoms.positions - atoms.positions.mean(0)).astype(dtype),
        mobile,
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
