"""Tests for derivatives of sums with a number of terms that is only known at run time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.models.layers.directional.slot_sums import slot_sum

NEIGHBORS = np.array([[1, 2], [2, 0], [0, 1], [1, 1]], np.int32)


def term(slot, neighbors, values):
    x, w = values
    return jnp.sin(x[neighbors[slot]] @ w)


def energy(total, num, x, w):
    return jnp.sum(total(num, (x, w)) ** 3)


def looped(num, values):
    return slot_sum(term, num, NEIGHBORS, values)


def unrolled(num, values):
    terms = [jnp.where(n < num, term(n, NEIGHBORS, values), 0.0) for n in range(4)]
    return sum(terms)


@pytest.mark.usefixtures("double_precision")
def test_derivatives_equal_those_of_all_terms():
    """Forces, training on forces, Hessians, and batches with different numbers of terms."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 2)), rng.standard_normal((2, 2))
    numbers = jnp.array([0, 3, 4], jnp.int32)

    def derivatives(total):
        def loss(w, num):
            return jnp.sum(jax.grad(energy, 2)(total, num, x, w) ** 2)

        first = jax.vmap(lambda n: jax.grad(energy, (2, 3))(total, n, x, w))(numbers)
        return first, jax.grad(loss)(w, 3), jax.hessian(energy, 2)(total, 3, x, w)

    actual, expected = (jax.jit(lambda t=t: derivatives(t))() for t in (looped, unrolled))
    assert np.abs(expected[0][0][1] - expected[0][0][2]).max() > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), actual, expected)
