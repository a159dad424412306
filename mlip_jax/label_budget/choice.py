"""Choice of the structures that are labeled next."""

from __future__ import annotations

import numpy as np

from mlip_jax.datasets.columns import Columns

BOTH, UNCERTAINTY, DIVERSITY, RANDOM = "both", "uncertainty", "diversity", "random"
STRATEGIES = (BOTH, UNCERTAINTY, DIVERSITY, RANDOM)
_BLOCK = 512  # labeled structures whose distances are computed at a time


def choose(
    strategy: str,
    count: int,
    uncertainty: np.ndarray,
    features: np.ndarray,
    labeled: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Choose the candidates to label next and return their indices in the order of the choice.

    "both" assigns each candidate to the nearest structure that is labeled or chosen. One after
    another, it takes a candidate of the cluster with the largest sum of squares of uncertainty times
    distance: the one with the largest product. There is no quota for molecules or conformers.
    "diversity" does the same with distances only.

    Args:
      strategy: "both", "uncertainty" (largest), "diversity" or "random".
      count: Number of candidates to choose; all if there are fewer.
      uncertainty: Uncertainty of the candidates, (S,).
      features: Features of the candidates, (S, F).
      labeled: Features of the labeled structures, (L, F).
      rng: Random generator of "random".
    """
    count = min(count, len(features))
    if strategy == RANDOM:
        return rng.permutation(len(features))[:count]
    if strategy == UNCERTAINTY:
        return np.argsort(-uncertainty, kind="stable")[:count]
    weight = uncertainty if strategy == BOTH else np.ones(len(features))
    points, known = _standardize(features, labeled)
    return _from_largest_clusters(count, np.asarray(weight, np.float64), points, known)


def _standardize(features: np.ndarray, labeled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both sets of features in units of their common spread."""
    together = np.concatenate([features, labeled]).astype(np.float64)
    spread = np.maximum(together.std(axis=0), 1e-6 * max(float(np.abs(together).max()), 1e-12))
    scaled = together / spread
    return scaled[: len(features)], scaled[len(features) :]


def _from_largest_clusters(
    count: int, weight: np.ndarray, points: np.ndarray, known: np.ndarray
) -> np.ndarray:
    """Return the indices of `count` points, each the farthest one of the largest cluster.

    A point belongs to the cluster of the nearest known or chosen point, and the size of a cluster is
    the sum of the squares of its weighted distances. Outliers are small clusters, so a batch
    represents all points (Holzmüller et al., arXiv:2203.09410, method LCMD).
    """
    nearest, center = _nearest_of(points, known)
    chosen: list[int] = []
    free = np.full(len(points), True)
    for number in range(len(known), len(known) + count):
        distance = np.where(free, weight * nearest, 0.0)
        sizes = np.bincount(center, distance**2, minlength=number)
        in_largest = free & (center == int(np.argmax(sizes)))
        if not in_largest.any():  # copies only are left
            in_largest = free
        best = int(np.argmax(np.where(in_largest, distance, -np.inf)))
        chosen.append(best)
        free[best] = False
        to_best = np.linalg.norm(points - points[best], axis=1)
        # the first point replaces the cluster of no center, whose distances of one are no distances
        closer = (to_best < nearest) | (number == 0)
        nearest, center = np.where(closer, to_best, nearest), np.where(closer, number, center)
    return np.array(chosen, np.int64)


def _nearest_of(points: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance to the nearest known point and its index; (1, 0) if there are none."""
    if not len(known):  # one cluster, whose first point is the least certain one
        return np.ones(len(points)), np.zeros(len(points), np.int64)
    nearest, center = np.full(len(points), np.inf), np.zeros(len(points), np.int64)
    for start in range(0, len(known), _BLOCK):
        block = known[start : start + _BLOCK]
        squares = (points**2).sum(1)[:, None] + (block**2).sum(1) - 2 * points @ block.T
        best = squares.argmin(axis=1)
        distance = np.sqrt(np.maximum(squares[np.arange(len(points)), best], 0.0))
        closer = distance < nearest
        nearest = np.where(closer, distance, nearest)
        center = np.where(closer, start + best, center)
    return nearest, center


def choose_first(columns: Columns, count: int, rng: np.random.Generator) -> np.ndarray:
    """Choose random structures without a force field and return their indices.

    Each element is covered first, the rarest one first, because a force field cannot predict
    elements that it never saw. All further structures are random.

    Args:
      columns: Candidates.
      count: Number of structures; all if there are fewer.
      rng: Random generator.
    """
    order = rng.permutation(len(columns)).tolist()
    elements = [
        frozenset(columns.numbers[columns.offsets[k] : columns.offsets[k + 1]].tolist())
        for k in range(len(columns))
    ]
    molecules_of: dict[int, set[str]] = {}
    for k in order:
        for z in elements[k]:
            molecules_of.setdefault(z, set()).add(columns.molecule[k])
    chosen: list[int] = []
    covered: set[int] = set()
    for z in sorted(molecules_of, key=lambda z: (len(molecules_of[z]), z)):
        if z not in covered and len(chosen) < count:
            first = next(k for k in order if z in elements[k])
            chosen.append(first)
            covered |= elements[first]
    taken = set(chosen)
    chosen += [k for k in order if k not in taken][: max(count - len(chosen), 0)]
    return np.array(chosen, np.int64)


def spread_over_molecules(columns: Columns, count: int, rng: np.random.Generator) -> np.ndarray:
    """Choose random structures evenly over the molecules and return their indices.

    Args:
      columns: Candidates.
      count: Number of structures; all if there are fewer.
      rng: Random generator.
    """
    order = rng.permutation(len(columns))
    turn: dict[str, int] = {}
    rank = np.empty(len(columns), np.int64)
    for k in order.tolist():
        rank[k] = turn[columns.molecule[k]] = turn.get(columns.molecule[k], -1) + 1
    return order[np.argsort(rank[order], kind="stable")][:count]
