"""Exponential and logarithm of 3x3 matrices close to the identity, batched, (M, 3, 3).

They work with the difference to the identity, so that small strains keep all their digits in
float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Squarings and Taylor terms of the exponential: exact in float64 for strains of up to 8.
_SQUARINGS, _TERMS = 4, 11
# Square roots, their iterations and terms of the logarithm: exact in float64 for deformations of
# up to 3 and of a third.
_ROOTS, _ITERATIONS, _LOG_TERMS = 2, 7, 12


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the matrix product, (M, k, 3) and (M, 3, 3) -> (M, k, 3)."""
    return jnp.einsum("mij,mjk->mik", a, b, precision=jax.lax.Precision.HIGHEST)


def transpose(a: jax.Array) -> jax.Array:
    """Return the transposed matrices, (M, 3, 3)."""
    return jnp.swapaxes(a, -1, -2)


def inverse(a: jax.Array) -> jax.Array:
    """Return the inverse matrices by their adjugate, (M, 3, 3)."""
    x, y, z = a[:, 0], a[:, 1], a[:, 2]
    columns = jnp.stack([jnp.cross(y, z), jnp.cross(z, x), jnp.cross(x, y)], axis=-1)
    return columns / (x * columns[:, :, 0]).sum(-1)[:, None, None]


def identity(like: jax.Array) -> jax.Array:
    """Return the identity with the dtype of a matrix, (3, 3)."""
    return jnp.eye(3, dtype=like.dtype)


def expm1(a: jax.Array) -> jax.Array:
    """Return exp(a) - 1, (M, 3, 3)."""
    a = a / 2**_SQUARINGS
    total = a / _TERMS
    for k in range(_TERMS - 1, 0, -1):  # Horner: a/1 (1 + a/2 (1 + ...))
        total = matmul(a, identity(a) + total) / k
    for _ in range(_SQUARINGS):  # (1 + e)² - 1
        total = 2 * total + matmul(total, total)
    return total


def log1p(e: jax.Array) -> jax.Array:
    """Return log(1 + e), (M, 3, 3)."""
    for _ in range(_ROOTS):  # sqrt(1 + e) - 1 = e / (1 + sqrt(1 + e))
        e = matmul(e, inverse(identity(e) + _square_root(identity(e) + e)))
    z = matmul(e, inverse(2 * identity(e) + e))
    square, total = matmul(z, z), jnp.zeros_like(z)
    for k in range(_LOG_TERMS - 1, -1, -1):  # 2 artanh(z) = 2 z (1 + z²/3 + z⁴/5 + ...)
        total = matmul(square, total) + identity(e) / (2 * k + 1)
    return 2**_ROOTS * 2 * matmul(z, total)


def _square_root(a: jax.Array) -> jax.Array:
    """Return the square roots by the iteration of Denman and Beavers, (M, 3, 3)."""
    y, z = a, jnp.broadcast_to(identity(a), a.shape)
    for _ in range(_ITERATIONS):
        y, z = (y + inverse(z)) / 2, (z + inverse(y)) / 2
    return y
