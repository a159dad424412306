"""Buckets: few shapes for structures of all sizes, with as many of them in a batch as were asked for."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.graphs.batching import Budget, Sizes, choose_budgets, fill_buckets, plan_buckets, plan_window
from mlip_jax.graphs.capacities import candidates, partition

COUNT = 2400


def sizes_of(n_edge) -> Sizes:
    """Atoms that go with these edges about as those of molecules do."""
    n_edge = 2 * np.maximum(np.asarray(n_edge) / 2, 1).astype(np.int64)
    return Sizes(np.maximum(n_edge**0.6, 2).astype(np.int64), n_edge)


def distribution(name, rng) -> Sizes:
    """Mean some 600 edges, but for that of the outlier."""
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


DISTRIBUTIONS = ("constant", "uniform", "log-normal", "two sizes", "lopsided", "one outlier")


def check(plan, order, sizes, budgets):
    """Every structure once, no batch beyond its budget."""
    assert sorted(np.concatenate([places for _, places in plan]).tolist()) == sorted(order.tolist())
    for bucket, places in plan:
        assert 0 < len(places) <= budgets[bucket].graphs - 1
        assert sizes.n_node[places].sum() <= budgets[bucket].nodes - 1
        assert sizes.n_edge[places].sum() <= budgets[bucket].edges
        assert sizes.n_pair is None or sizes.n_pair[places].sum() <= budgets[bucket].pairs


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("batch_size", [2, 4, 8, 32])
def test_batches_hold_what_was_asked_for_with_little_padding(name, batch_size):
    rng = np.random.default_rng(batch_size)
    sizes = distribution(name, rng)
    budgets = choose_budgets(sizes, batch_size)
    order = rng.permutation(COUNT)
    plan = plan_buckets(order, sizes, budgets)
    check(plan, order, sizes, budgets)
    assert len(plan) == pytest.approx(COUNT / batch_size, rel=0.15)
    assert 1 - fill_buckets(plan, sizes, budgets)["edges"] <= 0.05
    assert fill_buckets(plan, sizes, budgets)["nodes"] >= 0.8
    assert len(budgets) <= {"constant": 1, "uniform": 1, "two sizes": 1, "one outlier": 2}.get(name, 4)
    if name != "log-normal":
        assert budgets[0].edges <= 1.2 * batch_size * sizes.n_edge.mean(), "raised by the largest"


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_batches_of_one(name):
    """As many shapes as there may be cannot make the padding small, but smaller than one shape does."""
    rng = np.random.default_rng(3)
    sizes = distribution(name, rng)
    order = rng.permutation(COUNT)
    wasted = []
    for most in (1, 4):
        budgets = choose_budgets(sizes, 1, most=most)
        plan = plan_buckets(order, sizes, budgets)
        check(plan, order, sizes, budgets)
        wasted.append(1 - fill_buckets(plan, sizes, budgets)["edges"])
    assert len(budgets) <= 4 and len(plan) == pytest.approx(COUNT, rel=0.15)
    assert wasted[1] <= max(0.05, wasted[0] / 2)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), spread=st.floats(0, 0.6), mean=st.integers(20, 2000), batch_size=st.floats(2, 40),
       pairs=st.booleans())
def test_any_spread_of_sizes(seed, spread, mean, batch_size, pairs):
    rng = np.random.default_rng(seed)
    sizes = sizes_of(mean * np.exp(spread * rng.normal(size=1200)))
    if pairs:
        sizes = sizes._replace(n_pair=sizes.n_node * (sizes.n_node - 1) // 2)
    budgets = choose_budgets(sizes, batch_size)
    assert budgets == choose_budgets(sizes, batch_size)
    order = rng.permutation(1200)
    plan = plan_buckets(order, sizes, budgets)
    check(plan, order, sizes, budgets)
    assert 1200 / len(plan) == pytest.approx(batch_size, rel=0.2)  # a fraction cannot be met where all are alike
    assert 1 - fill_buckets(plan, sizes, budgets)["edges"] <= 0.08


@settings(max_examples=40, deadline=None)
@given(n_edge=st.lists(st.integers(0, 300), min_size=1, max_size=40), seed=st.integers(0, 99),
       batch_size=st.sampled_from([0.25, 1, 3, 100]), most=st.integers(1, 5))
def test_few_structures_of_any_size(n_edge, seed, batch_size, most):
    rng = np.random.default_rng(seed)
    n_edge = 2 * np.array(n_edge)
    sizes = Sizes(rng.integers(1, 30, len(n_edge)), n_edge, rng.integers(0, 99, len(n_edge)))
    budgets = choose_budgets(sizes, batch_size, most=most)
    assert 1 <= len(budgets) <= most
    assert all(a <= b for low, high in itertools.pairwise(budgets) for a, b in zip(low, high))
    order = rng.permutation(len(n_edge))[:rng.integers(1, len(n_edge) + 1)]
    check(plan_buckets(order, sizes, budgets), order, sizes, budgets)


def naive_plan(order, sizes, budget, window=256):
    """One bucket, a structure at a time: in order but for the last, then the largest that fit."""
    left, batches = list(order), []

    def fits(batch):
        return sizes.n_edge[batch].sum() <= budget.edges and sizes.n_node[batch].sum() < budget.nodes

    while left:
        pool, count = left[:window], 1
        while count < len(pool) and fits(pool[:count + 1]):
            count += 1
        batch = pool[:count if count == len(pool) else max(count - 1, 1)][:budget.graphs - 1]
        while len(batch) < budget.graphs - 1:
            gap = [s for s in pool if s not in batch and fits([*batch, s])]
            if not gap:
                break
            batch.append(max(gap, key=lambda s: sizes.n_edge[s]))
        left = [s for s in left if s not in batch]
        batches.append(batch)
    return batches


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
def test_one_bucket_is_the_plain_plan(batch_size):
    rng = np.random.default_rng(batch_size)
    sizes = sizes_of(rng.uniform(2, 900, 400))
    budgets = choose_budgets(sizes, batch_size, most=1)
    order = rng.permutation(400)
    plan = plan_buckets(order, sizes, budgets)
    plain = plan_window(order, sizes, budgets[0])
    assert [(0, p.tolist()) for p in plain] == [(b, p.tolist()) for b, p in plan]
    assert [p.tolist() for p in plain] == naive_plan(order, sizes, budgets[0])


def test_large_batches_come_among_the_others():
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
    place = np.empty(3000, int)
    place[order] = np.arange(3000)
    moved = np.abs(place[np.concatenate([places for _, places in plan])] - np.arange(3000))
    assert moved.max() < 2 * 256 + 20, "a structure waited, or was drawn, further than the window"


def test_structures_that_fit_into_no_budget_are_named():
    sizes = Sizes(np.array([3, 50]), np.array([6, 900]))
    budgets = (Budget(10, 20, 3), Budget(60, 800, 3))
    with pytest.raises(ValueError, match="structure 1 has 50 atoms and 900 edges .* 59 atoms and 800 edges"):
        plan_buckets(np.array([0, 1]), sizes, budgets)
    with pytest.raises(ValueError, match="as large as the one before"):
        plan_buckets(np.array([0]), sizes, budgets[::-1])
    with pytest.raises(ValueError, match="one or more budgets"):
        plan_buckets(np.array([0]), sizes, ())
    for batch_size, most in ((0, 4), (float("nan"), 4), (4, 0)):
        with pytest.raises(ValueError, match=f"received batch_size={batch_size} and most={most}"):
            choose_budgets(sizes, batch_size, most=most)
    with pytest.raises(ValueError, match="at least one structure"):
        choose_budgets(sizes.take(np.zeros(0, int)), 4)


def test_fill_is_that_of_all_batches():
    sizes = Sizes(np.array([2, 3, 5]), np.array([2, 6, 20]), np.array([1, 3, 10]))
    budgets = (Budget(8, 10, 3, 6), Budget(16, 30, 4, 12))
    plan = [(0, np.array([0, 1])), (1, np.array([2]))]
    assert fill_buckets(plan, sizes, budgets) == {"nodes": 10 / 24, "edges": 28 / 40, "graphs": 3 / 7, "pairs": 14 / 18}


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(1, 50), min_size=1, max_size=8, unique=True), num=st.integers(1, 4),
       seed=st.integers(0, 99))
def test_partition_is_the_best_of_all(values, num, seed):
    values = np.array(sorted(values))
    counts = np.random.default_rng(seed).integers(1, 9, len(values))

    def cost(ends):
        return (counts * np.array(ends)[np.searchsorted(ends, values)]).sum()

    found = partition(values, counts, num)
    choices = [(*chosen, values[-1]) for k in range(min(num, len(values)))
               for chosen in itertools.combinations(values[:-1], k)]
    assert len(found) <= num and found[-1] == values[-1]
    assert cost(found) == min(map(cost, choices))


@settings(max_examples=30, deadline=None)
@given(n_edge=st.lists(st.integers(0, 400), min_size=1, max_size=200), batch_size=st.floats(1, 60),
       num=st.integers(1, 4))
def test_candidates_ascend_and_hold_all(n_edge, batch_size, num):
    n_edge = 2 * np.array([*n_edge, 1])
    for edges, _ in candidates(n_edge, batch_size, num):
        assert 1 <= len(edges) <= num and list(edges) == sorted(edges) and edges[-1] >= n_edge.max()
