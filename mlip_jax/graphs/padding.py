"""Choice of padding budgets: static shapes that fit every structure with little padding.

Edges dominate the cost of a batch, so budgets are chosen such that edges fill up first. Atoms,
graphs and long-range pairs get some slack.

    >>> sizes = Sizes(n_node=np.full(100, 9), n_edge=np.full(100, 72))  # 100 molecules with 9 atoms
    >>> choose_budget(sizes, batch_size=10)
    PaddingBudget(n_node=104, n_edge=720, n_graph=16, n_pair=0)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.bucket_edges import BucketEdges, candidates
from mlip_jax.graphs.edge_counts import count_all, count_all_pairs
from mlip_jax.graphs.packing import fill_fraction, plan_buckets
from mlip_jax.graphs.shapes import NODE_MULTIPLE, PaddingBudget, Sizes, round_up

# _NODE_SLACK, _GRAPH_SLACK: maximum ratio of atoms and graphs to those of average structures; large
# batches need less.
_NODE_SLACK, _GRAPH_SLACK = 1.1, 1.5
# _PAIR_SLACK: the same for long-range pairs. Their number is quadratic in the number of atoms, so
# it varies between batches with equal edges.
_PAIR_SLACK = 1.25
# _FINE: granularity of edges and pairs. Budgets are compiled once per run, so it is finer than
# that of size buckets.
_FINE = 16
# _SMALL: number of edges below which budgets are any even number; _FINE would be several percent.
_SMALL = 512
# _SAMPLE: structures from which budgets are chosen; they represent the distribution of sizes well
# enough and take about a second.
_SAMPLE = 20_000
# _TRIAL, _TRIAL_BATCHES: minimum numbers of structures and batches that are planned per candidate.
_TRIAL, _TRIAL_BATCHES = 768, 48
# _WORTH: decrease of the score that justifies compiling one more budget.
_WORTH = 0.01
# _MARGIN: fraction of the allowed waste that the sample may have; other orders are somewhat worse.
_MARGIN = 0.85
# _NEAR_BATCH_SIZE: tolerance of the batch size: log of its ratio to the requested one.
_NEAR_BATCH_SIZE = np.log(1.1)


def graph_sizes(columns: Columns, cutoff: float, long_range_cutoff: float | None = None) -> Sizes:
    """Count atoms, edges and, with a long-range cutoff, pairs of every structure.

    Args:
      columns: Structures.
      cutoff: Cutoff radius (Å).
      long_range_cutoff: Cutoff of long-range pairs (Å), inf for all pairs; None for models without
        them.

    Raises:
      ValueError: The long-range cutoff is infinite and a structure is periodic.
    """
    n_pair = None if long_range_cutoff is None else count_all_pairs(columns, long_range_cutoff)
    return Sizes(
        columns.n_atoms.astype(np.int64), count_all(columns, cutoff).astype(np.int64), n_pair
    )


def choose_budget(sizes: Sizes, batch_size: float) -> PaddingBudget:
    """Choose a budget that fits every structure and about `batch_size` average ones.

    Raises:
      ValueError: There are no structures.
    """
    _check_not_empty(sizes)
    edges = max(int(np.ceil(batch_size * sizes.n_edge.mean())), int(sizes.n_edge.max()), 2)
    return _budget_with_edges(sizes, round_up(edges, _FINE), batch_size)


def choose_budgets(
    sizes: Sizes, batch_size: float, *, max_budgets: int = 4, waste: float = 0.05
) -> tuple[PaddingBudget, ...]:
    """Choose size buckets for `plan_buckets`, in ascending order.

    The last bucket fits every structure. A single bucket is chosen if its batches contain
    `batch_size` structures on average, within a tenth, and at most the fraction `waste` of their
    edges is padding. Otherwise the smallest number of buckets that achieves this is chosen, or the
    buckets that come closest, at most `max_budgets`. The result is found by planning a fixed
    sample, so it depends only on the arguments.

    Args:
      sizes: Sizes of all structures in the data set.
      batch_size: Average number of structures per batch; values below 1 count as 1.
      max_budgets: Maximum number of budgets, at least 1.
      waste: Allowed fraction of padding edges.

    Raises:
      ValueError: There are no structures, or `batch_size` or `max_budgets` is not positive.
    """
    _check_not_empty(sizes)
    if not batch_size > 0 or max_budgets < 1:
        raise ValueError(
            f"batch size and number of budgets must be positive, received {batch_size=} and "
            f"{max_budgets=}"
        )
    if not sizes.n_edge.any():
        return (choose_budget(sizes, batch_size),)
    batch_size = max(batch_size, 1)
    rng = np.random.default_rng(0)
    sample = _draw_sample(sizes, rng)
    trial = max(_TRIAL, int(_TRIAL_BATCHES * batch_size))
    # Small data sets are repeated, so that the score does not depend on how full the last batch is.
    order = np.concatenate([rng.permutation(len(sample.n_edge)) for _ in range(8)])[:trial]
    best, best_score = None, np.inf
    for num in range(1, max_budgets + 1):
        for candidate in candidates(sample.n_edge, batch_size, num):
            for bucket_edges, score in _score(candidate, sample, order, batch_size, waste):
                more = best is not None and len(bucket_edges.n_edge) > len(best.n_edge)
                if score < best_score - (_WORTH if more and score > 0 else 0):
                    best, best_score = bucket_edges, score
            if best_score <= 0:
                return _budgets(sizes, best)
    return _budgets(sizes, best)


def grow_to_fit(budget: PaddingBudget, sizes: Sizes) -> PaddingBudget:
    """Return the budget, enlarged such that each single structure fits into it."""
    if not len(sizes.n_node):
        return budget
    n_pair = budget.n_pair if sizes.n_pair is None else max(budget.n_pair, int(sizes.n_pair.max()))
    return budget._replace(
        n_node=max(budget.n_node, int(sizes.n_node.max()) + 1),
        n_edge=max(budget.n_edge, int(sizes.n_edge.max())),
        n_pair=n_pair,
    )


def _draw_sample(sizes: Sizes, rng: np.random.Generator) -> Sizes:
    """Return the sizes of at most `_SAMPLE` structures, including the one with most edges."""
    if len(sizes.n_edge) <= _SAMPLE:
        return sizes
    drawn = rng.choice(len(sizes.n_edge), _SAMPLE, replace=False)
    drawn[0] = np.argmax(sizes.n_edge)
    return sizes.take(drawn)


def _score(
    bucket_edges: BucketEdges, sizes: Sizes, order: np.ndarray, batch_size: float, waste: float
) -> Iterator[tuple[BucketEdges, float]]:
    """Yield the buckets, then the buckets reduced to the edges that the plan used, with scores.

    A score of 0 meets both the requested batch size and the allowed waste.
    """
    for _ in range(2):
        budgets = _budgets(sizes, bucket_edges)
        plan = plan_buckets(order, sizes, budgets)
        plan = plan[:-1] or plan  # the last batch is rarely full
        used = np.zeros(len(budgets), np.int64)
        for bucket, indices in plan:
            used[bucket] = max(used[bucket], sizes.n_edge[indices].sum())
        count = sum(len(indices) for _, indices in plan) / len(plan)
        excess = 1 - fill_fraction(plan, sizes, budgets)["n_edge"] - _MARGIN * waste
        yield (
            bucket_edges,
            max(excess, 0) + max(abs(np.log(count / batch_size)) - _NEAR_BATCH_SIZE, 0),
        )
        reduced = np.maximum(used, _largest_within(sizes, bucket_edges))
        if (reduced >= 0.995 * np.array([b.n_edge for b in budgets])).all():
            return
        # an unused bucket becomes equal to the one before it, and `unique` drops it
        bucket_edges = bucket_edges._replace(
            n_edge=tuple(np.unique(np.maximum.accumulate(reduced)).tolist())
        )


def _largest_within(sizes: Sizes, bucket_edges: BucketEdges) -> np.ndarray:
    """Return the edges of the largest structure that fits into each bucket."""
    return np.array(
        [sizes.n_edge[sizes.n_edge <= edges].max(initial=2) for edges in bucket_edges.n_edge]
    )


def _budgets(sizes: Sizes, bucket_edges: BucketEdges) -> tuple[PaddingBudget, ...]:
    """Return the budget of each bucket, in ascending order in every number."""
    budgets = []
    for edges in bucket_edges.n_edge:
        edges = round_up(max(edges, 2), _FINE if edges >= _SMALL else 2)
        within = sizes.take(np.flatnonzero(sizes.n_edge <= max(edges, sizes.n_edge.min())))
        mean = within.n_edge.mean()
        budget = _budget_with_edges(within, edges, max(edges / mean, 1) if mean else 1)
        if bucket_edges.single:
            budget = budget._replace(
                n_node=round_up(int(within.n_node.max()) + 1, NODE_MULTIPLE), n_graph=2
            )
        budgets.append(budget)
    return tuple(PaddingBudget(*map(int, b)) for b in np.maximum.accumulate(budgets))


def _budget_with_edges(sizes: Sizes, edges: int, count: float) -> PaddingBudget:
    """Return a budget with `edges` edges that fits about `count` average structures.

    It also fits every single structure.
    """
    # the mean over `count` structures fluctuates by 1 / sqrt(count)
    slack = 1 + 1.5 / np.sqrt(count)
    nodes = (
        max(
            int(np.ceil(count * sizes.n_node.mean() * min(slack, _NODE_SLACK))),
            int(sizes.n_node.max()),
        )
        + 1
    )
    graphs = max(int(np.ceil(count * min(slack, _GRAPH_SLACK))), 1) + 1
    pairs = 0
    if sizes.n_pair is not None:
        pairs = max(
            int(np.ceil(count * sizes.n_pair.mean() * min(slack, _PAIR_SLACK))),
            int(sizes.n_pair.max()),
            1,
        )
    return PaddingBudget(round_up(nodes, NODE_MULTIPLE), edges, graphs, round_up(pairs, _FINE))


def _check_not_empty(sizes: Sizes) -> None:
    if not len(sizes.n_node):
        raise ValueError("a padding budget needs at least one structure")
