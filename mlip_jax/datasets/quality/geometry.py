"""Distances, alignment and fingerprints of many structures at once, for Columns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from ase.data import covalent_radii

from mlip_jax import limits
from mlip_jax.datasets.columns import Columns

BOND_STRETCH = 1.25  # pairs closer than this times the sum of their covalent radii are bonded
# The closest pair is found in float32 from |a|² + |b|² - 2ab. Up to this number of atoms and this
# |a|² (Å²), its squared distance is correct to 1e-4 Å². Larger structures use a k-d tree.
_GRAM_ATOMS = 256
_GRAM_SQUARE = 400.0
# Number of pairs in memory at a time: the distance matrices must fit into the cache of a core.
_GRAM_PAIRS = 100_000
_PERIODIC_PAIRS = 2_000_000
_FINGERPRINT_STEP = 1e-4
_ODD = np.array(
    [
        0x9E3779B97F4A7C15,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0xD6E8FEB86659FD93,
        0xA0761D6478BD642F,
    ],
    np.uint64,
)


def chunks(columns: Columns, atoms: int = 16_384) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Yield ranges of structures with about `atoms` atoms in total.

    Each item is (structures, atoms, first atom of each structure within the range).
    """
    start = 0
    while start < len(columns):
        stop = (
            int(np.searchsorted(columns.offsets, columns.offsets[start] + atoms, side="right")) - 1
        )
        stop = min(max(stop, start + 1), len(columns))
        first, last = int(columns.offsets[start]), int(columns.offsets[stop])
        yield slice(start, stop), slice(first, last), columns.offsets[start:stop] - first
        start = stop


