"""Static shapes: sizes of structures, padding budgets of batches, and size buckets.

JAX compiles a function once per shape, so graphs are padded to a few static shapes:

- `Sizes`: numbers of atoms, edges and pairs of each structure, without padding.
- `PaddingBudget`: static shape of a padded batch. `graphs/padding.py` chooses budgets,
  `graphs/packing.py` plans batches within them, `graphs/batch.py` builds the batches.
- `GrowingBudget`: a padding budget for consecutive calls.
- `SizeBucket` and `SizeBuckets`: static shapes of single structures, as calculators use them.

    >>> round_up(13, 8)
    16
    >>> buckets = SizeBuckets(long_range_cutoff=None)
    >>> buckets.choose(n_node=9, n_edge=50, n_pair=None, periodic=False).budget
    PaddingBudget(n_node=16, n_edge=64, n_graph=2, n_pair=0)
    >>> # a smaller structure fits into the compiled bucket
    >>> buckets.choose(n_node=7, n_edge=42, n_pair=None, periodic=False).budget
    PaddingBudget(n_node=16, n_edge=64, n_graph=2, n_pair=0)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

# BUCKET_GROWTH: ratio of consecutive sizes; at most about a fifth is padding, and 100 to 10,000
# atoms need 21 buckets.
BUCKET_GROWTH = 1.25
# NODE_MULTIPLE: atoms; molecules of up to eight consecutive sizes share a bucket.
NODE_MULTIPLE = 8
# EDGE_MULTIPLE: edges or pairs; keeps the number of edges even (every edge has its reverse) and the
# number of small buckets low.
EDGE_MULTIPLE = 64
# EDGE_SLACK: ratio of edges in a new bucket to those of its first structure; the number of edges
# changes while atoms move.
EDGE_SLACK = 1.1
# MAX_BUCKET_WASTE: ratio of a bucket to a structure above which the structure gets its own bucket.
MAX_BUCKET_WASTE = 3
# CALL_SLACK: growth ratio of a `GrowingBudget`; calls of slowly increasing size need fewer
# compilations.
CALL_SLACK = 1.2
# CALL_MULTIPLE: granularity of every number of a `GrowingBudget`.
CALL_MULTIPLE = 16


class Sizes(NamedTuple):
    """Numbers of atoms, directed edges and long-range pairs of each structure.

    Attributes:
      n_node: Numbers of atoms, shape (S,), int64.
      n_edge: Numbers of directed edges, shape (S,), int64.
      n_pair: Numbers of long-range pairs, shape (S,), int64; None for models without them.
    """

    n_node: np.ndarray
    n_edge: np.ndarray
    n_pair: np.ndarray | None = None

    def take(self, indices: np.ndarray) -> Sizes:
        """Return the sizes of the structures at `indices`."""
        return Sizes(
            *(None if size is None else np.asarray(size[indices], np.int64) for size in self)
        )


class PaddingBudget(NamedTuple):
    """Static shape of a padded batch.

    Attributes:
      n_node: Number of atoms, including at least one padding atom.
      n_edge: Number of directed edges.
      n_graph: Number of structures, including at least one padding graph.
      n_pair: Number of long-range pairs; 0 for models without them.
    """

    n_node: int
    n_edge: int
    n_graph: int
    n_pair: int = 0


def round_up(size: float, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `size`."""
    return int(-(-size // multiple) * multiple)


def bucket_size(size: int, multiple: int) -> int:
    """Return the smallest bucket size of at least `size`.

    Bucket sizes are multiples of `multiple` that grow by about 1.25.
    """
    bucket = multiple
    while bucket < size:
        bucket = round_up(max(int(bucket * BUCKET_GROWTH), bucket + 1), multiple)
    return bucket


class GrowingBudget:
    """Padding budget for consecutive calls that share a compiled program.

    It grows and never shrinks, except that `clear` starts again.

    Args:
      slack: Ratio of a new budget to the required one.
      multiple: Granularity of the numbers of a new budget.
    """

    def __init__(self, slack: float = CALL_SLACK, multiple: int = CALL_MULTIPLE):
        self._slack, self._multiple = slack, multiple
        self._budget: PaddingBudget | None = None

    def fit(self, needed: PaddingBudget) -> PaddingBudget:
        """Return a budget of at least the size of `needed`: the last one if it is large enough."""
        if self._budget is None or any(a > b for a, b in zip(needed, self._budget)):
            grown = PaddingBudget(
                *(math.ceil(self._slack * n / self._multiple) * self._multiple for n in needed)
            )
            self._budget = (
                grown
                if self._budget is None
                else PaddingBudget(*map(max, zip(grown, self._budget)))
            )
        return self._budget

    def clear(self) -> None:
        """Forget the budget."""
        self._budget = None


class SizeBucket(NamedTuple):
    """Static shape of a single padded structure.

    Attributes:
      budget: Budget of the structure and a padding graph; its number of edges is even.
      periodic: Whether there are a cell and shifts.
      long_range: Whether there is a list of long-range pairs.
    """

    budget: PaddingBudget
    periodic: bool = False
    long_range: bool = False


class SizeBuckets:
    """Size buckets in use. Each is compiled once and serves all structures that fit into it.

    Args:
      long_range_cutoff: Cutoff of long-range pairs (Å), inf for all pairs; None for a force field
        without them.
    """

    def __init__(self, long_range_cutoff: float | None):
        self._long_range_cutoff = long_range_cutoff
        self._buckets: set[SizeBucket] = set()

    def choose(self, n_node: int, n_edge: int, n_pair: int | None, periodic: bool) -> SizeBucket:
        """Return the tightest bucket that fits the structure and is not much too large.

        If there is none in use, a new bucket is created.

        Args:
          n_node: Number of atoms, without padding.
          n_edge: Number of directed edges.
          n_pair: Number of long-range pairs; None if there is no list of them.
          periodic: Whether the structure has a cell.
        """
        fitting = [b for b in self._buckets if _suits(b, n_node + 1, n_edge, n_pair, periodic)]
        if fitting:
            return min(fitting, key=lambda b: (b.budget.n_edge, b.budget.n_pair, b.budget.n_node))
        nodes, edges = bucket_size(n_node + 1, NODE_MULTIPLE), int(np.ceil(n_edge * EDGE_SLACK))
        if not periodic:
            edges = min(edges, n_node * (n_node - 1))
        pairs = 0 if n_pair is None else self._pair_capacity(n_node, nodes, n_pair, periodic)
        budget = PaddingBudget(nodes, bucket_size(edges, EDGE_MULTIPLE), 2, pairs)
        bucket = SizeBucket(budget, periodic, n_pair is not None)
        self._buckets.add(bucket)
        return bucket

    def _pair_capacity(self, n_node: int, nodes: int, n_pair: int, periodic: bool) -> int:
        """Return the number of long-range pairs of a new bucket."""
        if np.isinf(self._long_range_cutoff) and not periodic:
            pairs = (
                (nodes - 1) * (nodes - 2) // 2
            )  # all pairs of any structure with at most nodes - 1 atoms
        else:
            pairs = int(np.ceil(n_pair * EDGE_SLACK))
            pairs = pairs if periodic else min(pairs, n_node * (n_node - 1) // 2)
        return bucket_size(pairs, EDGE_MULTIPLE)


def _suits(bucket: SizeBucket, nodes: int, n_edge: int, n_pair: int | None, periodic: bool) -> bool:
    """Return whether a structure with `nodes` atoms, including padding, fits with little waste."""
    has = bucket.budget
    return (
        bucket.periodic == periodic
        and nodes <= has.n_node <= MAX_BUCKET_WASTE * nodes
        and n_edge <= has.n_edge <= MAX_BUCKET_WASTE * n_edge
        and (n_pair is None or n_pair <= has.n_pair <= MAX_BUCKET_WASTE**2 * n_pair)
    )
