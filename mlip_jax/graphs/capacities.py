"""How many edges the batches of each bucket should have room for, given how many the structures have.

Where a batch holds few structures, or a few structures are much larger than the others, one static shape is either
mostly padding or holds more structures than were asked for. The candidates made here are tried by `choose_budgets`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# Of a single capacity to that of so many average structures: sums of few discrete sizes are met by one or the other.
_FACTORS = (1.0, 1.02, 1.05, 1.08, 1.12, 1.17, 0.97, 0.94, 0.9)
# The same for the smallest of several: it makes up for the larger ones.
_FIRST_FACTORS = np.linspace(1.2, 0.4, 33)
_NEAR = np.log(1.1)
_TRIALS = 4
_GROUPS = 128
_DRAWS = 2048


class Capacities(NamedTuple):
    """Attributes: edges: Of each bucket, ascending. alone: No batch holds more than one structure."""

    edges: tuple[int, ...]
    alone: bool = False


def candidates(n_edge: np.ndarray, batch_size: float, num: int) -> Iterator[Capacities]:
    """At most `num` capacities that together hold all structures, for batches of about `batch_size` of them.

    Args:
      n_edge: Directed edges of each structure, (S,), some of them not zero.
      batch_size: Structures that a batch shall hold on average, at least 1.
      num: Of buckets.
    """
    if batch_size < 1.5:
        yield Capacities(_ends(partition(*_grouped(n_edge), num)), alone=True)
    wanted, largest = batch_size * n_edge.mean(), n_edge.max()
    if num == 1:
        tried = [int(np.ceil(max(factor * wanted, largest))) for factor in _FACTORS]
        yield from (Capacities((edges,)) for edges in dict.fromkeys(tried))
    else:
        yield from _with_larger(n_edge, batch_size, num)
        if batch_size >= 1.5:
            yield _by_sums(n_edge, round(batch_size), num)


def _with_larger(n_edge: np.ndarray, batch_size: float, num: int) -> Iterator[Capacities]:
    """A first capacity for most structures, and num - 1 for those that do not fit into it.

    Those of larger buckets hold more structures; how much smaller the first one has to be for it is estimated.
    """
    found = []
    for factor in _FIRST_FACTORS:
        first = int(np.ceil(factor * batch_size * n_edge.mean()))
        large = n_edge[n_edge > first]
        if len(large):
            ends = partition(*_grouped(large), num - 1)
            # Each large structure begins a batch; what else these have room for is filled with small ones.
            held = ends[np.searchsorted(ends, large)].sum()
            batches = len(large) + max(n_edge.sum() - held, 0) / first
            found.append((abs(np.log(len(n_edge) / batches / batch_size)), -factor, (first, *_ends(ends))))
    found.sort()
    near = [f for f in found if f[0] <= _NEAR] or found[:1]
    yield from (Capacities(edges) for _, _, edges in near[:_TRIALS])


def _by_sums(n_edge: np.ndarray, count: int, num: int) -> Capacities:
    """Those that `count` structures, drawn at random, fill best: where sizes are few or lopsided."""
    sums = np.random.default_rng(0).choice(n_edge, (_DRAWS, count)).sum(axis=1)
    ends = partition(*_grouped(sums), num)
    return Capacities(_ends(np.maximum(ends, np.where(ends == ends[-1], n_edge.max(), 0))))


def partition(values: np.ndarray, counts: np.ndarray, num: int) -> np.ndarray:
    """Upper ends of at most `num` ranges of ascending values, such that the sum of count * upper end is least.

    Args:
      values: Ascending, (V,). counts: How often each occurs, (V,). num: Of ranges, at least 1.
    """
    before = np.concatenate([[0], np.cumsum(counts)])
    cost, previous = values * before[1:].astype(float), []
    for _ in range(min(num, len(values)) - 1):
        # [j, i]: the range ends at value j, the one before it at i
        costs = cost[None, :] + values[:, None] * (before[1:, None] - before[None, 1:])
        costs[np.triu_indices(len(values))] = np.inf
        previous.append(costs.argmin(axis=1))
        cost = costs.min(axis=1)
    ends = [len(values) - 1]
    for step in reversed(previous):
        ends.append(step[ends[-1]])
    return values[ends[::-1]]


def _grouped(n_edge: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending sizes and how often they occur; where they are many, rounded up to the next of some quantiles."""
    values, counts = np.unique(n_edge, return_counts=True)
    if len(values) <= _GROUPS:
        return values, counts
    ends = np.unique(np.quantile(n_edge, np.linspace(0, 1, _GROUPS + 1)[1:], method="higher"))
    return ends, np.bincount(np.searchsorted(ends, values), counts, len(ends)).astype(np.int64)


def _ends(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(v) for v in values)
