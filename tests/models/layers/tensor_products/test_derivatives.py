"""Tests for the derivatives of the convolution, which are written by hand.

The reference differentiates the loop over blocks itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.models.layers.tensor_products import chunks
from mlip_jax.models.layers.tensor_products.chunks import PathGroup, Spec
from mlip_jax.models.layers.tensor_products.primitives import convolve_blocks

pytestmark = pytest.mark.usefixtures("double_precision")
GROUPS = (PathGroup(0, ((1, 1),)), PathGroup(1, ((1, 0), (0, 1))))
RNG = np.random.default_rng(0)


def arguments(num=4, edges=6, channels=(2, 3)):
    def draw(*shape):
        return jnp.asarray(RNG.normal(size=shape))

    x = [draw(num, 2 * group.degree + 1, width) for group, width in zip(GROUPS, channels)]
    w = [[draw(edges, width) for _ in group.paths] for group, width in zip(GROUPS, channels)]
    senders, receivers = jnp.asarray(RNG.integers(0, num, (2, edges)))
    return (x, draw(edges, 4), w), (senders, receivers)


@pytest.mark.parametrize(
    ("undirected", "block", "compact", "stored"),
    [(False, 6, True, False), pytest.param(True, 3, False, True, marks=pytest.mark.slow)],
)
def test_derivatives(undirected, block, compact, stored):
    """First derivatives, their gradient (training on forces), tangents of both, and batches."""
    spec = Spec(GROUPS, undirected, False, block, compact, stored)
    (x, y, w), indices = arguments()
    directions = jax.tree.map(lambda a: jnp.asarray(RNG.normal(size=a.shape)), (x, y, w))

    def loss(function, *args):
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(function(spec, *args, *indices)))

    def results(function):
        # once all derivatives, once those of a layer whose features are given
        first = jax.grad(functools.partial(loss, function), (0, 1, 2))
        partial = jax.grad(lambda y, w: loss(function, x, y, w), (0, 1))

        def of_first(*args):
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(first(*args)))

        def of_partial(x, y, w):
            return sum(
                jnp.sum(jnp.sin(a))
                for a in jax.tree.leaves(jax.grad(lambda y: loss(function, x, y, w))(y))
            )

        tangents = jax.jvp(lambda *args: first(*args), (x, y, w), directions)[1]
        columns = jax.vmap(jax.linearize(lambda y: first(x, y, w), y)[1])(
            jnp.stack([directions[1], y])
        )
        return (
            first(x, y, w),
            partial(y, w),
            jax.grad(of_first, (0, 1, 2))(x, y, w),
            jax.grad(of_partial, (0, 1, 2))(x, y, w),
            tangents,
            columns,
        )

    found, expected = jax.jit(lambda: (results(convolve_blocks), results(chunks.forward)))()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_shapes_need_no_tracing(monkeypatch):
    """Tracing a training step does not trace the loops over blocks, which takes many seconds."""
    for name in ("forward", "backward", "second"):
        monkeypatch.setattr(chunks, name, None)
    spec = Spec(GROUPS, True, False, 3)
    (x, y, w), indices = arguments()

    def energy(*args):
        return sum(jnp.sum(a) for a in jax.tree.leaves(convolve_blocks(spec, *args, *indices)))

    def loss(w):
        return jnp.sum(jax.grad(energy, 1)(x, y, w) ** 2)

    assert jax.eval_shape(jax.grad(loss), w)[1][0].shape == (6, 3)


def test_blocks_do_not_change_the_result():
    (x, y, w), indices = arguments()
    one, two = jax.jit(
        lambda: [
            chunks.forward(Spec(GROUPS, True, False, block, block == 6), x, y, w, *indices)
            for block in (6, 2)
        ]
    )()
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
