"""Packing plans: the structures of each padded batch, within one or several padding budgets.

A plan is a pure function of the order of the structures, their sizes and the budgets, so it is
identical in every run and on every host. `plan_buckets` plans one batch at a time:

1. Refill the pool of candidates with the next structures, up to `_WINDOW` of them.
2. Take the smallest bucket that fits the first structure of the pool.
3. Select structures in order while they fit, then the largest ones that fit into the remaining
   space (`_fill_batch`).
4. If the batch is not full (`_FULL`), repeat 3 with buckets up to `_NEAR` times as large and keep
   the fullest batch.
5. Remove the selected structures from the pool.

    >>> sizes = Sizes(n_node=np.array([3, 5, 4, 2]), n_edge=np.array([6, 20, 12, 2]))
    >>> budget = PaddingBudget(n_node=9, n_edge=24, n_graph=4)
    >>> batches = plan_batches(np.array([0, 1, 2, 3]), sizes, budget)
    >>> [batch.tolist() for batch in batches]
    [[0, 2], [1, 3]]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mlip_jax.graphs.shapes import PaddingBudget, Sizes

# _WINDOW: structures that compete for the space that is left in a batch. Of 256, the largest one
# that fits nearly fills it, and the order stays random beyond them.
_WINDOW = 256
# _FULL: fraction of real edges; a batch below it is also tried in larger buckets.
_FULL = 0.95
# _NEAR: maximum ratio of edges of those buckets; larger ones would hold many more structures.
_NEAR = 1.5


def plan_batches(order: np.ndarray, sizes: Sizes, budget: PaddingBudget) -> list[np.ndarray]:
    """Plan batches within one budget; see `plan_buckets`.

    Args:
      order: Indices of structures, shape (W,).
      sizes: Sizes of all structures in the data set.
      budget: Budget of one batch.

    Returns:
      Indices of the structures of each batch. Together the batches contain every structure of
      `order` once, in that order, except that later structures fill the space that a batch has
      left.

    Raises:
      ValueError: A structure does not fit into an empty batch.
    """
    return [indices for _, indices in plan_buckets(order, sizes, (budget,))]


def plan_buckets(
    order: np.ndarray, sizes: Sizes, budgets: Sequence[PaddingBudget]
) -> list[tuple[int, np.ndarray]]:
    """Plan batches within several budgets, the size buckets.

    A batch starts with the first remaining structure, in the smallest bucket that fits it. If that
    bucket would not get full, a slightly larger one is used. So batches of all buckets are mixed in
    the same way as the structures. The other structures of a batch may be large or small.

    Args:
      order: Indices of structures, shape (W,).
      sizes: Sizes of all structures in the data set.
      budgets: Budgets in ascending order: each is at least as large as the one before in every
        number.

    Returns:
      (index of the bucket, indices of the structures) of each batch.

    Raises:
      ValueError: A structure does not fit into an empty batch of the last budget, or the budgets
        are not in ascending order.
    """
    if not budgets or any(
        a > b for low, high in zip(budgets, budgets[1:]) for a, b in zip(low, high)
    ):
        raise ValueError(
            "budgets must not be empty, and each must be at least as large as the one before, "
            f"received {budgets}"
        )
    ordered = sizes.take(order)
    check_sizes(ordered, budgets[-1], lambda s: f"structure {order[s]}")
    needs = np.stack([ordered.n_node, ordered.n_edge, _pairs_or_zero(ordered)])  # (3, W)
    limits = [np.array([b.n_node - 1, b.n_edge, b.n_pair]) for b in budgets]
    nearby = [
        [
            k
            for k in range(first, len(budgets))
            if k == first or budgets[k].n_edge <= _NEAR * budgets[first].n_edge
        ]
        for first in range(len(budgets))
    ]
    # smallest bucket that fits each structure
    smallest = np.argmax(
        [(needs <= limit[:, None]).all(axis=0) for limit in limits], axis=0
    )  # (W,)
    batches, pool, position = [], np.zeros(0, np.int64), 0
    while position < len(order) or len(pool):
        # `pool` contains indices into `order`; see the steps in the module docstring
        fresh = np.arange(position, min(position + _WINDOW - len(pool), len(order)))
        position += len(fresh)
        pool = np.concatenate([pool, fresh])
        best = -1.0
        for k in nearby[smallest[pool[0]]]:
            fitting = np.flatnonzero(smallest[pool] <= k)
            selected = fitting[
                _fill_batch(needs[:, pool[fitting]], limits[k], budgets[k].n_graph - 1)
            ]
            filled = needs[1, pool[selected]].sum() / max(budgets[k].n_edge, 1)
            if filled > best:
                best, bucket, chosen = filled, k, selected
            if filled >= _FULL:
                break
        batches.append((bucket, order[pool[chosen]]))
        pool = np.delete(pool, chosen)
    return batches


def _fill_batch(needs: np.ndarray, limit: np.ndarray, max_structures: int) -> np.ndarray:
    """Select structures of the pool for one batch.

    Structures are taken in order while they fit, then the largest ones that fit into the rest. The
    last structure that fits in order has to compete for its space with all others: with few
    structures per batch this leaves less space empty.

    Args:
      needs: Atoms, edges and pairs of each structure in the pool, shape (3, W).
      limit: Atoms, edges and pairs of the batch, shape (3,).
      max_structures: Maximum number of structures.

    Returns:
      Indices into the pool.
    """
    fits = (np.cumsum(needs, axis=1) <= limit[:, None]).all(axis=0)
    count = len(fits) if fits.all() else max(int(np.argmin(fits)) - 1, 1)
    count = min(count, max_structures)
    free = np.ones(len(fits), bool)
    free[:count] = False  # the first `count` are selected
    limit = limit - needs[:, :count].sum(axis=1)
    selected = list(range(count))
    while len(selected) < max_structures:
        fits = free & (needs <= limit[:, None]).all(axis=0)
        if not fits.any():
            break
        largest = int(np.argmax(np.where(fits, needs[1], -1)))
        selected.append(largest)
        free[largest] = False
        limit = limit - needs[:, largest]
    return np.array(selected, np.int64)


def check_sizes(
    sizes: Sizes, budget: PaddingBudget, name: Callable[[int], str] = "structure {}".format
) -> None:
    """Raise ValueError if a structure exceeds the budget.

    Args:
      sizes: Sizes of the structures.
      budget: Padding budget of a batch.
      name: Function that formats the index of a structure for the message.
    """
    n_pair = _pairs_or_zero(sizes)
    too_large = (
        (sizes.n_node > budget.n_node - 1)
        | (sizes.n_edge > budget.n_edge)
        | (n_pair > budget.n_pair)
    )
    if too_large.any():
        s = int(np.flatnonzero(too_large)[0])
        has, limit = (
            (f", {n_pair[s]} long-range pairs", f", {budget.n_pair} pairs")
            if n_pair.any()
            else ("", "")
        )
        raise ValueError(
            f"{name(s)} has {sizes.n_node[s]} atoms and {sizes.n_edge[s]} edges{has} and does "
            f"not fit into a batch of {budget.n_node - 1} atoms and {budget.n_edge} "
            f"edges{limit}; {too_large.sum()} structures are too large. Increase the batch "
            "size or exclude them with data.max_atoms."
        )


def fill_fraction(
    plan: list[tuple[int, np.ndarray]], sizes: Sizes, budgets: Sequence[PaddingBudget]
) -> dict[str, float]:
    """Compute the fractions of the budgets that are not padding, over all batches of a plan.

    Returns:
      Fractions by field of `PaddingBudget`; "n_pair" only if the budgets have pairs.
    """
    indices_of_plan = np.concatenate([indices for _, indices in plan])
    used = {
        "n_node": sizes.n_node[indices_of_plan].sum(),
        "n_edge": sizes.n_edge[indices_of_plan].sum(),
        "n_graph": len(indices_of_plan),
        "n_pair": _pairs_or_zero(sizes)[indices_of_plan].sum(),
    }
    total = {name: sum(getattr(budgets[bucket], name) for bucket, _ in plan) for name in used}
    return {name: float(used[name] / total[name]) for name in used if total[name]}


def _pairs_or_zero(sizes: Sizes) -> np.ndarray:
    """Return the numbers of long-range pairs, zeros if there are none."""
    return np.zeros(len(sizes.n_node), np.int64) if sizes.n_pair is None else sizes.n_pair
