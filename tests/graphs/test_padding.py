"""Tests for padding budgets: few shapes, little padding, and the requested batch size."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.graphs.packing import fill_fraction, plan_batches, plan_buckets
from mlip_jax.graphs.padding import choose_budget, choose_budgets, grow_to_fit
from mlip_jax.graphs.shapes import PaddingBudget, Sizes
from tests.graphs.sizes import COUNT, DISTRIBUTIONS, check, distribution, realistic_sizes, sizes_of


def fill(plan, sizes, budget):
    """Return `fill_fraction` of a plan within one budget."""
    return fill_fraction([(0, indices) for indices in plan], sizes, (budget,))


@pytest.mark.parametrize("batch_size", [8, 32, 64, 128])
def test_at_least_nine_edges_in_ten_are_real(batch_size):
    sizes = realistic_sizes()
    budget = choose_budget(sizes, batch_size)
    plan = plan_batches(np.random.default_rng(1).permutation(len(sizes.n_node)), sizes, budget)
    assert fill(plan, sizes, budget)["n_edge"] >= 0.9
    mean = len(sizes.n_node) / len(plan)
    assert 0.7 * batch_size < mean < 1.5 * batch_size


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(np.array([1]), np.array([0])),
        Sizes(np.array([1, 9]), np.array([0, 72])),
        Sizes(np.array([2, 2, 2]), np.array([2, 0, 2])),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2, 1000])
def test_tiny_data_sets_have_a_budget(sizes, batch_size):
    budget = choose_budget(sizes, batch_size)
    plan = plan_batches(np.arange(len(sizes.n_node)), sizes, budget)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(sizes.n_node)))
    assert budget.n_edge >= 2 and budget.n_edge % 2 == 0


def test_no_structures_have_no_budget():
    with pytest.raises(ValueError, match="at least one structure"):
        choose_budget(Sizes(np.zeros(0, int), np.zeros(0, int)), 4)
    assert (
        plan_batches(
            np.zeros(0, int), Sizes(np.zeros(0, int), np.zeros(0, int)), PaddingBudget(8, 16, 3)
        )
        == []
    )


@pytest.mark.parametrize("batch_size", [16, 64])
def test_pairs_leave_the_batches_full_of_edges(batch_size):
    sizes = realistic_sizes()
    order = np.random.default_rng(1).permutation(len(sizes.n_node))
    plain = choose_budget(sizes, batch_size)
    with_pairs = sizes._replace(n_pair=sizes.n_node * (sizes.n_node - 1) // 2)
    budget = choose_budget(with_pairs, batch_size)
    assert budget[:3] == plain[:3] and plain.n_pair == 0
    plan = plan_batches(order, with_pairs, budget)
    shares = fill(plan, with_pairs, budget)
    assert shares["n_edge"] >= 0.88 and shares["n_pair"] >= 0.7
    assert "n_pair" not in fill(plan_batches(order, sizes, plain), sizes, plain)


def test_invalid_arguments_are_listed():
    sizes = Sizes(np.array([3, 50]), np.array([6, 900]))
    for batch_size, most in ((0, 4), (float("nan"), 4), (4, 0)):
        with pytest.raises(
            ValueError, match=f"received batch_size={batch_size} and max_budgets={most}"
        ):
            choose_budgets(sizes, batch_size, max_budgets=most)
    with pytest.raises(ValueError, match="at least one structure"):
        choose_budgets(sizes.take(np.zeros(0, int)), 4)


def test_a_budget_grows_to_fit_every_structure():
    sizes = Sizes(np.array([3, 50]), np.array([6, 90]), np.array([3, 1225]))
    budget = PaddingBudget(60, 100, 5, 1000)
    assert grow_to_fit(budget, sizes) == budget._replace(n_pair=1225)
    assert grow_to_fit(budget, sizes.take(np.zeros(0, int))) == budget
    assert grow_to_fit(PaddingBudget(8, 16, 3), sizes._replace(n_pair=None)) == PaddingBudget(
        51, 90, 3
    )


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("batch_size", [2, 4, 8, 32])
def test_batches_have_the_requested_size_with_little_padding(name, batch_size):
    rng = np.random.default_rng(batch_size)
    sizes = distribution(name, rng)
    budgets = choose_budgets(sizes, batch_size)
    order = rng.permutation(COUNT)
    plan = plan_buckets(order, sizes, budgets)
    check(plan, order, sizes, budgets)
    assert len(plan) == pytest.approx(COUNT / batch_size, rel=0.15)
    assert 1 - fill_fraction(plan, sizes, budgets)["n_edge"] <= 0.05
    assert fill_fraction(plan, sizes, budgets)["n_node"] >= 0.8
    assert len(budgets) <= {"constant": 1, "uniform": 1, "two sizes": 1, "one outlier": 2}.get(
        name, 4
    )
    if name != "log-normal":
        assert budgets[0].n_edge <= 1.2 * batch_size * sizes.n_edge.mean(), "raised by the largest"


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_batches_of_one(name):
    """Even the maximum number of shapes cannot make the padding small, but smaller than one shape
    does.
    """
    rng = np.random.default_rng(3)
    sizes = distribution(name, rng)
    order = rng.permutation(COUNT)
    wasted = []
    for most in (1, 4):
        budgets = choose_budgets(sizes, 1, max_budgets=most)
        plan = plan_buckets(order, sizes, budgets)
        check(plan, order, sizes, budgets)
        wasted.append(1 - fill_fraction(plan, sizes, budgets)["n_edge"])
    assert len(budgets) <= 4 and len(plan) == pytest.approx(COUNT, rel=0.15)
    assert wasted[1] <= max(0.05, wasted[0] / 2)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    spread=st.floats(0, 0.6),
    mean=st.integers(20, 2000),
    batch_size=st.floats(2, 40),
    pairs=st.booleans(),
)
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
    assert 1200 / len(plan) == pytest.approx(
        batch_size, rel=0.2
    )  # a fraction cannot be reached if all are equal
    assert 1 - fill_fraction(plan, sizes, budgets)["n_edge"] <= 0.08


@settings(max_examples=40, deadline=None)
@given(
    n_edge=st.lists(st.integers(0, 300), min_size=1, max_size=40),
    seed=st.integers(0, 99),
    batch_size=st.sampled_from([0.25, 1, 3, 100]),
    most=st.integers(1, 5),
)
def test_few_structures_of_any_size(n_edge, seed, batch_size, most):
    rng = np.random.default_rng(seed)
    n_edge = 2 * np.array(n_edge)
    sizes = Sizes(rng.integers(1, 30, len(n_edge)), n_edge, rng.integers(0, 99, len(n_edge)))
    budgets = choose_budgets(sizes, batch_size, max_budgets=most)
    assert 1 <= len(budgets) <= most
    assert all(a <= b for low, high in itertools.pairwise(budgets) for a, b in zip(low, high))
    order = rng.permutation(len(n_edge))[: rng.integers(1, len(n_edge) + 1)]
    check(plan_buckets(order, sizes, budgets), order, sizes, budgets)
