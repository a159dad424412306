"""Operations on Euclidean variables: components of several degrees l, 2l + 1 each.

D   number of components: the sum of 2l + 1 over the degrees
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


def orthonormal_harmonics(unit: jax.Array, degrees: Sequence[int]) -> jax.Array:
    """Compute orthonormal real spherical harmonics of `degrees`, concatenated.

    The shape (P, 3) becomes (P, D). Those of zero vectors are zero, except that of degree 0. They
    are the harmonics of e3x: polynomials with the coefficients in its table.
    """
    powers, coefficients = e3x_polynomials(max(degrees))  # (M, 3), (M, (max degree + 1)**2)
    columns = [k for l in degrees for k in range(l * l, (l + 1) ** 2)]
    # powers of x, y and z: (degree + 1, P, 3). Products have finite derivatives at 0, unlike `**`.
    each = [jnp.ones_like(unit)]
    for _ in range(max(degrees)):
        each.append(each[-1] * unit)
    each = jnp.stack(each)
    x, y, z = (each[powers[:, axis], :, axis] for axis in range(3))  # (M, P)
    return (x * y * z).T @ jnp.asarray(coefficients[:, columns], unit.dtype)


@functools.cache
def e3x_polynomials(max_degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Return e3x's orthonormal harmonics as polynomials, in float64.

    They are read from the table in the package. Importing e3x takes a second, and
    `e3x.so3.spherical_harmonics` compiles fifty small programs each time that it is traced.

    Returns:
      Powers of x, y and z in each of the M monomials, (M, 3), and the coefficients of the
      harmonics, (M, (max_degree + 1)**2), in e3x's Cartesian order.

    Raises:
      ImportError: The installed e3x has no such table.
      ValueError: The table ends below this degree.
    """
    (package,) = importlib.util.find_spec("e3x").submodule_search_locations
    path = Path(package) / "so3" / "_spherical_harmonics_lut.npz"
    if not path.exists():
        raise ImportError(
            f"{path}: not found. Install e3x 1.0, for example: pip install e3x==1.0.2"
        )
    with np.load(path) as table:
        if max_degree > int(table["max_degree"]):
            raise ValueError(
                f"harmonics of degree {max_degree}: the largest known is {table['max_degree']}"
            )
        powers = table["ls"]
        coefficients = np.zeros((len(powers), (int(table["max_degree"]) + 1) ** 2))
        coefficients[table["i0"], table["i1"]] = table["cm"]
    powers = powers[powers.sum(axis=1) <= max_degree]
    columns = []  # of degree l, in the table by m = -l ... l: m = l, -l, l - 1, ..., 0
    for l in range(max_degree + 1):
        orders = [m for k in range(l, 0, -1) for m in (k, -k)] + [0]
        coefficients[:, l * l : (l + 1) ** 2] *= np.sqrt((2 * l + 1) / (4 * np.pi))
        columns += [l * l + l + m for m in orders]
    return powers, coefficients[: len(powers), columns]


def degree_invariants(x: jax.Array, degrees: tuple[int, ...]) -> jax.Array:
    """Compute the squared norm of each degree over sqrt(2l + 1).

    The shape (..., D) becomes (..., number of degrees).
    """
    squares, start, out = x * x, 0, []
    for l in degrees:
        out.append(squares[..., start : start + 2 * l + 1].sum(-1) / float(np.sqrt(2 * l + 1)))
        start += 2 * l + 1
    return jnp.stack(out, axis=-1)


def repeat_degrees(values: jax.Array, degrees: tuple[int, ...]) -> jax.Array:
    """Repeat the value of each degree for each of its components.

    The shape (..., number of degrees) becomes (..., D).
    """
    index = np.repeat(np.arange(len(degrees)), [2 * l + 1 for l in degrees])
    return values[..., index]


def parity(degrees: tuple[int, ...], dtype) -> jax.Array:
    """Return (-1)^l for each component, shape (D,).

    The harmonics of -r are those of r times this parity.
    """
    return jnp.asarray(
        np.repeat([(-1.0) ** l for l in degrees], [2 * l + 1 for l in degrees]), dtype
    )
