"""Positions far from the origin, which lose digits in single precision.

At 1,000 Å, positions in float32 are 6e-5 Å apart; rounding then changes the force along a bond with
33 eV/Å² by up to 1 meV/Å. Structures far from the origin are therefore moved to it before the
conversion to float32. Structures near the origin keep exactly the same positions.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from ase.geometry import wrap_positions

from mlip_jax.datasets.columns import Columns

# Largest coordinate (Å) that keeps enough digits in float32, whose resolution is 4e-6 Å below it.
LIMIT = 64.0


def is_far(positions: np.ndarray) -> bool:
    """Return whether a coordinate (Å) is beyond LIMIT. Values that are not finite are ignored."""
    size = np.abs(positions)
    return bool((size[np.isfinite(size)] > LIMIT).any())


def move_near_origin(columns: Columns) -> Columns:
    """Move structures that are far from the origin to it, and return all structures.

    Periodic structures are wrapped into their cell first. This changes no distance to the nearest
    images, but neighbor lists must be built from the new positions.
    """
    if not is_far(columns.positions):
        return columns
    positions = columns.positions.copy()
    for s in range(len(columns)):
        atoms = slice(columns.offsets[s], columns.offsets[s + 1])
        coordinates = positions[atoms]
        if not is_far(coordinates) or not np.isfinite(coordinates).all():
            continue
        if columns.pbc is not None and columns.pbc[s].any():
            coordinates = wrap_positions(coordinates, columns.cell[s], columns.pbc[s], eps=0)
        positions[atoms] = coordinates - coordinates.mean(0)
    return dataclasses.replace(columns, positions=positions)
