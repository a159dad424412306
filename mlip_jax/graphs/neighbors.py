"""Neighbour lists on the host: all pairs within a cutoff, open or periodic boundaries, never truncated.

A list is directed (each pair stands in it twice), sorted by receiver, and comes with `pair_order`: a
permutation of the edges whose first half names one edge of every pair and whose second half the reverse of
each. What is the same for i -> j and j -> i is computed once, on the first half.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np

# Above this many atoms a k-d tree beats the dense distance matrix.
_DENSE_LIMIT = 160


class Neighbors(NamedTuple):
    """Directed edges of one structure, sorted by receiver.

    Attributes:
      receivers, senders: Shape (n_edge,), int32. `displacement = positions[senders] - positions[receivers]
        + shifts @ cell` is shorter than the cutoff.
      shifts: Lattice translations of the sender, shape (n_edge, 3), int32; None without periodicity.
      pair_order: Shape (n_edge,), int32: edge ids, pair_order[p] and pair_order[n_edge // 2 + p] are each
        other's reverse.
    """

    receivers: np.ndarray
    senders: np.ndarray
    shifts: np.ndarray | None
    pair_order: np.ndarray


def neighbor_list(positions: np.ndarray, cutoff: float, cell: np.ndarray | None = None,
                  pbc: np.ndarray | None = None) -> Neighbors:
    """All directed pairs closer than `cutoff`.

    Args:
      positions: Shape (n_atoms, 3), Å.
      cutoff: Å.
      cell: Lattice vectors as rows, shape (3, 3), Å; needed where `pbc` is true.
      pbc: Shape (3,), bool, or None.

    Raises:
      ValueError: Positions or cell are not finite, or a periodic direction has no lattice vector.
    """
    positions = np.asarray(positions, np.float64)
    if not np.isfinite(positions).all():
        raise ValueError("positions hold NaN or infinite values; no neighbour list can be made of them")
    if pbc is not None and np.any(pbc):
        return _periodic(positions, cutoff, np.asarray(cell, np.float64), np.asarray(pbc, bool))
    if len(positions) <= _DENSE_LIMIT:
        return _dense(positions, cutoff)
    return _tree(positions, cutoff)


def count_edges(positions: np.ndarray, cutoff: float, cell=None, pbc=None) -> int:
    """Number of directed edges within `cutoff`, cheaper than the list itself for small open structures."""
    if (pbc is not None and np.any(pbc)) or len(positions) > _DENSE_LIMIT:
        return len(neighbor_list(positions, cutoff, cell, pbc).senders)
    return int((_squared_distances(np.asarray(positions, np.float64)) < cutoff * cutoff).sum()) - len(positions)


def _squared_distances(positions: np.ndarray) -> np.ndarray:
    # Differences, not the Gram matrix: |a|²+|b|²-2ab loses digits right at the cutoff.
    x = np.ascontiguousarray(positions.T)
    d = x[:, :, None] - x[:, None, :]
    d *= d
    total = d[0]
    total += d[1]
    total += d[2]
    return total


@functools.lru_cache(maxsize=64)
def _pairs_of(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and mirrored place of every place in an (n, n) matrix, int32."""
    place = np.arange(n * n, dtype=np.int32)
    row, column = np.divmod(place, np.int32(max(n, 1)))
    return row, column, column * np.int32(n) + row


def _dense(positions: np.ndarray, cutoff: float) -> Neighbors:
    n = len(positions)
    close = _squared_distances(positions) < cutoff * cutoff
    close.ravel()[::n + 1] = False
    places = np.flatnonzero(close)
    row, column, mirrored = _pairs_of(n)
    receivers, senders = row[places], column[places]
    edge_at = np.empty(n * n, np.int32)
    edge_at[places] = np.arange(len(places), dtype=np.int32)
    forward = np.flatnonzero(receivers < senders)
    reverse = edge_at[mirrored[places[forward]]]
    return Neighbors(receivers, senders, None, np.concatenate([forward.astype(np.int32), reverse]))


def _tree(positions: np.ndarray, cutoff: float) -> Neighbors:
    from scipy.spatial import cKDTree
    n = len(positions)
    pairs = cKDTree(positions).query_pairs(cutoff, output_type="ndarray")
    # query_pairs includes the cutoff itself
    d = positions[pairs[:, 0]] - positions[pairs[:, 1]]
    pairs = pairs[np.einsum("ij,ij->i", d, d) < cutoff * cutoff]
    flat = np.sort(np.concatenate([pairs[:, 0] * n + pairs[:, 1], pairs[:, 1] * n + pairs[:, 0]]))
    receivers, senders = (a.astype(np.int32) for a in np.divmod(flat, n))
    return Neighbors(receivers, senders, None, _pair_order_open(receivers, senders, n))


def _pair_order_open(receivers: np.ndarray, senders: np.ndarray, n: int) -> np.ndarray:
    key = receivers.astype(np.int64) * n + senders
    forward = np.flatnonzero(receivers < senders)
    reverse = np.searchsorted(key, senders[forward].astype(np.int64) * n + receivers[forward])
    return np.concatenate([forward, reverse]).astype(np.int32)


def _periodic(positions, cutoff, cell, pbc) -> Neighbors:
    if cell.shape != (3, 3) or not np.isfinite(cell).all():
        raise ValueError(f"a periodic structure needs a finite cell of shape (3, 3), received {cell!r}")
    if (np.linalg.norm(cell, axis=1)[pbc] < 1e-9).any():
        raise ValueError(f"pbc is {pbc.tolist()} but a periodic direction has no lattice vector: {cell.tolist()}")
    from scipy.spatial import cKDTree
    full = _completed_cell(cell, pbc)
    if abs(np.linalg.det(full)) < 1e-9:
        raise ValueError(f"the lattice vectors {cell.tolist()} lie in one plane; they span no cell")
    inverse = np.linalg.inv(full)
    offset = np.where(pbc, np.floor(positions @ inverse), 0.0)
    wrapped = positions - offset @ full
    # How far the images must reach: the planes of the lattice stand 1/|reciprocal vector| apart.
    reach = np.where(pbc, np.ceil(cutoff * np.linalg.norm(inverse, axis=0)), 0).astype(int)
    images = np.array(list(itertools.product(*(range(-r, r + 1) for r in reach))), np.int64)
    ghosts = (wrapped[None] + (images @ full)[:, None]).reshape(-1, 3)
    hits = cKDTree(wrapped).query_ball_tree(cKDTree(ghosts), cutoff)
    n = len(positions)
    receivers = np.repeat(np.arange(n), [len(h) for h in hits])
    ghost = np.concatenate([np.asarray(h, np.int64) for h in hits]) if len(receivers) else np.zeros(0, np.int64)
    image, senders = np.divmod(ghost, n)
    shifts = images[image]
    d = ghosts[ghost] - wrapped[receivers]
    keep = (np.einsum("ij,ij->i", d, d) < cutoff * cutoff) & ((receivers != senders) | shifts.any(1))
    receivers, senders, shifts = receivers[keep], senders[keep], shifts[keep]
    # from the wrapped atoms' images to those of the atoms as given
    shifts = shifts - (offset[senders] - offset[receivers]).astype(np.int64)
    return _sorted_periodic(receivers, senders, shifts)


def _completed_cell(cell, pbc):
    """The cell with orthonormal vectors in place of the directions that are not periodic."""
    full = np.array(cell)
    if not pbc.all():
        _, _, basis = np.linalg.svd(full[pbc])
        full[~pbc] = basis[pbc.sum():]
    return full


def _sorted_periodic(receivers, senders, shifts) -> Neighbors:
    order = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], senders, receivers))
    receivers, senders, shifts = receivers[order], senders[order], shifts[order]
    # The reverse of (i, j, s) is (j, i, -s): sorting both keys gives the reverse of each edge.
    mirrored = np.lexsort((-shifts[:, 2], -shifts[:, 1], -shifts[:, 0], receivers, senders))
    reverse = np.empty(len(receivers), np.int64)
    reverse[mirrored] = np.arange(len(receivers))
    forward = np.flatnonzero(np.arange(len(receivers)) < reverse)
    return Neighbors(receivers.astype(np.int32), senders.astype(np.int32), shifts.astype(np.int32),
                     np.concatenate([forward, reverse[forward]]).astype(np.int32))
