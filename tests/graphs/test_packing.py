"""Tests for packing plans: every structure once, within the budget, in nearly the given order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.graphs.packing import check_sizes, fill_fraction, plan_batches, plan_buckets
from mlip_jax.graphs.padding import choose_budget, choose_budgets
from mlip_jax.graphs.shapes import PaddingBudget, Sizes
from tests.graphs.sizes import realistic_sizes, size_lists, sizes_of


def fill(plan, sizes, budget):
    """Return `fill_fraction` of a plan within one budget."""
    return fill_fraction([(0, indices) for indices in plan], sizes, (budget,))


@settings(max_examples=50, deadline=None)
@given(sizes=size_lists(), batch_size=st.integers(1, 40), seed=st.integers(0, 99))
def test_plan_is_a_partition_within_the_budget(sizes, batch_size, seed):
    budget = choose_budget(sizes, batch_size)
    rng = np.random.default_rng(seed)
    order = rng.choice(len(sizes.n_node), rng.integers(1, len(sizes.n_node) + 1), replace=False)
    plan = plan_batches(order, sizes, budget)
    assert sorted(np.concatenate(plan).tolist()) == sorted(order.tolist())
    for batch in plan:
        assert 0 < len(batch) <= budget.n_graph - 1
        assert sizes.n_node[batch].sum() <= budget.n_node - 1
        assert sizes.n_edge[batch].sum() <= budget.n_edge
    again = plan_batches(order, sizes, budget)
    assert len(again) == len(plan) and all(np.array_equal(a, b) for a, b in zip(plan, again))
    shares = fill(plan, sizes, budget)
    assert all(0 <= share <= 1 for share in shares.values())


def test_plan_keeps_the_order_except_for_gaps():
    sizes = realistic_sizes(200)
    order = np.random.default_rng(0).permutation(200)
    plan = plan_batches(order, sizes, choose_budget(sizes, 16))
    assert plan[0][0] == order[0]
    rank = np.empty(200, int)
    rank[order] = np.arange(200)
    assert np.corrcoef(rank[np.concatenate(plan)], np.arange(200))[0, 1] > 0.8


def test_structure_that_is_too_large_is_reported():
    sizes = Sizes(np.array([3, 50]), np.array([6, 900]))
    with pytest.raises(ValueError, match=r"spice:aspirin has 50 atoms and 900 edges"):
        check_sizes(sizes, PaddingBudget(20, 100, 5), ["spice:water", "spice:aspirin"].__getitem__)
    with pytest.raises(ValueError, match="structure 1 has"):
        plan_batches(np.array([1, 0]), sizes, PaddingBudget(200, 100, 5))


def test_pairs_that_do_not_fit_are_reported():
    sizes = Sizes(np.array([3, 50]), np.array([6, 90]), np.array([3, 1225]))
    budget = PaddingBudget(60, 100, 5, 1000)
    with pytest.raises(
        ValueError, match="structure 1 has 50 atoms and 90 edges, 1225 long-range pairs.*1000 pairs"
    ):
        check_sizes(sizes, budget)


@settings(max_examples=40, deadline=None)
@given(sizes=size_lists(), batch_size=st.integers(1, 40), seed=st.integers(0, 99))
def test_plan_respects_the_capacity_for_pairs(sizes, batch_size, seed):
    rng = np.random.default_rng(seed)
    sizes = sizes._replace(
        n_pair=(sizes.n_edge // 2 * rng.uniform(0, 3, len(sizes.n_edge))).astype(np.int64)
    )
    budget = choose_budget(sizes, batch_size)
    order = rng.permutation(len(sizes.n_node))
    plan = plan_batches(order, sizes, budget)
    assert sorted(np.concatenate(plan).tolist()) == sorted(order.tolist())
    for batch in plan:
        chosen = sizes.take(batch)
        assert chosen.n_node.sum() <= budget.n_node - 1 and chosen.n_edge.sum() <= budget.n_edge
        assert chosen.n_pair.sum() <= budget.n_pair and len(batch) <= budget.n_graph - 1
    assert 0 <= fill(plan, sizes, budget)["n_pair"] <= 1


def naive_plan(order, sizes, budget, window=256):
    """Plan one bucket, a structure at a time: in order except for the last, then the largest that
    fit.
    """
    left, batches = list(order), []

    def fits(batch):
        return (
            sizes.n_edge[batch].sum() <= budget.n_edge and sizes.n_node[batch].sum() < budget.n_node
        )

    while left:
        pool, count = left[:window], 1
        while count < len(pool) and fits(pool[: count + 1]):
            count += 1
        batch = pool[: count if count == len(pool) else max(count - 1, 1)][: budget.n_graph - 1]
        while len(batch) < budget.n_graph - 1:
            gap = [s for s in pool if s not in batch and fits([*batch, s])]
            if not gap:
                break
            batch.append(max(gap, key=lambda s: sizes.n_edge[s]))
        left = [s for s in left if s not in batch]
        batches.append(batch)
    return batches


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
def test_one_bucket_gives_the_naive_plan(batch_size):
    rng = np.random.default_rng(batch_size)
    sizes = sizes_of(rng.uniform(2, 900, 400))
    budgets = choose_budgets(sizes, batch_size, max_budgets=1)
    order = rng.permutation(400)
    plan = plan_buckets(order, sizes, budgets)
    plain = plan_batches(order, sizes, budgets[0])
    assert [(0, p.tolist()) for p in plain] == [(b, p.tolist()) for b, p in plan]
    assert [p.tolist() for p in plain] == naive_plan(order, sizes, budgets[0])


def test_large_batches_are_spread_over_the_plan():
    rng = np.random.default_rng(0)
    sizes = sizes_of(np.where(rng.random(3000) < 0.03, 5000, rng.uniform(300, 900, 3000)))
    budgets = choose_budgets(sizes, 4)
    assert len(budgets) > 1
    order = rng.permutation(3000)
    plan = plan_buckets(order, sizes, budgets)
    buckets = np.array([bucket for bucket, _ in plan])
    when = np.flatnonzero(buckets == len(budgets) - 1) / len(plan)
    assert len(when) > 20
    assert 0.4 < when.mean() < 0.6 and when.min() < 0.2 and 0.8 < when.max()
    rank = np.empty(3000, int)
    rank[order] = np.arange(3000)
    moved = np.abs(rank[np.concatenate([indices for _, indices in plan])] - np.arange(3000))
    assert moved.max() < 2 * 256 + 20, "a structure waited, or was drawn, further than the window"


def test_structures_that_fit_into_no_budget_are_reported():
    sizes = Sizes(np.array([3, 50]), np.array([6, 900]))
    budgets = (PaddingBudget(10, 20, 3), PaddingBudget(60, 800, 3))
    with pytest.raises(
        ValueError, match="structure 1 has 50 atoms and 900 edges .* 59 atoms and 800 edges"
    ):
        plan_buckets(np.array([0, 1]), sizes, budgets)
    with pytest.raises(ValueError, match="as large as the one before"):
        plan_buckets(np.array([0]), sizes, budgets[::-1])
    with pytest.raises(ValueError, match="budgets must not be empty"):
        plan_buckets(np.array([0]), sizes, ())


def test_fill_fraction_is_over_all_batches():
    sizes = Sizes(np.array([2, 3, 5]), np.array([2, 6, 20]), np.array([1, 3, 10]))
    budgets = (PaddingBudget(8, 10, 3, 6), PaddingBudget(16, 30, 4, 12))
    plan = [(0, np.array([0, 1])), (1, np.array([2]))]
    assert fill_fraction(plan, sizes, budgets) == {
        "n_node": 10 / 24,
        "n_edge": 28 / 40,
        "n_graph": 3 / 7,
        "n_pair": 14 / 18,
    }
