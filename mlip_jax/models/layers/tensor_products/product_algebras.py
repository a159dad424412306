"""Two ways to compute couplings of the features of an atom.

`WrittenOut` writes the nonzero terms of a coupling as products of components. XLA fuses them, so
nearly nothing is stored, but the programs are long. `MatrixProducts` multiplies all components with
all components and contracts them with a constant matrix. The programs are shorter.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.models.layers.tensor_products.couplings import coupling, nonzero


class Algebra(Protocol):
    """Operations on the values of one degree; their type depends on the algebra."""

    def split(self, values: jax.Array) -> Any:
        """Convert an array (N, 2l + 1, C) to a value."""

    def join(self, value) -> jax.Array:
        """Convert a value to an array (N, 2l + 1, C)."""

    def scale(self, weight: jax.Array, value) -> Any:
        """Multiply a value by a weight, shape (N, C)."""

    def add(self, values: Sequence) -> Any:
        """Add values."""

    def couple(self, x, y, l1: int, l2: int, results: tuple[int, ...]) -> list:
        """Couple values of degrees l1 and l2 to each degree of `results`."""


class WrittenOut(NamedTuple):
    """Values are lists of 2l + 1 arrays (N, C).

    Attributes:
      old_signs: Take the couplings of e3nn 0.4.4.
    """

    old_signs: bool

    def split(self, values):
        """See `Algebra`."""
        return unstack(values)

    def join(self, value):
        """See `Algebra`."""
        return jnp.stack(value, axis=1)

    def scale(self, weight, value):
        """See `Algebra`."""
        return [weight * x for x in value]

    def add(self, values):
        """See `Algebra`."""
        return [functools.reduce(jnp.add, parts) for parts in zip(*values)]

    def couple(self, x, y, l1, l2, results):
        """See `Algebra`."""
        return [
            [
                sum_of_products([(ratio, x[a], y[b]) for a, b, ratio in terms]) * scale
                for terms, scale in coupling_terms(l1, l2, result, self.old_signs, x is y)
            ]
            for result in results
        ]


class MatrixProducts(NamedTuple):
    """Values are arrays (2l + 1, N, C).

    Attributes:
      old_signs: Take the couplings of e3nn 0.4.4.
    """

    old_signs: bool

    def split(self, values):
        """See `Algebra`."""
        return values.transpose(1, 0, 2)

    def join(self, value):
        """See `Algebra`."""
        return value.transpose(1, 0, 2)

    def scale(self, weight, value):
        """See `Algebra`."""
        return weight * value

    def add(self, values):
        """See `Algebra`."""
        return functools.reduce(jnp.add, values)

    def couple(self, x, y, l1, l2, results):
        """See `Algebra`."""
        tables = [coupling(l1, l2, l, self.old_signs).reshape(-1, 2 * l + 1) for l in results]
        matrix = jnp.asarray(np.concatenate(tables, axis=1).T, x.dtype)
        products = (x[:, None] * y[None]).reshape(matrix.shape[1], -1)
        # no rounding to bfloat16 or TF32
        values = jnp.dot(matrix, products, precision=jax.lax.Precision.HIGHEST)
        parts = jax.lax.split(values, [2 * l + 1 for l in results])
        return [part.reshape(len(part), *x.shape[1:]) for part in parts]


def unstack(values: jax.Array) -> list[jax.Array]:
    """Split the second axis: (N, K, C) -> K times (N, C).

    The derivative is one concatenation, not a sum of K padded arrays.
    """
    parts = jax.lax.split(values, (1,) * values.shape[1], axis=1)
    return [part[:, 0] for part in parts]


def sum_of_products(terms: Sequence[tuple[float, jax.Array, jax.Array]]) -> jax.Array:
    """Compute the sum of factor * x * y, without products by 1 or -1."""
    total = None
    for factor, x, y in terms:
        term = x * y if abs(factor) == 1 else abs(factor) * (x * y)
        if total is None:
            total = term if factor > 0 else -term
        else:
            total = total + term if factor > 0 else total - term
    return total


@functools.cache
def coupling_terms(l1: int, l2: int, l3: int, old_signs: bool, equal: bool):
    """Return the terms of each component of a coupling: [(a, b, ratio), ...], scale.

    The scale of a component is the most frequent magnitude of its terms.

    Args:
      l1, l2, l3, old_signs: See `coupling`.
      equal: Whether both factors are the same, so that terms (a, b) and (b, a) are one.
    """
    values = coupling(l1, l2, l3, old_signs)
    if equal:
        upper = np.triu(np.ones(values.shape[:2]))[..., None]
        diagonal = np.eye(len(values))[..., None]
        values = (values + values.swapaxes(0, 1)) * (upper - 0.5 * diagonal)
    rows = []
    for c in range(2 * l3 + 1):
        found = [(a, b, value) for a, b, k, value in nonzero(values) if k == c]
        sizes, counts = np.unique(np.round([abs(v) for *_, v in found], 12), return_counts=True)
        size = next(abs(v) for *_, v in found if round(abs(v), 12) == sizes[counts.argmax()])
        ratios = [value / size for *_, value in found]
        ratios = [float(np.sign(r)) if abs(abs(r) - 1) < 1e-14 else r for r in ratios]
        rows.append((tuple((a, b, r) for (a, b, _), r in zip(found, ratios)), size))
    return tuple(rows)
