"""Tests for candidates from a force field: physical snapshots that differ from the start."""

import numpy as np
from ase.build import molecule

from mlip_jax.datasets.columns import Columns
from mlip_jax.label_budget.exploration import Exploration, explore
from mlip_jax.label_budget.geometry import is_physical
from mlip_jax.structure import from_ase
from tests.simulation.analytic import pairwise

STARTS = [
    ("methanol", molecule("CH3OH")),
    ("methanol", molecule("CH3OH")),
    ("water", molecule("H2O")),
]


def snapshots(steps):
    """Return snapshots of dynamics without forces at 800 K, of both molecules."""
    starts = Columns.from_structures(from_ase(atoms, molecule=name) for name, atoms in STARTS)
    options = Exploration(("md",), 5, 800.0, steps, 2, 4, 2, 0)
    return explore(pairwise("none", (1, 6, 8)), starts, options)


def test_snapshots_are_one_trajectory_per_molecule_and_physical():
    """Detects the start as a candidate, two trajectories of a molecule, and broken molecules."""
    columns = snapshots(8)
    assert sorted(columns.molecule.tolist()) == ["methanol"] * 2 + ["water"] * 2
    assert set(columns.subset) == {"md"}
    for k in range(len(columns)):
        start = dict(STARTS)[columns.molecule[k]]
        assert is_physical(start, columns[k].positions)
        assert np.abs(columns[k].positions - start.positions).max() > 1e-3
    assert len(snapshots(400)) == 0  # without forces, all bonds break
