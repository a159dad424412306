"""Neighbour lists on the host: all pairs within a cutoff, open or periodic boundaries, never truncated.

A list is directed (each pair stands in it twice), sorted by receiver, and comes with `pair_order`: a
permutation of the edges whose first half names one edge of every pair and whose second half the reverse of
each. What is the same for i -> j and j -> i is computed once, on the first half. Long-range lists have every pair once.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np

# Above this many atoms a k-d tree beats the dense distance matrix.
_DENSE_LIMIT = 160
_TREE_LIMIT = 4000  # the same for long-range lists, where most pairs are close
# Rows times columns of the distance matrix that long-range lists look at in one piece.
_BLOCK = 1 << 18


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


def long_range_list(positions: np.ndarray, cutoff: float, cell: np.ndarray | None = None,
                    pbc: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Every pair closer than `cutoff` once, an atom and its own image included: (receivers, senders, shifts).

    Receivers and senders have shape (n_pair,), int32, receivers ascending; shifts (n_pair, 3), int32, or None
    without periodicity, as in `Neighbors`. Callers must not write into them.

    Args:
      positions, cell, pbc: As for `neighbor_list`.
      cutoff: Å; inf for all pairs of an open structure.

    Raises:
      ValueError: As `neighbor_list`; or an infinite cutoff for a periodic structure.
    """
    positions = np.asarray(positions, np.float64)
    if not np.isfinite(positions).all():
        raise ValueError("positions hold NaN or infinite values; no long-range list can be made of them")
    if pbc is not None and np.any(pbc):
        if np.isinf(cutoff):
            raise infinite_pairs(pbc)
        return _periodic_half(positions, cutoff, np.asarray(cell, np.float64), np.asarray(pbc, bool))
    if np.isinf(cutoff):
        return *_all_pairs(len(positions)), None
    if len(positions) <= _DENSE_LIMIT:
        return *_close_of_all(positions, cutoff), None
    if len(positions) <= _TREE_LIMIT:
        return *_dense_half(positions, cutoff), None
    return *_tree_half(positions, cutoff), None


def infinite_pairs(pbc) -> ValueError:
    """The error of an infinite long-range cutoff for a periodic structure."""
    return ValueError(f"a periodic structure (pbc={np.asarray(pbc).tolist()}) has pairs without end: its long-range "
                      "cutoff must be finite, received inf. Give the terms of long range a cutoff.")


def _all_pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Receivers and senders of all i < j, int32."""
    return _kept_pairs(n) if n <= _DENSE_LIMIT else _new_pairs(n)


def _new_pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    receivers = np.repeat(np.arange(n, dtype=np.int32), np.arange(n - 1, -1, -1)[:n])
    senders = np.arange(len(receivers), dtype=np.int32)
    # row i begins at place i * (2 n - i - 1) / 2 with the column i + 1
    row = np.arange(n, dtype=np.int64)
    first = row * (2 * n - row - 1) // 2
    return receivers, (senders - (first - row - 1)[receivers]).astype(np.int32)


@functools.lru_cache(maxsize=64)
def _kept_pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = _new_pairs(n)
    for array in pairs:
        array.flags.writeable = False
    return pairs


def _close_of_all(positions: np.ndarray, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    i, j = _kept_pairs(len(positions))
    x = np.ascontiguousarray(positions.T)
    close = _squares(x.take(i, axis=1) - x.take(j, axis=1)) < cutoff * cutoff
    return (i, j) if close.all() else (i[close], j[close])


def _dense_half(positions: np.ndarray, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    n, x = len(positions), np.ascontiguousarray(positions.T)
    receivers, senders, start = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], 0
    while start < n - 1:
        stop = min(n - 1, start + max(1, _BLOCK // (n - start)))
        d = x[:, start:stop, None] - x[:, None, start + 1:]
        row, column = np.divmod(np.flatnonzero(_squares(d) < cutoff * cutoff).astype(np.int32), n - start - 1)
        upper = column >= row
        receivers.append(row[upper] + np.int32(start))
        senders.append(column[upper] + np.int32(start + 1))
        start = stop
    return np.concatenate(receivers), np.concatenate(senders)


def _squares(d: np.ndarray) -> np.ndarray:
    """d[0]² + d[1]² + d[2]², in d's own memory; added in this order everywhere, so that all lists and counts agree."""
    d *= d
    total = d[0]
    total += d[1]
    total += d[2]
    return total


def _squared_distances(positions: np.ndarray) -> np.ndarray:
    # Differences, not the Gram matrix: |a|²+|b|²-2ab loses digits right at the cutoff.
    x = np.ascontiguousarray(positions.T)
    return _squares(x[:, :, None] - x[:, None, :])


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
    n = len(positions)
    i, j = (a.astype(np.int64) for a in _close_pairs(positions, cutoff))
    receivers, senders = (a.astype(np.int32) for a in np.divmod(np.sort(np.concatenate([i * n + j, j * n + i])), n))
    return Neighbors(receivers, senders, None, _pair_order_open(receivers, senders, n))


