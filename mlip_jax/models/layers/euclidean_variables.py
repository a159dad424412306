"""Operations on Euclidean variables: components of several degrees l, 2l + 1 each.

D   number of components: the sum of 2l + 1 over the degrees
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.target_device import target_platform


def orthonormal_harmonics(unit: jax.Array, degrees: Sequence[int]) -> jax.Array:
    """Compute orthonormal real spherical harmonics of `degrees`, concatenated.

    The shape (P, 3) becomes (P, D), with m = -l, ..., l for each degree. Those of zero vectors are
    zero, except that of degree 0.
    """
    evaluate = _harmonics if target_platform() == "cpu" else _harmonics_with_slopes
    return evaluate(tuple(degrees), unit)


def _harmonics(degrees, unit):
    # builds tables of couplings and of polynomials, which takes two seconds
    import e3x

    # e3x compiles a program per component to sort them in its Cartesian order
    values = e3x.so3.spherical_harmonics(
        unit, max(degrees), r_is_normalized=True, cartesian_order=False, normalization="orthonormal"
    )
    values = values.astype(unit.dtype)  # with x64, e3x converts float32 to float64
    if degrees == tuple(range(degrees[0], degrees[-1] + 1)):
        return values[:, degrees[0] ** 2 :]  # without a copy
    return jnp.concatenate([values[:, l * l : (l + 1) ** 2] for l in degrees], axis=-1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _harmonics_with_slopes(degrees, unit):
    """Compute harmonics whose derivative is a product: that of e3x adds with atomic operations."""
    return _harmonics(degrees, unit)


@_harmonics_with_slopes.defjvp
def _harmonics_jvp(degrees, primals, tangents):
    (unit,), (turn,) = primals, tangents
    axes = jnp.eye(3, dtype=unit.dtype)
    function = functools.partial(_harmonics, degrees)
    slopes = [jax.jvp(function, (unit,), (jnp.broadcast_to(a, unit.shape),))[1] for a in axes]
    return function(unit), sum(slope * turn[:, x, None] for x, slope in enumerate(slopes))


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
    if target_platform() == "cpu":
        index = np.repeat(np.arange(len(degrees)), [2 * l + 1 for l in degrees])
        return values[..., index]
    # the derivative of the form above is a sum with atomic operations
    parts = [
        jnp.broadcast_to(values[..., n : n + 1], (*values.shape[:-1], 2 * l + 1))
        for n, l in enumerate(degrees)
    ]
    return jnp.concatenate(parts, axis=-1)


def parity(degrees: tuple[int, ...], dtype) -> jax.Array:
    """Return (-1)^l for each component, shape (D,).

    The harmonics of -r are those of r times this parity.
    """
    return jnp.asarray(
        np.repeat([(-1.0) ** l for l in degrees], [2 * l + 1 for l in degrees]), dtype
    )
