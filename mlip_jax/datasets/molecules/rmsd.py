"""Root mean square deviations of conformers after the best superposition (Kabsch's problem), many at once, in JAX.

The best proper rotation is the eigenvector of the largest eigenvalue of Horn's 4 x 4 matrix (J. Opt. Soc. Am. A 4, 629
(1987); Theobald, Acta Cryst. A 61, 478 (2005)): mirror images are not superposed. It is found by squaring the
matrix, shifted to be positive, sixteen times, which needs no branches and no decomposition and is safe where
eigenvalues coincide (linear molecules). On a CPU it takes a fifth of the time of the singular value decompositions of
`geometry.kabsch_align`. The deviation is that of the rotated positions themselves and not G - 2 lambda, of which single
precision would leave 1e-3 Å.

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
_AHEAD = 4 * _PAIRS  # pairs that are gathered before they are worked on
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
    return next(_minima([molecule], dtype, each_pair=True))


def nearest_rmsd(molecules: Iterable[Conformers], *, dtype: type = np.float32) -> Iterator[np.ndarray]:
    """For each molecule the RMSD of each test conformer to the nearest training conformer, (T,) Å, float64.

    Molecules are taken from the iterable some thousands of pairs ahead: they are worked on together, so that small
    ones cost no more per pair than large ones. Infinite where there is no training conformer, NaN without atoms.

    Args:
      dtype: As for `cross_rmsd`.

    Raises:
      ValueError: As `cross_rmsd`.
    """
    return _minima(molecules, dtype, each_pair=False)


def _minima(molecules: Iterable[Conformers], dtype: type, each_pair: bool) -> Iterator[np.ndarray]:
    """The least RMSDs of the pairs (T, R) of each molecule, or of its test conformers (T,)."""
    done: list[np.ndarray] = []
    batch = _Batch(dtype)
    for molecule in molecules:
        test, train = (x.astype(dtype) for x in _checked(molecule))
        found = np.full((len(test), len(train)) if each_pair else len(test), np.inf if test.shape[1] else np.nan)
        done.append(found)
        for t, r, a, b in _blocks(test, train, molecule.permutations) if test.shape[1] else ():
            batch.add(found, (t, r) if each_pair else (t,), a, b)
            if batch.count >= _AHEAD:
                batch.run()
                yield from done[:-1]  # of the last one there may be more
                done = done[-1:]
    batch.run()
    yield from done


def _checked(molecule: Conformers) -> tuple[np.ndarray, np.ndarray]:
    """Test conformers (T, n, 3) and training conformers (R, n, 3), centred, float64."""
    test, train = np.asarray(molecule.test, np.float64), np.asarray(molecule.train, np.float64)
    if test.ndim != 3 or train.ndim != 3 or test.shape[1:] != train.shape[1:] or test.shape[2] != 3:
        raise ValueError(f"expected conformers of shapes (T, n, 3) and (R, n, 3); received {test.shape} and "
                         f"{train.shape}")
    n = test.shape[1]
    orders = molecule.permutations
    if orders is not None and (np.ndim(orders) != 2 or np.shape(orders)[1] != n or not len(orders)):
        raise ValueError(f"expected permutations of shape (Q, {n}) with Q at least 1; received {np.shape(orders)}")
    return (test, train) if n == 0 else tuple(x - x.mean(1, keepdims=True) for x in (test, train))


def _blocks(test: np.ndarray, train: np.ndarray, permutations: np.ndarray | None
            ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """All pairs in pieces that do not grow with the molecule: numbers t, r (P,) and positions (P, n, 3) of both."""
    orders = np.arange(test.shape[1])[None] if permutations is None else np.asarray(permutations)
    some_train = int(np.clip(_AHEAD // len(orders), 1, max(len(train), 1)))
    some_test = int(np.clip(_AHEAD // (len(orders) * some_train), 1, max(len(test), 1)))
    for first_t in range(0, len(test), some_test):
        for first_r in range(0, len(train), some_train):
            a, b = test[first_t:first_t + some_test], train[first_r:first_r + some_train]
            t, r, q = (x.ravel() for x in np.indices((len(a), len(b), len(orders))))
            yield t + first_t, r + first_r, a[t], b[r] if permutations is None else b[r[:, None], orders[q]]


class _Batch:
    """Pairs of several molecules that wait to be worked on together."""

    def __init__(self, dtype: type):
        self._dtype, self.count = dtype, 0
        self._waiting: dict[int, list] = {}  # by the room for atoms

    def add(self, found: np.ndarray, places: tuple[np.ndarray, ...], a: np.ndarray, b: np.ndarray) -> None:
        """The least RMSDs of pairs of positions a, b (P, n, 3) are to go to `places` of `found`."""
        room = -(-a.shape[1] // _ATOMS) * _ATOMS
        # further atoms at the centre add nothing to any sum
        padded = [np.pad(x, ((0, 0), (0, room - x.shape[1]), (0, 0))) for x in (a, b)]
        self._waiting.setdefault(room, []).append((found, places, a.shape[1], *padded))
        self.count += len(a)

    def run(self) -> None:
        """Work on all pairs."""
        for pieces in self._waiting.values():
            sums = _sums(*(np.concatenate([piece[k] for piece in pieces]) for k in (3, 4)), self._dtype)
            ends = np.cumsum([len(piece[3]) for piece in pieces])[:-1]
            for (found, places, n, *_), here in zip(pieces, np.split(sums, ends)):
                np.minimum.at(found, places, np.sqrt(here.astype(np.float64) / n))
        self._waiting, self.count = {}, 0


def _sums(a: np.ndarray, b: np.ndarray, dtype: type) -> np.ndarray:
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
