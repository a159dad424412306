"""Tests for the candidates of size buckets."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.graphs.bucket_edges import candidates, partition


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(1, 50), min_size=1, max_size=8, unique=True),
    num=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_partition_is_optimal(values, num, seed):
    values = np.array(sorted(values))
    counts = np.random.default_rng(seed).integers(1, 9, len(values))

    def cost(ends):
        return (counts * np.array(ends)[np.searchsorted(ends, values)]).sum()

    ends = partition(values, counts, num)
    choices = [
        (*chosen, values[-1])
        for k in range(min(num, len(values)))
        for chosen in itertools.combinations(values[:-1], k)
    ]
    assert len(ends) <= num and ends[-1] == values[-1]
    assert cost(ends) == min(map(cost, choices))


@settings(max_examples=30, deadline=None)
@given(
    n_edge=st.lists(st.integers(0, 400), min_size=1, max_size=200),
    batch_size=st.floats(1, 60),
    num=st.integers(1, 4),
)
def test_candidates_ascend_and_fit_all_structures(n_edge, batch_size, num):
    n_edge = 2 * np.array([*n_edge, 1])
    for edges, _ in candidates(n_edge, batch_size, num):
        assert 1 <= len(edges) <= num and list(edges) == sorted(edges) and edges[-1] >= n_edge.max()
