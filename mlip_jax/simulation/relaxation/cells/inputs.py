"""Checks of periodic structures before their relaxation, and their entries in the queue."""

from __future__ import annotations

import numpy as np
from ase import Atoms

from mlip_jax.graphs.image_slots import count_images, max_images
from mlip_jax.graphs.long_range import find_lattice_obstacle, in_cells
from mlip_jax.graphs.neighbors import neighbor_list
from mlip_jax.models.layers.forces import has_energy_derivatives
from mlip_jax.potential import Potential
from mlip_jax.simulation.relaxation.cells.filters import CellFilter
from mlip_jax.simulation.relaxation.cells.symmetry import is_kept, operations
from mlip_jax.simulation.relaxation.state import Symmetry
from mlip_jax.structure import cell_problem
from mlip_jax.wording import count_of

# _MAX_CANDIDATES: pairs of atoms and images that 32-bit integers can number.
_MAX_CANDIDATES = 2**31


def find_cell_obstacle(atoms: Atoms, potential: Potential, cell_filter: CellFilter | None) -> str:
    """Return the reason why a periodic structure cannot be relaxed, or ""."""
    if problem := cell_problem(atoms.cell.array, atoms.pbc):
        return f"invalid cell: {problem}"
    far = in_cells(potential.long_range_cutoff)
    if reason := find_lattice_obstacle(potential.long_range_cutoff, atoms.cell.array, atoms.pbc):
        return reason
    cell = atoms.cell.complete().array
    if abs(np.linalg.det(cell)) < 1e-9:
        return "the lattice vectors are coplanar"
    reach = max(potential.cutoff, far or 0.0)
    images = count_images(cell, atoms.pbc, reach)
    if images > max_images(reach) or images * len(atoms) ** 2 >= _MAX_CANDIDATES:
        return (
            f"the cell requires {count_of(images, 'image', ',')} of "
            f"{count_of(len(atoms), 'atom')}, which are too many for batches. Use "
            "MLIPCalculator with an optimizer of ASE."
        )
    if cell_filter is None:
        return ""
    if not (potential.conservative and has_energy_derivatives(potential.model)):
        return (
            "the cell cannot be relaxed: the forces of the force field are not the gradient of its "
            "energy. Relax with fixed cells."
        )
    if atoms.pbc.all():
        return ""
    if cell_filter.scalar_pressure:
        return "a pressure requires a cell that is periodic in all three directions"
    if periodic_axes(cell, atoms.pbc) is None:
        return (
            "the cell cannot be relaxed: directions without periodicity must be along x, y or z and "
            "perpendicular to the others"
        )
    if not cell_filter.mask_of(periodic_axes(cell, atoms.pbc)).any():
        return "mask fixes all components of the strain along the periodic directions"
    return ""


def periodic_axes(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray | None:
    """Return which of the axes x, y and z are periodic, (3,) bool.

    None if a lattice vector without periodicity is not perpendicular to the others along an axis.
    """
    if np.all(pbc):
        return np.ones(3, bool)
    # The axes without periodicity are those perpendicular to all periodic lattice vectors.
    axes = (np.abs(cell[pbc]) > 1e-6).any(axis=0)
    inside = (np.abs(cell[~np.asarray(pbc)][:, axes]) < 1e-6).all()
    return axes if inside and axes.sum() == np.sum(pbc) else None


def overlap_in_cell(atoms: Atoms, shortest: float) -> str:
    """Return a message about two atoms or images closer than `shortest` (Å), or ""."""
    cell, pbc = atoms.cell.complete().array, atoms.pbc
    close = neighbor_list(atoms.positions, shortest, cell, pbc)
    if not len(close.senders):
        return ""
    vectors = (
        atoms.positions[close.senders] - atoms.positions[close.receivers] + close.shifts @ cell
    )
    distances = np.linalg.norm(vectors, axis=1)
    first = int(np.argmin(distances))
    i, j = sorted((int(close.receivers[first]), int(close.senders[first])))
    return f"atoms {i} and {j} overlap: their distance is {distances[first]:.3g} Å"


def cell_fields(
    atoms: Atoms, cell_filter: CellFilter | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Symmetry | None]:
    """Return cell, periodicity, mask and symmetry of an entry of the queue."""
    mask = np.ones((3, 3)) if cell_filter is None else strain_mask(atoms, cell_filter)
    symmetry = operations(atoms) if is_kept(atoms) else None
    return atoms.cell.complete().array, atoms.pbc, mask, symmetry


def strain_mask(atoms: Atoms, cell_filter: CellFilter) -> np.ndarray:
    """Return the components of the strain of a structure that relax, (3, 3)."""
    return cell_filter.mask_of(periodic_axes(atoms.cell.complete().array, atoms.pbc))
