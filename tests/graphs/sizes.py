"""Sizes of structures for the tests of padding and packing."""

import numpy as np
from hypothesis import strategies as st

from mlip_jax.graphs.shapes import Sizes

COUNT = 2400
DISTRIBUTIONS = ("constant", "uniform", "log-normal", "two sizes", "lopsided", "one outlier")


@st.composite
def size_lists(draw):
    n_node = np.array(draw(st.lists(st.integers(1, 40), min_size=1, max_size=300)))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return Sizes(
        n_node, 2 * (n_node * (n_node - 1) * rng.uniform(0, 0.5, len(n_node))).astype(np.int64)
    )


def realistic_sizes(count=4000, seed=0):
    """Return sizes of molecules with 3 to 60 atoms (mean about 30) and their edges within 5 Å."""
    rng = np.random.default_rng(seed)
    n_node = np.clip(rng.normal(30, 11, count), 3, 60).astype(np.int64)
    density = np.clip(
        rng.normal(0.75, 0.1, count) * np.minimum(1.0, (24 / n_node) ** 0.6), 0.1, 1.0
    )
    return Sizes(n_node, 2 * (n_node * (n_node - 1) / 2 * density).astype(np.int64))


def sizes_of(n_edge) -> Sizes:
    """Return sizes with these edges and about as many atoms as molecules have."""
    n_edge = 2 * np.maximum(np.asarray(n_edge) / 2, 1).astype(np.int64)
    return Sizes(np.maximum(n_edge**0.6, 2).astype(np.int64), n_edge)


def distribution(name, rng) -> Sizes:
    """Return edges with a mean of about 600, except for the outlier."""
    if name == "constant":
        return sizes_of(np.full(COUNT, 600))
    if name == "uniform":
        return sizes_of(rng.uniform(100, 1100, COUNT))
    if name == "log-normal":
        return sizes_of(530 * np.exp(0.5 * rng.normal(size=COUNT)))
    if name == "two sizes":
        return sizes_of(np.where(rng.random(COUNT) < 0.5, 400, 800))
    if name == "lopsided":
        return sizes_of(400 * (1 + rng.random(COUNT) ** 3))
    n_edge = rng.uniform(300, 900, COUNT)
    n_edge[rng.integers(COUNT)] = 6000
    return sizes_of(n_edge)


def check(plan, order, sizes, budgets):
    """Assert that every structure is planned once and no batch exceeds its budget."""
    assert sorted(np.concatenate([indices for _, indices in plan]).tolist()) == sorted(
        order.tolist()
    )
    for bucket, indices in plan:
        assert 0 < len(indices) <= budgets[bucket].n_graph - 1
        assert sizes.n_node[indices].sum() <= budgets[bucket].n_node - 1
        assert sizes.n_edge[indices].sum() <= budgets[bucket].n_edge
        assert sizes.n_pair is None or sizes.n_pair[indices].sum() <= budgets[bucket].n_pair
