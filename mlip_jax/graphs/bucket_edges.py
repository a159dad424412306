"""Candidates for the edges of size buckets; `padding.choose_budgets` tries them.

If batches contain few structures, or a few structures are much larger than the others, a single
static shape is mostly padding or contains more structures than requested. Several shapes avoid
both.

    >>> next(candidates(np.array([20, 20, 30, 90]), batch_size=1, num=2))
    BucketEdges(n_edge=(30, 90), single=True)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# _FACTORS: ratios of a single bucket to `batch_size` average structures. With few distinct sizes,
# one of them is close to a sum of sizes.
_FACTORS = (1.0, 1.02, 1.05, 1.08, 1.12, 1.17, 0.97, 0.94, 0.9)
# _FIRST_FACTORS: the same for the smallest of several buckets; it compensates for larger ones.
_FIRST_FACTORS = np.linspace(1.2, 0.4, 33)
# _NEAR: tolerance of the estimated batch size: log of its ratio to the requested one.
_NEAR = np.log(1.1)
# _TRIALS: maximum number of candidates of `_with_larger`; planning each takes most of the time.
_TRIALS = 4
# _GROUPS: maximum number of distinct sizes; time and memory of `partition` are quadratic in it.
_GROUPS = 128
# _DRAWS: number of random sums of sizes; sufficient for the quantiles that four buckets need.
_DRAWS = 2048


class BucketEdges(NamedTuple):
    """Edges of size buckets.

    Attributes:
      n_edge: Directed edges of a batch of each bucket, in ascending order.
      single: Whether every batch contains a single structure.
    """

    n_edge: tuple[int, ...]
    single: bool = False


def candidates(n_edge: np.ndarray, batch_size: float, num: int) -> Iterator[BucketEdges]:
    """Yield candidates with at most `num` buckets that together fit all structures.

    Args:
      n_edge: Directed edges of each structure, shape (S,), not all zero.
      batch_size: Average number of structures per batch, at least 1.
      num: Maximum number of buckets.
    """
    if batch_size < 1.5:
        yield BucketEdges(_ends(partition(*_group_sizes(n_edge), num)), single=True)
    mean_edges, largest = batch_size * n_edge.mean(), n_edge.max()
    if num == 1:
        sizes = [int(np.ceil(max(factor * mean_edges, largest))) for factor in _FACTORS]
        yield from (BucketEdges((edges,)) for edges in dict.fromkeys(sizes))
    else:
        yield from _with_larger(n_edge, batch_size, num)
        if batch_size >= 1.5:
            yield _by_sums(n_edge, round(batch_size), num)


def _with_larger(n_edge: np.ndarray, batch_size: float, num: int) -> Iterator[BucketEdges]:
    """Yield a first bucket for most structures, with num - 1 buckets for those that exceed it.

    Batches of larger buckets contain more structures. The first bucket is chosen such that the
    estimated average batch size is still as requested.
    """
    scored = []
    for factor in _FIRST_FACTORS:
        first = int(np.ceil(factor * batch_size * n_edge.mean()))
        large = n_edge[n_edge > first]
        if len(large):
            ends = partition(*_group_sizes(large), num - 1)
            # Each large structure starts a batch; small ones fill the remaining space.
            edges_of_large = ends[np.searchsorted(ends, large)].sum()
            batches = len(large) + max(n_edge.sum() - edges_of_large, 0) / first
            scored.append(
                (abs(np.log(len(n_edge) / batches / batch_size)), -factor, (first, *_ends(ends)))
            )
    scored.sort()
    best = [f for f in scored if f[0] <= _NEAR] or scored[:1]
    yield from (BucketEdges(edges) for _, _, edges in best[:_TRIALS])


def _by_sums(n_edge: np.ndarray, count: int, num: int) -> BucketEdges:
    """Return the buckets that `count` random structures fill best.

    This candidate is best if there are few distinct sizes or their distribution is skewed.
    """
    sums = np.random.default_rng(0).choice(n_edge, (_DRAWS, count)).sum(axis=1)
    ends = partition(*_group_sizes(sums), num)
    return BucketEdges(_ends(np.maximum(ends, np.where(ends == ends[-1], n_edge.max(), 0))))


def partition(values: np.ndarray, counts: np.ndarray, num: int) -> np.ndarray:
    """Partition values into ranges that minimize the sum of count * upper end.

    Args:
      values: Values in ascending order, shape (V,).
      counts: Number of occurrences of each value, shape (V,).
      num: Maximum number of ranges, at least 1.

    Returns:
      Upper ends of at most `num` ranges, in ascending order.
    """
    # dynamic programming: cost[j] is the minimum for values[:j + 1] with the ranges so far
    before = np.concatenate([[0], np.cumsum(counts)])
    cost, previous = values * before[1:].astype(float), []
    for _ in range(min(num, len(values)) - 1):
        # costs[j, i]: the last range ends at value j, the one before it at value i
        costs = cost[None, :] + values[:, None] * (before[1:, None] - before[None, 1:])
        costs[np.triu_indices(len(values))] = np.inf
        previous.append(costs.argmin(axis=1))
        cost = costs.min(axis=1)
    ends = [len(values) - 1]
    for step in reversed(previous):
        ends.append(step[ends[-1]])
    return values[ends[::-1]]


def _group_sizes(n_edge: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return distinct sizes, ascending, and their counts.

    If there are many sizes, they are rounded up to quantiles.
    """
    values, counts = np.unique(n_edge, return_counts=True)
    if len(values) <= _GROUPS:
        return values, counts
    ends = np.unique(np.quantile(n_edge, np.linspace(0, 1, _GROUPS + 1)[1:], method="higher"))
    return ends, np.bincount(np.searchsorted(ends, values), counts, len(ends)).astype(np.int64)


def _ends(values: np.ndarray) -> tuple[int, ...]:
    """Return values as Python integers."""
    return tuple(int(v) for v in values)
