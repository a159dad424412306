"""Spherical Bessel functions of the distance, as in DimeNet (Gasteiger et al., ICLR 2020, eq. 6).

R_ln(x) = N_ln j_l(z_ln x), with x the distance in units of the cutoff, z_ln the n-th positive zero
of j_l, and N_ln = sqrt(2) / |j_{l+1}(z_ln)|.

The closed forms and the upward recursion of j_l lose all digits of float32 at short distances, for
example for l = 6 below a quarter of the cutoff. The functions are therefore sums of Chebyshev
polynomials, whose values and derivatives have the rounding errors of a sum.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

# of the polynomials: 1e-14 for up to ten degrees and radial functions
_TERMS = 56


def spherical_bessel(
    x: jax.Array,
    num_degrees: int,
    num_radial: int,
    rounded: bool = False,
    half_integer: bool = True,
) -> jax.Array:
    """Compute R_ln: (P,) -> (P, num_degrees, num_radial).

    Args:
      x: Distances in units of the cutoff. Values above 1 are treated as 1, where all R_ln vanish.
      num_degrees: Number of degrees l, from 0.
      num_radial: Number of zeros n of each degree.
      rounded: Whether zeros and normalization are rounded to single precision, as in the published
        implementations. This changes R_ln by about 1e-7.
      half_integer: Whether rounded normalizations are computed from Bessel functions of half-integer
        order, as in DimeNet++ and SphereNet, or from spherical ones, as in ComENet.
    """
    coefficients = jnp.asarray(
        _coefficients(num_degrees, num_radial, rounded, half_integer), x.dtype
    )
    t = 2.0 * jnp.minimum(x, 1.0) - 1.0
    polynomials = [jnp.ones_like(t), t]
    while len(polynomials) < len(coefficients):
        polynomials.append(2.0 * t * polynomials[-1] - polynomials[-2])
    values = jnp.matmul(
        jnp.stack(polynomials, axis=-1), coefficients, precision=jax.lax.Precision.HIGHEST
    )
    return values.reshape(len(x), num_degrees, num_radial)


@functools.cache
def _coefficients(
    num_degrees: int, num_radial: int, rounded: bool, half_integer: bool
) -> np.ndarray:
    """Return Chebyshev coefficients on [0, 1], (_TERMS, num_degrees * num_radial)."""
    from scipy.special import spherical_jn

    zeros = bessel_zeros(num_degrees, num_radial)
    norms = np.sqrt(2.0) / np.abs(spherical_jn(np.arange(num_degrees)[:, None] + 1, zeros))
    if rounded:
        zeros = zeros.astype(np.float32)
        norms, zeros = _rounded_norms(zeros, half_integer), zeros.astype(np.float64)
    # values at the Chebyshev nodes, then a discrete cosine transform
    angles = (np.arange(_TERMS) + 0.5) * np.pi / _TERMS
    x = 0.5 * (np.cos(angles) + 1.0)
    degrees = np.arange(num_degrees)[:, None, None]
    values = norms[..., None] * spherical_jn(degrees, zeros[..., None] * x)
    transform = 2.0 / _TERMS * np.cos(np.arange(_TERMS)[:, None] * angles)
    transform[0] /= 2.0
    return transform @ values.reshape(-1, _TERMS).T


@functools.cache
def bessel_zeros(num_degrees: int, num_radial: int) -> np.ndarray:
    """Return the first positive zeros of the spherical Bessel functions, (num_degrees, num_radial).

    The zeros of j_l lie between those of j_{l-1}.
    """
    from scipy.optimize import brentq
    from scipy.special import spherical_jn

    rows = [np.arange(1, num_radial + num_degrees) * np.pi]
    for l in range(1, num_degrees):
        function = functools.partial(spherical_jn, l)
        between = zip(rows[-1][:-1], rows[-1][1:])
        rows.append(np.array([brentq(function, *pair, xtol=1e-14) for pair in between]))
    return np.stack([row[:num_radial] for row in rows])


def _rounded_norms(zeros: np.ndarray, half_integer: bool) -> np.ndarray:
    """Return normalizations computed in single precision, as PyTorch Geometric and DIG do."""
    from scipy.special import jv, spherical_jn

    if half_integer:
        order = np.arange(len(zeros), dtype=np.float32)[:, None] + np.float32(1.5)
        values = np.sqrt(np.float32(np.pi) / (2 * zeros)) * jv(order, zeros)
        return (1 / np.sqrt(np.float32(0.5) * values**2)).astype(np.float64)
    values = spherical_jn(np.arange(len(zeros))[:, None] + 1, zeros)
    return 1 / np.sqrt(0.5 * values.astype(np.float64) ** 2)