def _tree_half(positions: np.ndarray, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    i, j = _close_pairs(positions, cutoff)
    return tuple(a.astype(np.int32) for a in np.divmod(np.sort(i * len(positions) + j), len(positions)))


def _close_pairs(positions, cutoff):
    """Pairs i < j by a k-d tree, in any order."""
    from scipy.spatial import cKDTree
    i, j = cKDTree(positions).query_pairs(cutoff, output_type="ndarray").T
    # query_pairs includes the cutoff itself
    close = _squares((positions[i] - positions[j]).T) < cutoff * cutoff
    return i[close], j[close]


def _pair_order_open(receivers: np.ndarray, senders: np.ndarray, n: int) -> np.ndarray:
    key = receivers.astype(np.int64) * n + senders
    forward = np.flatnonzero(receivers < senders)
    reverse = np.searchsorted(key, senders[forward].astype(np.int64) * n + receivers[forward])
    return np.concatenate([forward, reverse]).astype(np.int32)


def _periodic(positions, cutoff, cell, pbc) -> Neighbors:
    """Both directions of each pair of the half list: sorted apart, rounding at the cutoff might keep but one."""
    i, j, shifts = _periodic_half(positions, cutoff, cell, pbc)
    receivers, senders = np.concatenate([i, j]), np.concatenate([j, i])
    shifts = np.concatenate([shifts, -shifts])
    order = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], senders, receivers))
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    return Neighbors(receivers[order], senders[order], shifts[order], place)


def _periodic_half(positions, cutoff, cell, pbc) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Receivers <= senders and shifts, sorted."""
    if cell.shape != (3, 3) or not np.isfinite(cell).all():
        raise ValueError(f"a periodic structure needs a finite cell of shape (3, 3), received {cell!r}")
    if (np.linalg.norm(cell, axis=1)[pbc] < 1e-9).any():
        raise ValueError(f"pbc is {pbc.tolist()} but a periodic direction has no lattice vector: {cell.tolist()}")
    full = _completed_cell(cell, pbc)
    if abs(np.linalg.det(full)) < 1e-9:
        raise ValueError(f"the lattice vectors {cell.tolist()} lie in one plane; they span no cell")
    inverse = np.linalg.inv(full)
    offset = np.where(pbc, np.floor(positions @ inverse), 0.0)
    wrapped = positions - offset @ full
    # How far the images must reach: the planes of the lattice stand 1/|reciprocal vector| apart.
    reach = np.where(pbc, np.ceil(cutoff * np.linalg.norm(inverse, axis=0)), 0).astype(int)
    images = np.array(list(itertools.product(*(range(-r, r + 1) for r in reach))), np.int64)
    # Of the images s and -s one is enough: they come in the order of their shifts, the structure itself in the middle.
    receivers, senders, shifts = _image_pairs(wrapped, images[:len(images) // 2 + 1], full, cutoff)
    # from the wrapped atoms' images to those of the atoms as given
    shifts = shifts - (offset[senders] - offset[receivers]).astype(np.int64)
    turned = receivers > senders
    receivers, senders = np.where(turned, senders, receivers), np.where(turned, receivers, senders)
    shifts = np.where(turned[:, None], -shifts, shifts)
    order = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], senders, receivers))
    return tuple(a[order].astype(np.int32) for a in (receivers, senders, shifts))


def _image_pairs(wrapped, images, full, cutoff):
    """Atoms and the images (the last of them the structure itself) of other atoms that are close, each pair once."""
    from scipy.spatial import cKDTree
    n = len(wrapped)
    ghosts = (wrapped[None] + (images @ full)[:, None]).reshape(-1, 3)
    low, high = wrapped.min(axis=0, initial=np.inf) - cutoff, wrapped.max(axis=0, initial=-np.inf) + cutoff
    near = np.flatnonzero(((ghosts >= low) & (ghosts <= high)).all(axis=1))
    hits = cKDTree(wrapped).sparse_distance_matrix(cKDTree(ghosts[near]), cutoff, output_type="ndarray")
    receivers, ghost = hits["i"], near[hits["j"]]
    image, senders = np.divmod(ghost, n)
    close = _squares((ghosts[ghost] - wrapped[receivers]).T) < cutoff * cutoff
    keep = close & ((image < len(images) - 1) | (receivers < senders))
    return receivers[keep], senders[keep], images[image[keep]]


def _completed_cell(cell, pbc):
    """The cell with orthonormal vectors in place of the directions that are not periodic."""
    full = np.array(cell)
    if not pbc.all():
        _, _, basis = np.linalg.svd(full[pbc])
        full[~pbc] = basis[pbc.sum():]
    return full
