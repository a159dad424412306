"""Root mean square deviations of conformers after the best superposition (Kabsch's problem), many at once, in JAX.

The best proper rotation is the eigenvector of the largest eigenvalue of Horn's 4 x 4 matrix (J. Opt. Soc. Am. A 4, 629
(1987); Theobald, Acta Cryst. A 61, 478 (2005)): mirror images are not superposed. It is found by squaring the
matrix, shifted to be positive, sixteen times, which needs no branches and no decomposition and is safe where
eigenvalues coincide (linear molecules). The deviation is that of the rotated positions themselves and not
G - 2 lambda, of which single precision would leave 1e-3 Å.

    P  pairs of conformers     n  atoms     T, R  test and training conformers of a molecule     Q  permutations
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_SQUARINGS = 16  # the gap of two eigenvalues that are told apart is 2^-16 of their sum
_PAIRS, _FEW = 16_384, 1_024  # of a call to the device, and of one for what is left over: two programs
_ATOMS = 8  # atoms are padded to a multiple of this many, so that few programs are compiled


class Conformers(NamedTuple):
    """Test and training conformers of one molecule, with the same atoms in the same order.

    Attributes:
      test: (T, n, 3) Å. train: (R, n, 3) Å.
      permutations: (Q, n) int, orders of the atoms that are the same molecule (symmetry.py), the identity among them;
        None: the identity alone.
    """

    test: np.ndarray
    train: np.ndarray
    permutations: np.ndarray | None = None


def cross_rmsd(molecule: Conformers, *, dtype: type = np.float32) -> np.ndarray:
    """RMSD of each test conformer to each training conformer, the least over the permutations, (T, R) Å, float64.

    Args:
      dtype: np.float64 for RMSDs that are right to 1e-7 Å; single precision is right to about 1e-5 Å
        (1e-3 Å where all atoms lie on a line but for 1e-3 Å).

    Raises:
      ValueError: Conformers of other shapes than those above.
    """
    shape = len(molecule.test), len(molecule.train)
    return next(_minima([molecule], dtype, lambda pairs: (pairs.test * shape[1] + pairs.train, shape[0] * shape[1]))
                ).reshape(shape)


def nearest_rmsd(molecules: Iterable[Conformers], *, dtype: type = np.float32) -> Iterator[np.ndarray]:
    """For each molecule the RMSD of each test conformer to the nearest training conformer, (T,) Å, float64.

    Molecules are taken from the iterable some thousands of pairs ahead: they are worked on together, so that small
    ones cost no more per pair than large ones. Infinite where there is no training conformer, NaN without atoms.

    Args:
      dtype: As for `cross_rmsd`.

    Raises:
      ValueError: As `cross_rmsd`.
    """
    return _minima(molecules, dtype, lambda pairs: (pairs.test, pairs.num_test))


class _Pairs(NamedTuple):
    """Numbers of the conformers of each pair, (P,): test, train, and train in all orders of its atoms."""

    test: np.ndarray
    train: np.ndarray
    permuted: np.ndarray
    num_test: int


def _minima(molecules, dtype, cell_of) -> Iterator[np.ndarray]:
    """The least RMSD in each of the cells into which `cell_of` puts the pairs of a molecule: (their numbers, count)."""
    waiting: list[tuple[np.ndarray, int, int, int]] = []  # cells, their number, atoms, room for atoms
    blocks: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    count = 0
    for molecule in molecules:
        test, train = _checked(molecule, dtype)
        pairs, n = _pairs(molecule), test.shape[1]
        room = -(-n // _ATOMS) * _ATOMS
        cells, number = cell_of(pairs)
        waiting.append((cells, number, n, room))
        blocks.setdefault(room, []).append((_padded(test, room)[pairs.test], _padded(train, room)[pairs.permuted]))
        count += len(cells)
        if count >= 4 * _PAIRS:
            yield from _finish(waiting, blocks, dtype)
            waiting, blocks, count = [], {}, 0
    yield from _finish(waiting, blocks, dtype)


def _checked(molecule: Conformers, dtype) -> tuple[np.ndarray, np.ndarray]:
    """Centred test conformers (T, n, 3) and training conformers in all orders of their atoms (R Q, n, 3)."""
    test, train = np.asarray(molecule.test, np.float64), np.asarray(molecule.train, np.float64)
    if test.ndim != 3 or train.ndim != 3 or test.shape[1:] != train.shape[1:] or test.shape[2] != 3:
        raise ValueError(f"expected conformers of shapes (T, n, 3) and (R, n, 3); received {test.shape} and "
                         f"{train.shape}")
    n = test.shape[1]
    if molecule.permutations is not None:
        orders = np.asarray(molecule.permutations)
        if orders.ndim != 2 or orders.shape[1] != n or not len(orders):
            raise ValueError(f"expected permutations of shape (Q, {n}) with Q at least 1; received {orders.shape}")
        train = train[:, orders].reshape(-1, n, 3)
    if n:
        test, train = (x - x.mean(1, keepdims=True) for x in (test, train))
    return test.astype(dtype), train.astype(dtype)


def _pairs(molecule: Conformers) -> _Pairs:
    num_test, num_train = len(molecule.test), len(molecule.train)
    orders = 1 if molecule.permutations is None else len(molecule.permutations)
    test = np.repeat(np.arange(num_test), num_train * orders)
    permuted = np.tile(np.arange(num_train * orders), num_test)
    return _Pairs(test, permuted // orders, permuted, num_test)


def _padded(conformers: np.ndarray, room: int) -> np.ndarray:
    """With atoms at the centre, which add nothing to any sum."""
    return np.pad(conformers, ((0, 0), (0, room - conformers.shape[1]), (0, 0)))


def _finish(waiting, blocks, dtype) -> Iterator[np.ndarray]:
    """What was waited for, in its order."""
    sums = {room: iter(np.split(_sums(*(np.concatenate(x) for x in zip(*block)), dtype),
                                np.cumsum([len(a) for a, _ in block])[:-1])) for room, block in blocks.items()}
    for cells, number, n, room in waiting:
        found = np.full(number, np.inf)
        here = next(sums[room]).astype(np.float64)
        if n:
            np.minimum.at(found, cells, np.sqrt(here / n))
        else:
            found[:] = np.nan
        yield found


def _sums(a: np.ndarray, b: np.ndarray, dtype) -> np.ndarray:
    """Sum of the squared deviations of each pair, (P,) Å²."""
    found = np.empty(len(a), dtype)
    with jax.enable_x64(dtype == np.float64):
        start = 0
        while start < len(a):
            size = _PAIRS if len(a) - start > _PAIRS // 2 else _FEW
            stop = min(start + size, len(a))
            x, y = (_rows(each[start:stop], size) for each in (a, b))
            found[start:stop] = np.asarray(_superposed(x, y))[:stop - start]
            start = stop
    return found


def _rows(values: np.ndarray, size: int) -> np.ndarray:
    return values if len(values) == size else np.pad(values, ((0, size - len(values)), (0, 0), (0, 0)))


@jax.jit
def _superposed(a: jax.Array, b: jax.Array) -> jax.Array:
    """Least sums of squared deviations (P,) of centred positions a, b (P, n, 3) over all rotations of b."""
    # pairs last: all that follows is then elementwise along contiguous memory
    ax, ay, az = a.transpose(2, 1, 0)
    bx, by, bz = b.transpose(2, 1, 0)
    w, x, y, z = _top_eigenvector(_horn((ax, ay, az), (bx, by, bz)))
    dx = ax - ((1 - 2 * (y * y + z * z)) * bx + 2 * (x * y - w * z) * by + 2 * (x * z + w * y) * bz)
    dy = ay - (2 * (x * y + w * z) * bx + (1 - 2 * (x * x + z * z)) * by + 2 * (y * z - w * x) * bz)
    dz = az - (2 * (x * z - w * y) * bx + 2 * (y * z + w * x) * by + (1 - 2 * (x * x + y * y)) * bz)
    return (dx * dx + dy * dy + dz * dz).sum(0)


def _horn(a, b) -> dict[tuple[int, int], jax.Array]:
    """Upper triangle of Horn's matrix, shifted by half of the sum of squares so that no eigenvalue is negative."""
    s = [[(b[i] * a[j]).sum(0) for j in range(3)] for i in range(3)]
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = s
    shift = 0.5 * sum((v * v).sum(0) for v in (*a, *b))
    return {(0, 0): xx + yy + zz + shift, (0, 1): yz - zy, (0, 2): zx - xz, (0, 3): xy - yx,
            (1, 1): xx - yy - zz + shift, (1, 2): xy + yx, (1, 3): zx + xz,
            (2, 2): yy - xx - zz + shift, (2, 3): yz + zy, (3, 3): zz - xx - yy + shift}


def _top_eigenvector(matrix) -> tuple[jax.Array, ...]:
    """Unit eigenvector of the largest eigenvalue; zero of a matrix that is zero."""
    def at(m, i, j):
        return m[min(i, j), max(i, j)]

    def scaled(m):
        trace = m[0, 0] + m[1, 1] + m[2, 2] + m[3, 3]
        factor = 1 / jnp.where(trace > 0, trace, 1)
        return {place: value * factor for place, value in m.items()}

    def square(_, m):
        return scaled({(i, j): sum(at(m, i, k) * at(m, k, j) for k in range(4)) for i, j in m})

    # not unrolled, which would take seconds to compile and a little longer to run
    m = jax.lax.fori_loop(0, _SQUARINGS, square, scaled(matrix))
    # all columns are multiples of the vector; the one with the largest diagonal is the most exact
    column, largest = [at(m, i, 0) for i in range(4)], m[0, 0]
    for j in range(1, 4):
        better = m[j, j] > largest
        column = [jnp.where(better, at(m, i, j), column[i]) for i in range(4)]
        largest = jnp.where(better, m[j, j], largest)
    norm = jnp.sqrt(sum(c * c for c in column))
    return tuple(c / jnp.where(norm > 0, norm, 1) for c in column)
