"""Tests of rows of trainable tables on devices that add with atomic operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.graphs.element_rows import element_rows
from mlip_jax.target_device import compiling_for

INDEX = np.array([2, 0, 2, 2, 3])  # row 1 is not used, row 2 several times


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3)])
def test_rows_and_their_derivatives_are_those_of_plain_indexing(shape):
    """Detects a wrong derivative of first or second order, in both modes, and under vmap."""
    rng = np.random.default_rng(0)
    table, direction = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))

    def loss(values, rows):
        return (jnp.sin(rows(values)) * np.arange(1, 6).reshape(5, *[1] * (len(shape) - 1))).sum()

    def results(rows):
        gradient = jax.grad(loss)
        return (
            rows(table),
            jax.jvp(rows, (table,), (direction,))[1],
            gradient(table, rows),
            jax.jvp(lambda t: gradient(t, rows), (table,), (direction,))[1],
            jax.grad(lambda t: (gradient(t, rows) * direction).sum())(table),
            jax.vmap(rows)(jnp.stack([table, direction])),
        )

    expected = results(lambda t: t[INDEX])
    with compiling_for("gpu"):
        found = results(lambda t: element_rows(t, INDEX, jnp.float32))
        text = jax.jit(jax.grad(lambda t: loss(t, lambda x: element_rows(x, INDEX, x.dtype))))
        assert "scatter" not in text.lower(table).as_text()
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
