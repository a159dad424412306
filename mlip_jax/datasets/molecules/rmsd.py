"""Batched root mean square deviations (RMSD) of conformers after optimal superposition, in JAX.

The optimal proper rotation (Kabsch's problem) is the eigenvector of the largest eigenvalue of
Horn's 4 x 4 matrix (J. Opt. Soc. Am. A 4, 629 (1987); Theobald, Acta Cryst. A 61, 478 (2005)).
Mirror images are not superposed. The eigenvector is computed by squaring the matrix repeatedly,
after a shift that makes it positive. This needs no branches and no decomposition, and is safe
for equal eigenvalues (linear molecules). On a CPU, it takes a fifth of the time of the singular
value decompositions in `geometry.kabsch_align`. The deviation is computed from the rotated
positions. The usual formula G - 2 lambda would have an error of 1e-3 Å in single precision.

    P     pairs of conformers
    n     atoms
    T, R  test and training conformers of a molecule
    Q     permutations
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# K squarings resolve two eigenvalues whose gap is 2^-K of their sum. The gap is small for nearly
# linear molecules.
_SQUARINGS = {np.dtype(np.float32): 24, np.dtype(np.float64): 32}
_PAIRS, _REMAINDER_PAIRS = 16_384, 1_024  # pairs per program, and per program for the remainder
_AHEAD = 4 * _PAIRS  # number of pairs that are collected before they are processed
_ATOMS = 8  # atoms are padded to a multiple of this number, to compile few programs


class Conformers(NamedTuple):
    """Test and training conformers of one molecule, with the same atoms in the same order.

    Attributes:
      test: Positions of the test conformers (Å), (T, n, 3).
      train: Positions of the training conformers (Å), (R, n, 3).
      permutations: Permutations of equivalent atoms (symmetry.py) including the identity, (Q, n)
        int; None for the identity only.
    """

    test: np.ndarray
    train: np.ndarray
    permutations: np.ndarray | None = None


def cross_rmsd(molecule: Conformers, *, dtype: type = np.float32) -> np.ndarray:
    """Compute the RMSD of each test conformer to each training conformer (Å), (T, R) float64.

    Each RMSD is the minimum over the permutations.

    Args:
      molecule: Conformers of one molecule.
      dtype: Precision. np.float64 is accurate to 1e-7 Å and np.float32 to about 1e-5 Å (1e-3 Å if
        all atoms are within 1e-3 Å of a line).

    Raises:
      ValueError: The conformers or permutations have invalid shapes.
    """
    return next(_minima([molecule], dtype, each_pair=True))


def nearest_rmsd(
    molecules: Iterable[Conformers], *, dtype: type = np.float32
) -> Iterator[np.ndarray]:
    """Compute the RMSD of each test conformer to the nearest training conformer (Å).

    Molecules are read ahead by some thousands of pairs and processed in batches, so small molecules
    cost no more per pair than large ones.

    Args:
      molecules: Conformers of each molecule.
      dtype: Precision, as for `cross_rmsd`.

    Yields:
      RMSDs of one molecule, (T,) float64: infinite without training conformers, NaN without atoms.

    Raises:
      ValueError: As in `cross_rmsd`.
    """
    return _minima(molecules, dtype, each_pair=False)


def _minima(molecules: Iterable[Conformers], dtype: type, each_pair: bool) -> Iterator[np.ndarray]:
    """Yield the minimum RMSDs of each molecule: per pair, (T, R), or per test conformer, (T,)."""
    done: list[np.ndarray] = []
    batch = _Batch(dtype)
    for molecule in molecules:
        test, train = (x.astype(dtype) for x in _center(molecule))
        minima = np.full(
            (len(test), len(train)) if each_pair else len(test), np.inf if test.shape[1] else np.nan
        )
        done.append(minima)
        for t, r, a, b in _blocks(test, train, molecule.permutations) if test.shape[1] else ():
            batch.add(minima, (t, r) if each_pair else (t,), a, b)
            # Process the collected pairs once there are enough of them.
            if batch.count >= _AHEAD:
                batch.run()
                yield from done[:-1]  # the last molecule may have further pairs
                done = done[-1:]
    batch.run()
    yield from done


def _center(molecule: Conformers) -> tuple[np.ndarray, np.ndarray]:
    """Return centered test conformers, (T, n, 3), and training conformers, (R, n, 3), float64."""
    test, train = np.asarray(molecule.test, np.float64), np.asarray(molecule.train, np.float64)
    if test.ndim != 3 or train.ndim != 3 or test.shape[1:] != train.shape[1:] or test.shape[2] != 3:
        raise ValueError(
            f"expected conformers of shapes (T, n, 3) and (R, n, 3); received {test.shape} and "
            f"{train.shape}"
        )
    n = test.shape[1]
    orders = molecule.permutations
    if orders is not None and (np.ndim(orders) != 2 or np.shape(orders)[1] != n or not len(orders)):
        raise ValueError(
            f"expected permutations of shape (Q, {n}) with Q at least 1; received "
            f"{np.shape(orders)}"
        )
    return (test, train) if n == 0 else tuple(x - x.mean(1, keepdims=True) for x in (test, train))


def _blocks(
    test: np.ndarray, train: np.ndarray, permutations: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield all pairs in blocks of bounded size: indices t, r (P,) and both positions (P, n, 3)."""
    orders = np.arange(test.shape[1])[None] if permutations is None else np.asarray(permutations)
    some_train = int(np.clip(_AHEAD // len(orders), 1, max(len(train), 1)))
    some_test = int(np.clip(_AHEAD // (len(orders) * some_train), 1, max(len(test), 1)))
    for first_t in range(0, len(test), some_test):
        for first_r in range(0, len(train), some_train):
            a, b = test[first_t : first_t + some_test], train[first_r : first_r + some_train]
            # Indices of all (test, training, permutation) triples of the block, each (P,).
            t, r, q = (x.ravel() for x in np.indices((len(a), len(b), len(orders))))
            yield (
                t + first_t,
                r + first_r,
                a[t],
                b[r] if permutations is None else b[r[:, None], orders[q]],
            )


class _Batch:
    """Pairs of several molecules that are processed together."""

    def __init__(self, dtype: type):
        self._dtype, self.count = dtype, 0
        self._pieces: dict[int, list] = {}  # by padded number of atoms

    def add(
        self, minima: np.ndarray, indices: tuple[np.ndarray, ...], a: np.ndarray, b: np.ndarray
    ) -> None:
        """Add pairs of positions a and b, (P, n, 3). Their minimum RMSDs go to minima[indices]."""
        padded_size = -(-a.shape[1] // _ATOMS) * _ATOMS
        # Padding atoms at the center contribute zero to all sums.
        padded = [np.pad(x, ((0, 0), (0, padded_size - x.shape[1]), (0, 0))) for x in (a, b)]
        self._pieces.setdefault(padded_size, []).append((minima, indices, a.shape[1], *padded))
        self.count += len(a)

    def run(self) -> None:
        """Compute the RMSDs of all pairs and reset the batch."""
        for pieces in self._pieces.values():
            sums = _sums(
                *(np.concatenate([piece[k] for piece in pieces]) for k in (3, 4)), self._dtype
            )
            ends = np.cumsum([len(piece[3]) for piece in pieces])[:-1]
            for (minima, indices, n, *_), values in zip(pieces, np.split(sums, ends)):
                np.minimum.at(minima, indices, np.sqrt(values.astype(np.float64) / n))
        self._pieces, self.count = {}, 0


def _sums(a: np.ndarray, b: np.ndarray, dtype: type) -> np.ndarray:
    """Compute the sum of the squared deviations of each pair (Å²), (P,)."""
    sums = np.empty(len(a), dtype)
    with jax.enable_x64(dtype == np.float64):
        start = 0
        while start < len(a):
            size = _PAIRS if len(a) - start > _PAIRS // 2 else _REMAINDER_PAIRS
            stop = min(start + size, len(a))
            x, y = (_rows(each[start:stop], size) for each in (a, b))
            sums[start:stop] = np.asarray(_min_squared_deviation(x, y))[: stop - start]
            start = stop
    return sums


def _rows(values: np.ndarray, size: int) -> np.ndarray:
    """Pad the first axis of `values` with zeros to `size`."""
    return (
        values if len(values) == size else np.pad(values, ((0, size - len(values)), (0, 0), (0, 0)))
    )


@jax.jit
def _min_squared_deviation(a: jax.Array, b: jax.Array) -> jax.Array:
    """Minimize the sum of squared deviations over all rotations of b.

    Args:
      a: Centered positions (Å), (P, n, 3).
      b: Centered positions (Å), (P, n, 3).

    Returns:
      Minimum sums (Å²), (P,).
    """
    # With pairs as the last axis, all operations are elementwise along contiguous memory.
    ax, ay, az = a.transpose(2, 1, 0)  # each (n, P)
    bx, by, bz = b.transpose(2, 1, 0)
    w, x, y, z = _top_eigenvector(_horn((ax, ay, az), (bx, by, bz)))
    dx = ax - ((1 - 2 * (y * y + z * z)) * bx + 2 * (x * y - w * z) * by + 2 * (x * z + w * y) * bz)
    dy = ay - (2 * (x * y + w * z) * bx + (1 - 2 * (x * x + z * z)) * by + 2 * (y * z - w * x) * bz)
    dz = az - (2 * (x * z - w * y) * bx + 2 * (y * z + w * x) * by + (1 - 2 * (x * x + y * y)) * bz)
    return (dx * dx + dy * dy + dz * dz).sum(0)


def _horn(a, b) -> dict[tuple[int, int], jax.Array]:
    """Return the upper triangle of Horn's matrix, shifted by half of the sum of squares.

    The shift makes all eigenvalues nonnegative. Each element is (P,).
    """
    s = [[(b[i] * a[j]).sum(0) for j in range(3)] for i in range(3)]
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = s
    shift = 0.5 * sum((v * v).sum(0) for v in (*a, *b))
    return {
        (0, 0): xx + yy + zz + shift,
        (0, 1): yz - zy,
        (0, 2): zx - xz,
        (0, 3): xy - yx,
        (1, 1): xx - yy - zz + shift,
        (1, 2): xy + yx,
        (1, 3): zx + xz,
        (2, 2): yy - xx - zz + shift,
        (2, 3): yz + zy,
        (3, 3): zz - xx - yy + shift,
    }


def _top_eigenvector(matrix) -> tuple[jax.Array, ...]:
    """Return the unit eigenvector of the largest eigenvalue; zero for a zero matrix."""

    def at(m, i, j):
        return m[min(i, j), max(i, j)]

    def scaled(m):
        trace = m[0, 0] + m[1, 1] + m[2, 2] + m[3, 3]
        factor = 1 / jnp.where(trace > 0, trace, 1)
        return {key: value * factor for key, value in m.items()}

    def square(_, m):
        return scaled({(i, j): sum(at(m, i, k) * at(m, k, j) for k in range(4)) for i, j in m})

    # Unrolling would take seconds to compile and would run slightly slower.
    m = jax.lax.fori_loop(0, _SQUARINGS[matrix[0, 0].dtype], square, scaled(matrix))
    # All columns are multiples of the eigenvector. The one with the largest diagonal element is the
    # most accurate.
    column, largest = [at(m, i, 0) for i in range(4)], m[0, 0]
    for j in range(1, 4):
        better = m[j, j] > largest
        column = [jnp.where(better, at(m, i, j), column[i]) for i in range(4)]
        largest = jnp.where(better, m[j, j], largest)
    norm = jnp.sqrt(sum(c * c for c in column))
    return tuple(c / jnp.where(norm > 0, norm, 1) for c in column)
