"""Tests of products on neighbor slots: they equal those over a list of edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.graphs.slot_sums import SlotIndex
from mlip_jax.models.layers.tensor_products import chunks, slot_products
from mlip_jax.models.layers.tensor_products.chunks import PathGroup, Spec

NEIGHBORS = ((1, 2), (0, 2, 3), (0, 1), (1,), ())  # the last atom has none
GROUPS = (PathGroup(0, ((0, 0), (1, 1))), PathGroup(1, ((1, 0), (2, 1))))
ARGUMENTS = ("g", "x", "y", "w")


def slots():
    """Return the index of all slots and their receivers."""
    num, capacity = len(NEIGHBORS), 3
    senders = np.repeat(np.arange(num, dtype=np.int32)[:, None], capacity, 1)
    used, reverse = np.zeros((num, capacity), bool), np.arange(num * capacity, dtype=np.int32)
    for i, found in enumerate(NEIGHBORS):
        senders[i, : len(found)], used[i, : len(found)] = found, True
        for k, j in enumerate(found):
            reverse[i * capacity + k] = j * capacity + NEIGHBORS[j].index(i)
    index = SlotIndex(senders.ravel(), reverse.reshape(num, capacity), used)
    return index, np.repeat(np.arange(num, dtype=np.int32), capacity)


def arrays(seed):
    """Return values of g, x, y and w; the harmonics are of degrees 0 to 2."""
    rng, (index, _) = np.random.default_rng(seed), slots()
    num, rows, width = len(NEIGHBORS), index.atoms.size, 2
    g = [[rng.normal(size=(num, 2 * c + 1, width)) for _, c in group.paths] for group in GROUPS]
    x = [rng.normal(size=(num, 2 * group.degree + 1, width)) for group in GROUPS]
    used = index.used.reshape(-1, 1)
    w = [[rng.normal(size=(rows, width)) * used for _ in group.paths] for group in GROUPS]
    values = {"g": g, "x": x, "y": rng.normal(size=(rows, 9)) * used, "w": w}
    return jax.tree.map(jnp.asarray, values)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def check(found, expected, index):
    """Compare results; those of empty slots do not count."""
    used = index.used.reshape(-1)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (v[used] if len(v) == used.size else v for v in (np.asarray(a), np.asarray(b)))
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_products_and_first_derivatives_are_those_over_edges():
    """Detects a wrong reverse slot, sign, component or mask."""
    (index, receivers), values = slots(), arrays(0)
    spec, wanted = Spec(GROUPS, undirected=False, old_signs=False, block=100), (True,) * 3
    x, y, w = (values[name] for name in ("x", "y", "w"))
    garbage = [[a + 5.0 * ~index.used.reshape(-1, 1) for a in group] for group in w]
    found = slot_products.forward(spec, x, y, garbage, index)
    check(found, chunks.forward(spec, x, y, w, index.atoms, receivers), index)
    found = slot_products.backward(spec, wanted, values["g"], x, y, garbage, index)
    expected = chunks.backward(spec, wanted, values["g"], x, y, w, index.atoms, receivers)
    check(found, expected, index)
    assert not np.any(found[2][0][0][~index.used.reshape(-1)])


@pytest.mark.parametrize("given", ["xyw", "x", "y", "w"])
def test_second_derivatives_are_those_over_edges(given):
    """Detects a missing term of the second derivatives, or one of another cotangent."""
    (index, receivers), values, others = slots(), arrays(0), arrays(1)
    spec, wanted = Spec(GROUPS, undirected=False, old_signs=False, block=100), (True,) * 4
    cotangents = tuple(others[name] if name in given else None for name in ("x", "y", "w"))
    arguments = [values[name] for name in ARGUMENTS]
    found = slot_products.second(spec, wanted, cotangents, *arguments, index)
    expected = chunks.second(spec, wanted, cotangents, *arguments, index.atoms, receivers)
    check(found, expected, index)
