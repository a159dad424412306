"""Tests for the detection of broken molecules."""

import types

import numpy as np
import pytest
from ase import Atoms

from mlip_jax.simulation.dynamics import system
from mlip_jax.simulation.dynamics.device.breakage import mark_broken
from mlip_jax.simulation.dynamics.device.state import RUNNING, TOO_HOT
from mlip_jax.simulation.dynamics.integrators import Motion
from tests.simulation.analytic import pairwise


@pytest.mark.parametrize(("dof", "code"), [(0, RUNNING), (3, TOO_HOT)])
def test_an_atom_with_a_fixed_center_of_mass_has_no_temperature(dof, code):
    """Detects rounding errors of its velocity that exceed the limit of 5000 K."""
    atom = system.make([Atoms("Ar")], pairwise())
    limits = np.full(1, float(dof)), np.ones(1), np.full(1, 1e-30)
    particles = atom.particles(np.float64, *limits, stop_on_bond_break=False)
    zeros = np.zeros((atom.nodes, 3))
    motion = Motion(zeros, zeros, zeros + 1e-9, None, np.zeros(1))
    state = types.SimpleNamespace(culprit=np.array([-1]))
    codes, _ = mark_broken(particles, state, motion, np.array([RUNNING]), (0.5, 1.5))
    assert codes.tolist() == [code]
