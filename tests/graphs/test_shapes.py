"""Tests for static shapes: they are large enough, few, and do not grow without need."""

import numpy as np
import pytest

from mlip_jax.graphs.shapes import GrowingBudget, PaddingBudget, SizeBuckets, bucket_size, round_up


@pytest.mark.parametrize(
    ("size", "multiple", "expected"),
    [(0, 8, 0), (1, 8, 8), (8, 8, 8), (9, 8, 16), (64.2, 64, 128), (np.float64(128.0), 128, 128)],
)
def test_round_up(size, multiple, expected):
    rounded = round_up(size, multiple)
    assert rounded == expected and type(rounded) is int  # shapes are keys of compiled programs


def test_bucket_sizes():
    for multiple in (8, 64):
        sizes = sorted({bucket_size(n, multiple) for n in range(20000)})
        assert all(s % multiple == 0 for s in sizes)
        assert all(b <= max(1.25 * a + multiple, a + multiple) for a, b in zip(sizes, sizes[1:]))
        assert all(b >= 1.2 * a for a, b in zip(sizes, sizes[1:]))
        assert all(n <= bucket_size(n, multiple) for n in range(2000))


def test_a_growing_budget_never_shrinks():
    budget = GrowingBudget()
    first = budget.fit(PaddingBudget(100, 1000, 10))
    assert first == PaddingBudget(128, 1200, 16)
    assert budget.fit(PaddingBudget(128, 1200, 2)) == first
    assert budget.fit(PaddingBudget(10, 1201, 2, 30)) == PaddingBudget(128, 1456, 16, 48)
    assert GrowingBudget(slack=1, multiple=1).fit(PaddingBudget(7, 9, 3)) == PaddingBudget(7, 9, 3)


def test_a_bucket_in_use_serves_structures_that_are_not_much_smaller():
    buckets = SizeBuckets(None)
    large = buckets.choose(30, 800, None, False)
    assert buckets.choose(25, 500, None, False) is large
    assert buckets.choose(25, 500, None, True) is not large, "a cell takes other arrays"
    assert buckets.choose(5, 20, None, False) is not large, "most of it would be padding"


def test_all_pairs_of_a_bucket_fit():
    bucket = SizeBuckets(np.inf).choose(20, 200, 190, False)
    atoms = bucket.budget.n_node - 1
    assert bucket.long_range and bucket.budget.n_pair >= atoms * (atoms - 1) // 2
    assert SizeBuckets(np.inf).choose(1, 0, 0, False).long_range, (
        "a single atom has a list without pairs"
    )
