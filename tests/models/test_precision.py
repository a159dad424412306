"""Tests that the precision of the graph determines that of the whole computation.

Nothing is compiled. Forces that are a gradient have the precision of the positions, so only the
default options trace them.
"""

import jax
import numpy as np
import pytest

from mlip_jax import models
from mlip_jax.potential import evaluate, example_graph, is_conservative
from tests.models.test_contract import FURTHER_OPTIONS, small_options

CASES = [
    (name, options) for name in models.names() for options in ({}, *FURTHER_OPTIONS.get(name, ()))
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_single_precision_is_kept_with_double_precision_weights(name, options):
    model = models.create(name, **small_options(name) | options)
    with_forces = not options or not is_conservative(model)
    with jax.enable_x64(True):
        params = jax.eval_shape(model.init, jax.random.key(0), example_graph())
        params = jax.tree.map(lambda p: np.zeros(p.shape, np.float64), params)
        result = jax.eval_shape(
            lambda p, g: evaluate(model, p, g, 1.0, with_forces=with_forces),
            params,
            example_graph(np.float32),
        )
    assert result.energies.dtype == result.energy.dtype == result.forces.dtype == np.float32
