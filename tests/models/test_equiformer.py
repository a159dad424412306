"""Tests for Equiformer beyond the contract; tests/importers/test_equiformer.py compares numbers."""

import jax
import numpy as np
import pytest

from mlip_jax import models
from mlip_jax.potential import example_graph
from mlip_jax.structure import Structure
from tests.models.test_contract import case_of

pytestmark = pytest.mark.usefixtures("double_precision")


def test_a_single_neighbor_leaves_smoothly():
    """Its softmax is 1 at every distance, so the energy must not jump just inside the cutoff."""
    case = case_of("equiformer")

    def energy(distance):
        positions = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, distance]])
        return case(Structure(np.array([6, 8]), positions))[0][0]

    outside = energy(case.cutoff + 0.01)
    bond = abs(energy(1.5) - outside)
    assert bond > 1e-3
    assert abs(energy(case.cutoff - 0.1) - outside) < 1e-2 * bond


def test_properties_state_what_the_published_form_does():
    assert models.create("equiformer").smooth
    assert not models.create("equiformer", cutoff_fn="step").smooth
    assert not models.create("equiformer").mirror_symmetric
    with pytest.raises(ValueError, match="at most 2 numbers of channels"):
        jax.eval_shape(
            models.create("equiformer", num_features=(4, 2, 1)).init,
            jax.random.key(0),
            example_graph(),
        )
