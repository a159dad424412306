"""Neighbor lists on the host: all pairs within a cutoff, for open or periodic boundaries.

A list is never truncated. It is directed (each pair appears twice), sorted by receiver, and comes
with `pair_order`: a permutation of the edges whose first half has one edge of every pair and whose
second half has the reverse of each. Quantities that are equal for i -> j and j -> i are computed
once, on the first half. Long-range lists contain every pair once.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np

from mlip_jax import limits
from mlip_jax.graphs.long_range import find_lattice_obstacle, in_cells

# DENSE_LIMIT: number of atoms above which a k-d tree is faster than the dense distance matrix.
DENSE_LIMIT = 160
# TREE_LIMIT: the same for long-range lists, in which most pairs are close.
TREE_LIMIT = 4000
# BLOCK: size (rows times columns) of the blocks of the distance matrix for long-range lists.
BLOCK = 1 << 18


class Neighbors(NamedTuple):
    """Directed edges of one structure, sorted by receiver.

    `positions[senders] - positions[receivers] + shifts @ cell` is shorter than the cutoff.

    Attributes:
      receivers: Index of the receiving atom of each edge, shape (n_edge,), int32.
      senders: Index of the sending atom of each edge, shape (n_edge,), int32.
      shifts: Lattice translations of the sender, shape (n_edge, 3), int32; None for open
        boundaries.
      pair_order: Indices of edges, shape (n_edge,), int32. The edges pair_order[p] and
        pair_order[n_edge // 2 + p] are each other's reverse.
    """

    receivers: np.ndarray
    senders: np.ndarray
    shifts: np.ndarray | None
    pair_order: np.ndarray


def neighbor_list(
    positions: np.ndarray,
    cutoff: float,
    cell: np.ndarray | None = None,
    pbc: np.ndarray | None = None,
) -> Neighbors:
    """Find all directed pairs closer than `cutoff`.

    Args:
      positions: Positions (Å), shape (n_atoms, 3).
      cutoff: Cutoff radius (Å).
      cell: Lattice vectors as rows (Å), shape (3, 3); required if a direction is periodic.
      pbc: Periodicity along each lattice vector, shape (3,), bool; None for open boundaries.

    Raises:
      ValueError: Positions or cell are not finite, or a periodic direction has no lattice vector.
    """
    positions = np.asarray(positions, np.float64)
    if not np.isfinite(positions).all():
        raise ValueError("positions contain NaN or infinite values: cannot build a neighbor list")
    if pbc is not None and np.any(pbc):
        return _periodic(positions, cutoff, np.asarray(cell, np.float64), np.asarray(pbc, bool))
    if len(positions) <= DENSE_LIMIT:
        return dense_list(positions, cutoff)
    return tree_list(positions, cutoff)


def count_edges(positions: np.ndarray, cutoff: float, cell=None, pbc=None) -> int:
    """Count the directed edges within `cutoff`.

    For small open structures this is faster than building the list.
    """
    if (pbc is not None and np.any(pbc)) or len(positions) > DENSE_LIMIT:
        return len(neighbor_list(positions, cutoff, cell, pbc).senders)
    return int(
        (_squared_distances(np.asarray(positions, np.float64)) < cutoff * cutoff).sum()
    ) - len(positions)


def long_range_list(
    positions: np.ndarray,
    cutoff: float,
    cell: np.ndarray | None = None,
    pbc: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Find every pair closer than `cutoff` once, including pairs of an atom and its own image.

    Args:
      positions, cell, pbc: See `neighbor_list`.
      cutoff: Cutoff radius (Å); inf for all pairs of an open structure; or a `LatticeSumCutoff`.

    Returns:
      (receivers, senders, shifts). Receivers and senders have shape (n_pair,), int32, with
      receivers ascending. Shifts have shape (n_pair, 3), int32, or are None for open boundaries, as
      in `Neighbors`. The arrays may be cached: callers must not modify them.

    Raises:
      ValueError: See `neighbor_list`; or the cutoff does not suit the cell, for example since it is
        infinite and the structure is periodic.
    """
    positions = np.asarray(positions, np.float64)
    if not np.isfinite(positions).all():
        raise ValueError("positions contain NaN or infinite values: cannot build a long-range list")
    if pbc is not None and np.any(pbc):
        if reason := find_lattice_obstacle(cutoff, cell, pbc):
            raise ValueError(reason)
        return _periodic_half(
            positions, in_cells(cutoff), np.asarray(cell, np.float64), np.asarray(pbc, bool)
        )
    if np.isinf(cutoff):
        return *_all_pairs(len(positions)), None
    if len(positions) <= DENSE_LIMIT:
        return *select_close_pairs(positions, cutoff), None
    if len(positions) <= TREE_LIMIT:
        return *dense_pairs(positions, cutoff), None
    return *tree_pairs(positions, cutoff), None


def _all_pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return receivers and senders of all pairs i < j, int32."""
    return _cached_pairs(n) if n <= DENSE_LIMIT else _build_pairs(n)


def _build_pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    receivers = np.repeat(np.arange(n, dtype=np.int32), np.arange(n - 1, -1, -1)[:n])
    senders = np.arange(len(receivers), dtype=np.int32)
    # row i starts at index i * (2 n - i - 1) / 2 with column i + 1
    row = np.arange(n, dtype=np.int64)
    first = row * (2 * n - row - 1) // 2
    return receivers, (senders - (first - row - 1)[receivers]).astype(np.int32)


@functools.lru_cache(maxsize=64)
def _cached_pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the cached, read-only result of `_build_pairs`."""
    pairs = _build_pairs(n)
    for array in pairs:
        array.flags.writeable = False
    return pairs


def select_close_pairs(positions: np.ndarray, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the close pairs of a small open structure."""
    i, j = _cached_pairs(len(positions))
    x = np.ascontiguousarray(positions.T)
    close = _squares(x.take(i, axis=1) - x.take(j, axis=1)) < cutoff * cutoff
    return (i, j) if close.all() else (i[close], j[close])


def dense_pairs(positions: np.ndarray, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the close pairs of an open structure by distance matrices in blocks of rows."""
    n, x = len(positions), np.ascontiguousarray(positions.T)
    receivers, senders, start = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], 0
    while start < n - 1:
        stop = min(n - 1, start + max(1, BLOCK // (n - start)))
        d = x[:, start:stop, None] - x[:, None, start + 1 :]
        row, column = np.divmod(
            np.flatnonzero(_squares(d) < cutoff * cutoff).astype(np.int32), n - start - 1
        )
        upper = column >= row
        receivers.append(row[upper] + np.int32(start))
        senders.append(column[upper] + np.int32(start + 1))
        start = stop
    return np.concatenate(receivers), np.concatenate(senders)


def _squares(d: np.ndarray) -> np.ndarray:
    """Compute d[0]² + d[1]² + d[2]² in the memory of d.

    The order of the sum is the same everywhere, so all lists and counts agree to the last bit.
    """
    d *= d
    total = d[0]
    total += d[1]
    total += d[2]
    return total


def _squared_distances(positions: np.ndarray) -> np.ndarray:
    # Differences instead of the Gram matrix: |a|²+|b|²-2ab loses digits right at the cutoff.
    x = np.ascontiguousarray(positions.T)
    return _squares(x[:, :, None] - x[:, None, :])


@functools.lru_cache(maxsize=64)
def _pairs_of(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return row, column and transposed index of every element of an (n, n) matrix, int32."""
    index = np.arange(n * n, dtype=np.int32)
    row, column = np.divmod(index, np.int32(max(n, 1)))
    return row, column, column * np.int32(n) + row


def dense_list(positions: np.ndarray, cutoff: float) -> Neighbors:
    n = len(positions)
    close = _squared_distances(positions) < cutoff * cutoff
    close.ravel()[:: n + 1] = False  # an atom is not its own neighbor
    close_index = np.flatnonzero(close)
    row, column, mirrored = _pairs_of(n)
    receivers, senders = row[close_index], column[close_index]
    edge_at = np.empty(n * n, np.int32)
    edge_at[close_index] = np.arange(len(close_index), dtype=np.int32)
    forward = np.flatnonzero(receivers < senders)
    reverse = edge_at[mirrored[close_index[forward]]]
    return Neighbors(receivers, senders, None, np.concatenate([forward.astype(np.int32), reverse]))


def tree_list(positions: np.ndarray, cutoff: float) -> Neighbors:
    n = len(positions)
    i, j = (a.astype(np.int64) for a in _close_pairs(positions, cutoff))
    receivers, senders = (
        a.astype(np.int32) for a in np.divmod(np.sort(np.concatenate([i * n + j, j * n + i])), n)
    )
    return Neighbors(receivers, senders, None, _pair_order_open(receivers, senders, n))


def tree_pairs(positions: np.ndarray, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    i, j = _close_pairs(positions, cutoff)
    return tuple(
        a.astype(np.int32) for a in np.divmod(np.sort(i * len(positions) + j), len(positions))
    )


def _close_pairs(positions, cutoff):
    """Return the pairs i < j within the cutoff in any order, found with a k-d tree."""
    from scipy.spatial import cKDTree

    i, j = cKDTree(positions).query_pairs(cutoff, output_type="ndarray").T
    # query_pairs includes pairs exactly at the cutoff
    close = _squares((positions[i] - positions[j]).T) < cutoff * cutoff
    return i[close], j[close]


def _pair_order_open(receivers: np.ndarray, senders: np.ndarray, n: int) -> np.ndarray:
    key = receivers.astype(np.int64) * n + senders
    forward = np.flatnonzero(receivers < senders)
    reverse = np.searchsorted(key, senders[forward].astype(np.int64) * n + receivers[forward])
    return np.concatenate([forward, reverse]).astype(np.int32)


def _periodic(positions, cutoff, cell, pbc) -> Neighbors:
    """Return both directions of each pair of the half list.

    If each direction were found on its own, rounding at the cutoff could keep only one of them.
    """
    i, j, shifts = _periodic_half(positions, cutoff, cell, pbc)
    receivers, senders = np.concatenate([i, j]), np.concatenate([j, i])
    shifts = np.concatenate([shifts, -shifts])
    order = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], senders, receivers))
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return Neighbors(receivers[order], senders[order], shifts[order], rank)


def _periodic_half(positions, cutoff, cell, pbc) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return receivers, senders and shifts of pairs with receivers <= senders, sorted."""
    if cell.shape != (3, 3) or not np.isfinite(cell).all():
        raise ValueError(
            f"the cell of a periodic structure must be finite with shape (3, 3), received {cell!r}"
        )
    if (np.linalg.norm(cell, axis=1)[pbc] < 1e-9).any():
        raise ValueError(
            f"pbc is {pbc.tolist()} but a periodic direction has no lattice vector: {cell.tolist()}"
        )
    full = completed_cell(cell, pbc)
    if abs(np.linalg.det(full)) < 1e-9:
        raise ValueError(f"the lattice vectors are coplanar and span no cell: {cell.tolist()}")
    inverse = np.linalg.inv(full)
    offset = np.where(pbc, np.floor(positions @ inverse), 0.0)
    wrapped = positions - offset @ full
    # number of images in each direction; lattice planes are 1/|reciprocal vector| apart
    reach = np.where(pbc, np.ceil(cutoff * np.linalg.norm(inverse, axis=0)), 0).astype(int)
    count = np.prod(2.0 * reach + 1) * len(positions)
    limits.check("image_atoms", count, "periodic structure", ValueError)
    images = np.array(list(itertools.product(*(range(-r, r + 1) for r in reach))), np.int64)
    # One of the images s and -s is sufficient. They are sorted, with the structure itself in the
    # middle, so the first half including the middle is used.
    receivers, senders, shifts = _image_pairs(wrapped, images[: len(images) // 2 + 1], full, cutoff)
    # convert shifts of wrapped atoms to shifts of the given atoms
    shifts = shifts - (offset[senders] - offset[receivers]).astype(np.int64)
    turned = receivers > senders
    receivers, senders = np.where(turned, senders, receivers), np.where(turned, receivers, senders)
    shifts = np.where(turned[:, None], -shifts, shifts)
    order = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], senders, receivers))
    return tuple(a[order].astype(np.int32) for a in (receivers, senders, shifts))


def _image_pairs(wrapped, images, full, cutoff):
    """Find atoms and images of other atoms that are close, each pair once.

    The last of the images is the structure itself.
    """
    from scipy.spatial import cKDTree

    n = len(wrapped)
    ghosts = (wrapped[None] + (images @ full)[:, None]).reshape(-1, 3)
    low, high = (
        wrapped.min(axis=0, initial=np.inf) - cutoff,
        wrapped.max(axis=0, initial=-np.inf) + cutoff,
    )
    near = np.flatnonzero(((ghosts >= low) & (ghosts <= high)).all(axis=1))
    hits = cKDTree(wrapped).sparse_distance_matrix(
        cKDTree(ghosts[near]), cutoff, output_type="ndarray"
    )
    receivers, ghost = hits["i"], near[hits["j"]]
    image, senders = np.divmod(ghost, n)
    close = _squares((ghosts[ghost] - wrapped[receivers]).T) < cutoff * cutoff
    keep = close & ((image < len(images) - 1) | (receivers < senders))
    return receivers[keep], senders[keep], images[image[keep]]


def completed_cell(cell, pbc):
    """Return the cell with orthonormal vectors in the directions that are not periodic."""
    full = np.array(cell)
    if not pbc.all():
        _, _, basis = np.linalg.svd(full[pbc])
        full[~pbc] = basis[pbc.sum() :]
    return full
