"""Functions of the distance on a grid of knots: cubic B-splines, twice continuously differentiable.

A filter network depends on the distance alone. Evaluating it on some tens of knots and interpolating costs one
thin matrix product per edge in place of two wide ones and an activation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


class SplineGrid:
    """Knots evenly spaced in exp(-d) from the cutoff to zero distance, where radial bases have their detail too.

    Attributes:
      num: Number of knots, at least 5.
      cutoff: Å; beyond it the interpolant is held at its value there.
    """

    def __init__(self, num: int, cutoff: float):
        if num < 5:
            raise ValueError(f"a spline grid needs at least 5 knots, received {num}")
        self.num, self.cutoff = num, cutoff
        self._low = float(np.exp(-cutoff))

    def distances(self, dtype) -> jax.Array:
        """Distances of the knots in Å, shape (num,), descending from the cutoff to 0."""
        return jnp.asarray(-np.log(np.linspace(self._low, 1.0, self.num)), dtype)

    def interpolate(self, table: jax.Array, distances: jax.Array) -> jax.Array:
        """The functions with values `table` (num, F) on the knots, at `distances` (P,): shape (P, F)."""
        return self.basis(distances) @ self.coefficients(table)

    def coefficients(self, table: jax.Array) -> jax.Array:
        """What the B-splines of `basis` are multiplied with, for the values `table` (num, F): shape (num + 2, F)."""
        return jnp.asarray(self._inverse(), table.dtype) @ table

    def basis(self, distances: jax.Array) -> jax.Array:
        """The cubic B-splines at `distances` (P,): shape (P, num + 2), at most four of a row not zero."""
        low = jnp.asarray(self._low, distances.dtype)
        position = (jnp.maximum(jnp.exp(-distances), low) - low) * ((self.num - 1) / (1.0 - self._low))
        return _cubic(position[:, None] - jnp.arange(-1, self.num + 1, dtype=distances.dtype))

    def _inverse(self) -> np.ndarray:
        """Matrix (num + 2, num) from values on the knots to coefficients; the ends are not-a-knot."""
        n = self.num
        matrix = np.zeros((n + 2, n + 2))
        for k in range(n):
            matrix[k, k:k + 3] = 1 / 6, 4 / 6, 1 / 6
        third = np.array([-1.0, 4.0, -6.0, 4.0, -1.0])
        matrix[n, :5], matrix[n + 1, -5:] = third, third
        return np.linalg.inv(matrix)[:, :n]


def _cubic(t):
    """Cubic B-spline of unit knots, centred at zero; zero where |t| >= 2."""
    a = jnp.abs(t)
    outer = jnp.maximum(2.0 - a, 0.0)
    inner = jnp.maximum(1.0 - a, 0.0)
    return (outer * outer * outer - 4.0 * inner * inner * inner) / 6.0