def same_size(n_atoms: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Group structures of equal size, from small to large.

    Each item is (number of atoms, indices of the structures in ascending order).
    """
    order = np.argsort(n_atoms, kind="stable")
    sizes, starts = np.unique(n_atoms[order], return_index=True)
    yield from zip(sizes.tolist(), np.split(order, starts[1:]))


def segment_sum(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the sums along the first axis of the segments that begin at `starts`.

    `starts` must be ascending. Empty segments have the sum zero.
    """
    total = np.zeros((len(starts), *values.shape[1:]), values.dtype)
    filled = np.append(starts[1:], len(values)) > starts
    if filled.any():
        total[filled] = np.add.reduceat(values, starts[filled], axis=0)
    return total


def finite_positions(columns: Columns) -> np.ndarray:
    """Return whether all positions of each structure are finite, shape (S,), bool."""
    finite = np.ones(len(columns), bool)
    for structures, atoms, starts in chunks(columns):
        with np.errstate(invalid="ignore"):
            sound = np.isfinite(columns.positions[atoms].sum())
        if not sound:
            bad = ~np.isfinite(columns.positions[atoms]).all(1)
            finite[structures] = segment_sum(bad.astype(np.int64), starts) == 0
    return finite


def shortest_distances(columns: Columns) -> np.ndarray:
    """Return the shortest distance between two atoms per structure (Å), shape (S,).

    Periodic structures include the images of all atoms, also of the atom itself. The result is
    infinite for a single atom with open boundaries and NaN if positions are not finite. The closest
    pair is searched in float32 and measured in float64: if the squared distances of two pairs
    differ by less than 1e-4 Å², the other one may be reported.
    """
    shortest = np.full(len(columns), np.inf)
    periodic = np.zeros(len(columns), bool) if columns.pbc is None else columns.pbc.any(1)
    n_atoms = columns.n_atoms
    for n, indices in same_size(n_atoms):
        indices = indices[~periodic[indices]]
        if n == 1:
            finite = np.isfinite(columns.positions[columns.offsets[indices]]).all(1)
            shortest[indices] = np.where(finite, np.inf, np.nan)
        elif n == 0:
            continue
        elif n <= _GRAM_ATOMS:
            shortest[indices] = _shortest_dense(columns, n, indices)
        else:
            for s in indices:
                shortest[s] = _shortest_tree(
                    columns.positions[columns.offsets[s] : columns.offsets[s + 1]]
                )
    for s in np.flatnonzero(periodic):
        atoms = slice(columns.offsets[s], columns.offsets[s + 1])
        shortest[s] = shortest_periodic(columns.positions[atoms], columns.cell[s], columns.pbc[s])
    return shortest


def _shortest_dense(columns, n, indices):
    """Return the shortest distances of structures with n atoms each, at most _GRAM_ATOMS."""
    step = max(1, _GRAM_PAIRS // (n * n))
    # One product (a, |a|², 1) · (-2b, 1, |b|²) gives |a|² + |b|² - 2ab.
    left, right = np.ones((step, n, 5), np.float32), np.ones((step, 5, n), np.float32)
    squares = np.empty((step, n, n), np.float32)
    shortest = np.empty(len(indices))
    atom = np.arange(n)
    for start in range(0, len(indices), step):
        part = indices[start : start + step]
        m = len(part)
        positions = columns.positions.take(columns.offsets[part, None] + atom, axis=0)  # (m, n, 3)
        # Small coordinates keep the error of the difference small.
        centered = (positions - np.einsum("mni->mi", positions)[:, None] / n).astype(np.float32)
        norm = np.einsum("mni,mni->mn", centered, centered)
        left[:m, :, :3], left[:m, :, 3] = centered, norm
        np.multiply(centered.transpose(0, 2, 1), -2, out=right[:m, :3])
        right[:m, 4] = norm
        pairs = np.matmul(left[:m], right[:m], out=squares[:m]).reshape(m, n * n)
        pairs[:, :: n + 1] = np.inf
        i, j = np.divmod(pairs.argmin(1), n)
        rows = np.arange(m)
        shortest[start : start + m] = np.sqrt(
            ((positions[rows, i] - positions[rows, j]) ** 2).sum(-1)
        )
        shortest[start : start + m][i == j] = np.nan  # happens only if no distance is finite
        for k in np.flatnonzero(~(norm.max(1) <= _GRAM_SQUARE)):
            shortest[start + k] = _shortest_tree(positions[k])
    return shortest


def _shortest_tree(positions):
    """Return the shortest distance in one structure with a k-d tree; NaN if not finite."""
    from scipy.spatial import cKDTree  # here, because it takes half the start of a worker process

    if not np.isfinite(positions).all():
        return np.nan
    return float(cKDTree(positions).query(positions, k=2)[0][:, 1].min())


def shortest_periodic(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> float:
    """Return the shortest distance in one periodic structure (Å).

    Works for any cell, including skewed and very small ones. Returns NaN if positions are not
    finite or the cell is degenerate.

    Args:
      positions: Positions (Å), shape (n, 3).
      cell: Lattice vectors as rows (Å), shape (3, 3). Rows of open directions are ignored.
      pbc: Periodic directions, bool, shape (3,).
    """
    if not np.isfinite(positions).all():
        return float("nan")
    cell = _complete_cell(np.asarray(cell, np.float64), pbc)
    if cell is None:
        return float("nan")
    inverse = np.linalg.inv(cell)
    heights = 1 / np.linalg.norm(
        inverse, axis=0
    )  # distances of opposite faces of the cell (Å), (3,)
    lengths = np.linalg.norm(cell, axis=1)[pbc]
    fractional = positions @ inverse  # (n, 3)
    # An upper bound of the distance limits the images that must be searched.
    bound = _shortest_image(fractional, cell, pbc, np.zeros((1, 3)), float(lengths.min()))
    image_ranges = [range(-int(k), int(k) + 1) for k in np.where(pbc, np.floor(bound / heights), 0)]
    count = np.prod(2.0 * np.floor(lengths.min() / heights) + 1, where=np.asarray(pbc, bool))
    limits.check("image_atoms", count * len(positions), "periodic structure", ValueError)
    # Lattice vectors other than zero: distances between images of the same atom.
    multiples = np.array(list(itertools.product(*image_ranges)))
    multiples = multiples[np.any(multiples, axis=1)]
    if len(multiples):
        bound = min(bound, float(np.linalg.norm(multiples @ cell, axis=1).min()))
    # A wrapped fractional difference is at most 1/2, so image n is at least |n| - 1/2 heights away.
    reach = [range(-int(k), int(k) + 1) for k in np.where(pbc, np.floor(bound / heights + 0.5), 0)]
    return _shortest_image(
        fractional, cell, pbc, np.array(list(itertools.product(*reach)), float), bound
    )


def _shortest_image(fractional, cell, pbc, images, bound):
    """Return the minimum of `bound` and all distances between an atom and images of other atoms."""
    n = len(fractional)
    rows = max(1, _PERIODIC_PAIRS // max(n, 1))
    for start in range(0, n - 1, rows):
        stop = min(start + rows, n)
        later = np.arange(start, n)[None, :] > np.arange(start, stop)[:, None]
        difference = (fractional[None, start:] - fractional[start:stop, None])[later]  # (pairs, 3)
        difference -= np.where(pbc, np.rint(difference), 0)
        for image in images:
            squares = (((difference + image) @ cell) ** 2).sum(-1)  # (pairs,)
            bound = min(bound, float(np.sqrt(squares.min(initial=np.inf))))
    return bound


def _complete_cell(cell, pbc):
    """Return the cell with orthonormal vectors in the open directions; None if it is degenerate.

    These vectors are perpendicular to the periodic lattice vectors.
    """
    cell = np.where(np.asarray(pbc)[:, None], cell, 0.0)
    if not np.isfinite(cell).all() or np.linalg.matrix_rank(cell) < np.sum(pbc):
        return None
    if not np.all(pbc):
        normal = np.linalg.svd(cell[pbc])[2][int(np.sum(pbc)) :]
        cell[~np.asarray(pbc)] = normal
    return cell


def kabsch_align(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the proper rotations that superpose b onto a.

    (b - mean(b)) @ rotation is the least-squares fit to a - mean(a).

    Args:
      a: Conformations (Å), shape (m, n, 3).
      b: Conformations with the same order of atoms (Å), shape (m, n, 3).

    Returns:
      Rotations with determinant +1, shape (m, 3, 3). They rotate vectors such as forces as well:
      forces_b @ rotation.
    """
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    # SVD of the covariances, (m, 3, 3). The sign of the determinants excludes reflections.
    u, _, vt = np.linalg.svd(np.swapaxes(b, 1, 2) @ a)
    u[:, :, 2] *= np.sign(np.linalg.det(u) * np.linalg.det(vt))[:, None]
    return u @ vt


def bond_limit(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the distances (Å) below which two atoms are considered bonded.

    Args:
      a: Atomic numbers, any shape.
      b: Atomic numbers; the shape must broadcast with that of `a`.
    """
    return BOND_STRETCH * (covalent_radii[a] + covalent_radii[b])


def superpose(
    points: np.ndarray, target: np.ndarray, fitted: np.ndarray | None = None
) -> np.ndarray:
    """Rotate and translate points (n, 3) to the least-squares fit to `target` (n, 3).

    `fitted` is a mask of the atoms that are fitted, (n,); None for all.
    """
    a, b = (points, target) if fitted is None else (points[fitted], target[fitted])
    return (points - a.mean(0)) @ kabsch_align(b[None], a[None])[0] + b.mean(0)


def fingerprints(columns: Columns) -> np.ndarray:
    """Return a 64-bit hash of each structure, shape (S,), uint64.

    The hash covers atomic numbers, positions (rounded to 1e-4 Å) and the cell. Equal structures
    with the same order of atoms have equal fingerprints on every machine. Among n different
    structures, a collision has a probability of about n² / 4e19: 1e-7 for two million structures.
    Positions that differ by less than the rounding may still be rounded to different values.
    """
    hashes = np.empty(len(columns), np.uint64)
    with np.errstate(over="ignore"):
        for structures, atoms, starts in chunks(columns):
            position_in_structure = np.arange(atoms.stop - atoms.start) - np.repeat(
                starts, columns.n_atoms[structures]
            )
            mixed = _to_fixed_point(columns.positions[atoms])  # (atoms, 3)
            mixed *= _ODD[:3]
            mixed = mixed[:, 0] + mixed[:, 1] + mixed[:, 2]  # (atoms,)
            mixed += columns.numbers[atoms].astype(np.uint64) * _ODD[3]
            mixed += position_in_structure.astype(np.uint64) * _ODD[4]
            hashes[structures] = segment_sum(_mix(mixed), starts)
        hashes += columns.n_atoms.astype(np.uint64) * _ODD[0]
        if columns.pbc is not None:
            periodic = columns.pbc.any(1)
            cell = _to_fixed_point(np.where(columns.pbc[:, :, None], columns.cell, 0.0)).reshape(
                -1, 9
            )
            constants = _mix(np.arange(1, 10, dtype=np.uint64))
            hashes += np.where(
                periodic, _mix((cell * constants).sum(1) + columns.pbc @ _ODD[:3]), np.uint64(0)
            )
        return _mix(hashes)


def _to_fixed_point(values):
    """Return values as unsigned integers in units of _FINGERPRINT_STEP."""
    scaled = np.rint(values / _FINGERPRINT_STEP)
    limit = 2.0**62
    if not np.abs(scaled).max(initial=0.0) < limit:  # casts of other values depend on the machine
        scaled = np.nan_to_num(scaled, nan=limit, posinf=limit, neginf=-limit).clip(-limit, limit)
    return scaled.astype(np.int64).view(np.uint64)


def _mix(x):
    """Mix the bits: every bit of the result depends on every bit of x."""
    x = x ^ (x >> np.uint64(32))
    x *= np.uint64(0xD6E8FEB86659FD93)
    x ^= x >> np.uint64(32)
    x *= np.uint64(0xD6E8FEB86659FD93)
    x ^= x >> np.uint64(32)
    return x
