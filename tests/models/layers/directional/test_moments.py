"""Tests for contractions of edges with moments of atoms, against dense sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.models.layers.directional.moments import AtomEdges, moments, project
from mlip_jax.target_device import compiling_for

ATOMS = np.array(
    [2, 0, 2, 2, 0, 1] + [2] * 9, np.int32
)  # more edges than one step of the loop adds
ORDER = np.argsort(ATOMS, kind="stable").astype(np.int32)
COUNT = np.bincount(ATOMS, minlength=4).astype(np.int32)
COUNT[2] -= 1  # the last edge is in no sum
EDGES = AtomEdges(
    *map(jnp.asarray, (ATOMS, ORDER, np.cumsum([0, 2, 1, 12])[:4].astype(np.int32), COUNT))
)


def dense(y, a, z):
    """Return the same contractions with a matrix of edges and atoms."""
    member = jax.nn.one_hot(ATOMS, 4, dtype=y.dtype)
    x = jnp.einsum("en,em,ec->nmc", member, y, a)
    return jnp.einsum("en,em,nmc->ec", member, z, jnp.sin(x))


def looped(y, a, z):
    return project(z, jnp.sin(moments(y, a, EDGES)), EDGES)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_derivatives_equal_those_of_dense_sums(platform):
    """Detects a wrong rule: forces, training on forces, Hessians by both modes, and batches."""
    rng = np.random.default_rng(0)
    known = np.append(np.ones(len(ATOMS) - 1), 0.0)[:, None]  # harmonics of other edges are zero
    y, z = (known * rng.standard_normal((len(ATOMS), 3)) for _ in range(2))
    a = rng.standard_normal((len(ATOMS), 2))

    def results(function):
        def energy(y, a, z):
            return jnp.sum(function(known * y, a, known * z) ** 2)

        def force_loss(a):
            return sum(jnp.sum(g**3) for g in jax.grad(energy, (0, 2))(y, a, z))

        hessian = jax.jacfwd(jax.grad(lambda t: energy(y + t[0], a * t[1], z - t[0])))
        batch = jax.vmap(function, (None, 0, None))(y, jnp.stack([a, -2 * a]), z)
        first = jax.grad(energy, (0, 1, 2))(y, a, z)
        return first, jax.grad(force_loss)(a), hessian(jnp.ones(2)), batch

    with compiling_for(platform):
        actual, expected = (jax.jit(results, static_argnums=0)(f) for f in (looped, dense))
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def test_nan_of_an_atom_stays_in_its_sums():
    """Catches loops that read edges of other atoms: a broken molecule would break its batch."""
    y, a = jnp.ones((len(ATOMS), 2)), jnp.ones((len(ATOMS), 3))
    broken = jnp.where(ATOMS[:, None] == 1, jnp.nan, a)
    found = np.asarray(moments(y, broken, EDGES))
    np.testing.assert_array_equal(np.isnan(found).any((1, 2)), [False, True, False, False])


def test_moments_without_edges_are_zero():
    """Catches reads from empty arrays."""
    none = jnp.zeros(0, jnp.int32)
    edges = AtomEdges(none, none, jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32))
    found = moments(jnp.zeros((0, 3)), jnp.zeros((0, 4)), edges)
    np.testing.assert_array_equal(found, np.zeros((2, 3, 4)))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_only_cpus_loop_over_edges(platform):
    """Catches loops on GPUs, each step of which waits for the host."""
    y, a = jnp.ones((len(ATOMS), 2)), jnp.ones((len(ATOMS), 3))
    with compiling_for(platform):
        text = jax.jit(lambda y, a: moments(y, a, EDGES)).lower(y, a).as_text()
    assert ("stablehlo.while" in text) == (platform == "cpu")
