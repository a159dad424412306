"""Functions of the distance on a grid of knots: cubic B-splines, twice continuously differentiable.

A filter network depends only on the distance. Evaluating it on a few dozen knots and interpolating
costs one thin matrix product per edge instead of two wide ones and an activation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


class SplineGrid:
    """Grid of knots, evenly spaced in exp(-d) from the cutoff to zero distance.

    Radial bases have their finest details at short distances, where these knots are dense.

    Attributes:
      num: Number of knots, at least 5.
      cutoff: Cutoff radius (Å); beyond it the interpolant keeps its value at the cutoff.
    """

    def __init__(self, num: int, cutoff: float):
        if num < 5:
            raise ValueError(f"a spline grid needs at least 5 knots, received {num}")
        self.num, self.cutoff = num, cutoff
        self._low = float(np.exp(-cutoff))

    def distances(self, dtype) -> jax.Array:
        """Return the distances of the knots (Å), shape (num,), from the cutoff down to 0."""
        return jnp.asarray(-np.log(np.linspace(self._low, 1.0, self.num)), dtype)

    def interpolate(self, table: jax.Array, distances: jax.Array) -> jax.Array:
        """Interpolate functions that are tabulated on the knots.

        Args:
          table: Values on the knots, shape (num, F).
          distances: Distances (Å), shape (P,).

        Returns:
          Values at the distances, shape (P, F).
        """
        return self.basis(distances) @ self.coefficients(table)

    def coefficients(self, table: jax.Array) -> jax.Array:
        """Compute coefficients of the B-splines of `basis` from values on the knots.

        The shape (num, F) becomes (num + 2, F).
        """
        return jnp.asarray(self._inverse(), table.dtype) @ table

    def basis(self, distances: jax.Array) -> jax.Array:
        """Compute the cubic B-splines at distances: (P,) -> (P, num + 2).

        At most four values per row are not zero.
        """
        low = jnp.asarray(self._low, distances.dtype)
        position = (jnp.maximum(jnp.exp(-distances), low) - low) * (
            (self.num - 1) / (1.0 - self._low)
        )
        return _cubic(position[:, None] - jnp.arange(-1, self.num + 1, dtype=distances.dtype))

    def _inverse(self) -> np.ndarray:
        """Return the matrix from values on the knots to coefficients, shape (num + 2, num).

        The end conditions are not-a-knot.
        """
        n = self.num
        matrix = np.zeros((n + 2, n + 2))
        for k in range(n):
            matrix[k, k : k + 3] = 1 / 6, 4 / 6, 1 / 6
        third = np.array([-1.0, 4.0, -6.0, 4.0, -1.0])
        matrix[n, :5], matrix[n + 1, -5:] = third, third
        return np.linalg.inv(matrix)[:, :n]


def _cubic(t):
    """Compute the cubic B-spline of unit knots centered at zero; it is zero for |t| >= 2."""
    a = jnp.abs(t)
    outer = jnp.maximum(2.0 - a, 0.0)
    inner = jnp.maximum(1.0 - a, 0.0)
    return (outer * outer * outer - 4.0 * inner * inner * inner) / 6.0
