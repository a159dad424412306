"""Structures for several tests."""

from __future__ import annotations

import numpy as np
from ase import Atoms


def random_molecule(n, seed=0, spread=1.6):
    """Return n atoms of H, C, N, O, at least 0.9 Å apart, in a box of about `spread` Å per atom."""
    rng = np.random.default_rng(seed)
    box = spread * n ** (1 / 3) + 0.5
    positions = np.zeros((0, 3))
    while len(positions) < n:
        new = rng.uniform(0, box, 3)
        if (np.linalg.norm(positions - new, axis=1) > 0.9).all():
            positions = np.concatenate([positions, new[None]])
    return Atoms(rng.choice([1, 6, 7, 8], n), positions)


def crystal(size):
    """Return a skewed cell of `size` Å with four atoms off their equilibrium positions."""
    cell = size * np.array([[1.0, 0.0, 0.0], [0.3, 0.9, 0.0], [-0.2, 0.1, 1.1]])
    scaled = np.array([[0.02, 0.0, 0.1], [0.5, 0.45, 0.1], [0.0, 0.55, 0.52], [0.45, 0.05, 0.6]])
    return Atoms("CONH", scaled_positions=scaled, cell=cell, pbc=True)
