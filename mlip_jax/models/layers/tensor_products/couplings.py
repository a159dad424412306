"""Real Clebsch-Gordan couplings and spherical harmonics, in the basis of e3x.

They are computed in float64 with NumPy; e3x has the same values in the precision of JAX. The signs
agree with e3nn from version 0.5 on. MACE is defined with e3nn 0.4.4, where some couplings have the
opposite sign (`old_signs`).
"""

from __future__ import annotations

import functools
from math import factorial, sqrt

import jax
import jax.numpy as jnp
import numpy as np

# Degrees, in ascending order, with the opposite sign in e3nn 0.4.4, besides (1, l, l) with l > 1.
_FLIPPED = {(3, 4, 6), (4, 4, 5), (4, 5, 6), (5, 5, 5), (5, 6, 6)}


@functools.cache
def coupling(l1: int, l2: int, l3: int, old_signs: bool = False) -> np.ndarray:
    """Return the coupling of degrees l1 and l2 to l3, shape (2 l1 + 1, 2 l2 + 1, 2 l3 + 1).

    The sum of its squares is 2 l3 + 1. It equals sqrt(2 l3 + 1) times the "wigner_3j" of e3nn, in
    another basis.

    Args:
      l1, l2, l3: Degrees with abs(l1 - l2) <= l3 <= l1 + l2.
      old_signs: Take the signs of e3nn 0.4.4.

    Raises:
      ValueError: The degrees do not couple.
    """
    if not abs(l1 - l2) <= l3 <= l1 + l2:
        raise ValueError(f"degrees {l1} and {l2} do not couple to {l3}")
    complex_coupling = np.zeros((2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1))
    for m1 in range(-l1, l1 + 1):
        for m2 in range(-l2, l2 + 1):
            if abs(m1 + m2) <= l3:
                complex_coupling[l1 + m1, l2 + m2, l3 + m1 + m2] = _clebsch_gordan(
                    l1, m1, l2, m2, l3, m1 + m2
                )
    real = np.einsum(
        "ia,jb,kc,ijk->abc",
        _real_basis(l1),
        _real_basis(l2),
        _real_basis(l3).conj(),
        complex_coupling,
    )
    values = real.real * (sqrt(2 * l3 + 1) / np.linalg.norm(real.real))
    values[np.abs(values) < 1e-12] = 0.0
    low, middle, high = sorted((l1, l2, l3))
    flipped = (low == 1 and middle == high > 1) or (low, middle, high) in _FLIPPED
    values = -values if old_signs and flipped else values
    values.flags.writeable = False  # the cache shares it
    return values


def _clebsch_gordan(j1, m1, j2, m2, j3, m3):
    """Compute <j1 m1 j2 m2 | j3 m3> with Racah's formula."""
    f = factorial
    scale = sqrt(
        (2 * j3 + 1) * f(j3 + j1 - j2) * f(j3 - j1 + j2) * f(j1 + j2 - j3) / f(j1 + j2 + j3 + 1)
    )
    scale *= sqrt(f(j3 + m3) * f(j3 - m3) * f(j1 - m1) * f(j1 + m1) * f(j2 - m2) * f(j2 + m2))
    total = 0.0
    for k in range(j1 + j2 - j3 + 1):
        terms = (k, j1 + j2 - j3 - k, j1 - m1 - k, j2 + m2 - k, j3 - j2 + m1 + k, j3 - j1 - m2 + k)
        if min(terms) >= 0:
            total += (-1) ** k / float(np.prod([float(f(n)) for n in terms]))
    return scale * total


def _real_basis(l: int) -> np.ndarray:
    """Return real harmonics in terms of complex ones, shape (2l + 1, 2l + 1).

    Rows are m = -l, ..., l of the complex harmonics, columns m = l, -l, l - 1, ..., 0 of the real
    ones. The phase (-i)^l makes couplings real.
    """
    basis = np.zeros((2 * l + 1, 2 * l + 1), complex)
    for column, m in enumerate(_orders(l)):
        if m == 0:
            basis[l, column] = 1.0
        elif m > 0:
            basis[l + m, column], basis[l - m, column] = (-1) ** m / sqrt(2), 1 / sqrt(2)
        else:
            basis[l - m, column], basis[l + m, column] = 1j * (-1) ** m / sqrt(2), -1j / sqrt(2)
    return (-1j) ** l * basis


def _orders(l: int) -> list[int]:
    """Return the orders m of the components of degree l: l, -l, l - 1, ..., 0."""
    return [m for k in range(l, 0, -1) for m in (k, -k)] + [0]


def e3nn_coupling(l1: int, l2: int, l3: int) -> np.ndarray:
    """Return a coupling in the basis and norm of e3nn, its "wigner_3j" from version 0.5 on.

    The components of e3nn are m = -l, ..., l about the y axis.
    """
    order = [e3nn_components(l) for l in (l1, l2, l3)]
    return coupling(l1, l2, l3)[np.ix_(*order)] / sqrt(2 * l3 + 1)


def e3nn_components(l: int) -> np.ndarray:
    """Return the index of each component of degree l of e3nn among ours."""
    return np.argsort(_orders(l))


def nonzero(values: np.ndarray) -> list[tuple[int, int, int, float]]:
    """Return the nonzero entries of a coupling: (component 1, 2, 3, value)."""
    return [(*map(int, index), float(values[tuple(index)])) for index in np.argwhere(values)]


def spherical_harmonics(vectors: jax.Array, max_degree: int) -> list[jax.Array]:
    """Compute spherical harmonics with squared norm 2l + 1 ("4pi" in e3x, "component" in e3nn).

    They are homogeneous polynomials of the vectors: those of degree l scale with the length to the
    power of l.

    Args:
      vectors: Unit vectors, shape (P, 3).
      max_degree: Largest degree.

    Returns:
      For each degree, an array of shape (P, 2l + 1).
    """
    # products and sums of numbers (P,): a matrix product may round to TF32
    unit = [vectors[:, x] for x in range(3)]
    components = [[jnp.ones_like(unit[0])], [sqrt(3.0) * x for x in unit]]
    for l in range(1, max_degree):
        higher = [jnp.zeros_like(unit[0])] * (2 * l + 3)
        for a, b, c, value in _recursion(l):
            higher[c] = higher[c] + value * components[l][a] * unit[b]
        components.append(higher)
    return [jnp.stack(values, axis=-1) for values in components[: max_degree + 1]]


@functools.cache
def _recursion(l: int) -> tuple[tuple[int, int, int, float], ...]:
    """Return the terms of harmonics of degree l + 1 as products of degree l and a unit vector."""
    # along z only the last component is not zero: sqrt(2l + 1) for degree l, 1 for the vector
    values = coupling(l, 1, l + 1)
    scale = sqrt(2 * l + 3) / (float(values[-1, -1, -1]) * sqrt(2 * l + 1))
    return tuple((a, b, c, scale * value) for a, b, c, value in nonzero(values))


def opposite(harmonics: list[jax.Array]) -> list[jax.Array]:
    """Return the harmonics of the opposite vectors."""
    return [values if l % 2 == 0 else -values for l, values in enumerate(harmonics)]
