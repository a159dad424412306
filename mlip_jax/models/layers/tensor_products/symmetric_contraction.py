"""Symmetric contraction: equivariant polynomials of the features of an atom, as in MACE.

    B_lm = sum_order sum_path w[Z, path] (A_l1 x A_l2 x ... )_path,lm

A path couples the first two factors to an intermediate degree, this with the next factor, and so
on, up to degree l. MACE has a weight for every path, but for equal factors most of the polynomials
are linear combinations of others: of the 23 scalars of order 3 up to degree 3, eight are
independent, of the 51 vectors twelve. Only those are evaluated, with combined weights, which are
computed for each element. Their couplings are written out as sums of products of components, so
nothing but nonzero terms is computed and XLA fuses them. The last coupling comes after the sum
over the paths that share it (Horner's scheme).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.models.layers.basic import gather
from mlip_jax.models.layers.tensor_products.couplings import coupling, nonzero
from mlip_jax.models.layers.tensor_products.irreps import Features, natural
from mlip_jax.models.layers.tensor_products.linear import element_index

Components = list[jax.Array]  # the 2l + 1 components of a degree, shape (N, C) each


class ProductPath(NamedTuple):
    """Coupling of factors, one after another.

    Attributes:
      degrees: Degree of each factor.
      results: Degree of the product of the first 1, 2, ... factors.
    """

    degrees: tuple[int, ...]
    results: tuple[int, ...]

    @property
    def parent(self) -> ProductPath:
        """Path without the last factor."""
        return ProductPath(self.degrees[:-1], self.results[:-1])


@functools.cache
def product_paths(max_degree: int, order: int, target: int) -> tuple[ProductPath, ...]:
    """Return the paths of `order` factors to degree `target`, in the order of MACE's weights.

    Args:
      max_degree: Largest degree of the factors, which have parity (-1)^l.
      order: Number of factors.
      target: Degree of the product, with parity (-1)^target. Intermediate products have either
        parity up to order 3 and parity (-1)^l from order 4 on, as in MACE.
    """
    found = [(ProductPath((l,), (l,)), (-1) ** l) for l in range(max_degree + 1)]
    for _ in range(order - 1):
        longer = [
            (ProductPath((*path.degrees, l), (*path.results, result)), parity * (-1) ** l)
            for path, parity in found
            for l in range(max_degree + 1)
            for result in range(abs(path.results[-1] - l), path.results[-1] + l + 1)
        ]
        if order > 3:
            longer = [x for x in longer if x[1] == (-1) ** x[0].results[-1]]
        found = sorted(longer, key=lambda x: (x[0].results[-1], x[1]))
    return tuple(p for p, parity in found if p.results[-1] == target and parity == (-1) ** target)


class Basis(NamedTuple):
    """Linearly independent paths.

    Attributes:
      paths: The paths.
      combination: Each path of `product_paths` in terms of these, shape (len(paths), all paths).
    """

    paths: tuple[ProductPath, ...]
    combination: np.ndarray


@functools.cache
def independent_paths(max_degree: int, order: int, target: int, old_signs: bool) -> Basis:
    """Choose independent paths for equal factors, with low intermediate degrees.

    Paths are compared by their values for random factors.
    """
    paths = product_paths(max_degree, order, target)
    rng = np.random.default_rng(0)
    factors = [rng.standard_normal((40 + len(paths), 2 * l + 1)) for l in range(max_degree + 1)]
    values = np.stack([_numeric(path, factors, old_signs).ravel() for path in paths])
    scale = np.linalg.norm(values, axis=1).max()
    chosen, basis = [], np.zeros((0, values.shape[1]))
    for k in sorted(range(len(paths)), key=lambda k: (sum(paths[k].results), paths[k])):
        rest = values[k]
        for _ in range(2):  # the second time removes what rounding left
            rest = rest - (basis @ rest) @ basis
        if np.linalg.norm(rest) > 1e-8 * scale:
            chosen.append(k)
            basis = np.concatenate([basis, rest[None] / np.linalg.norm(rest)])
    combination = np.linalg.lstsq(values[chosen].T, values.T, rcond=None)[0]
    combination[np.abs(combination) < 1e-12] = 0.0
    combination.flags.writeable = False  # the cache shares it
    return Basis(tuple(paths[k] for k in chosen), combination)


def _numeric(path: ProductPath, factors: list[np.ndarray], old_signs: bool) -> np.ndarray:
    """Evaluate a path for equal factors, shape (samples, 2l + 1) per degree."""
    value, degree = factors[path.degrees[0]], path.results[0]
    for l, result in zip(path.degrees[1:], path.results[1:]):
        value = np.einsum("sa,sb,abc->sc", value, factors[l], coupling(degree, l, result, old_signs))
        degree = result
    return value


class SymmetricContraction(nn.Module):
    """Sum of the products of up to `correlation` factors, with weights per element.

    Attributes:
      max_degree: Largest degree of the factors.
      targets: Degrees of the output.
      correlation: Largest number of factors.
      elements: Atomic numbers with weights; None for all (linear.element_index).
      old_signs: Take the couplings of e3nn 0.4.4.
    """

    max_degree: int
    targets: tuple[int, ...]
    correlation: int
    elements: tuple[int, ...] | None = None
    old_signs: bool = False

    @nn.compact
    def __call__(self, factors: Features | Sequence[Features], numbers: jax.Array) -> Features:
        """Compute the products.

        Args:
          factors: Features with the irreps natural(max_degree), of the same number of channels;
            or, if the factors differ, `correlation` of them. Products of fewer factors take the
            first ones.
          numbers: Atomic numbers, shape (N,).

        Returns:
          Features of the degrees `targets`, with as many channels.
        """
        irreps, equal = natural(self.max_degree), not isinstance(factors, Sequence)
        some = (factors if equal else factors[0])[irreps[0]]
        num_rows = element_index(numbers, self.elements)[1]
        plan, tables = {}, []
        for target in self.targets:
            for order in range(1, self.correlation + 1):
                num = len(product_paths(self.max_degree, order, target))
                table = self.param(
                    f"weights_{target}_{order}",
                    nn.initializers.normal(1.0 / num),
                    (num_rows, num, some.shape[-1]),
                ).astype(some.dtype)
                plan[target, order], table = self._reduce(order, target, equal, table)
                tables.append(table)
        # weights of each atom, (N, all paths, C), as a list of (N, C)
        index = element_index(numbers, self.elements)[0]
        weights = _unstack(gather(jnp.concatenate(tables, axis=1), index))
        parts = [
            [_unstack(f[irrep]) for irrep in irreps] for f in ([factors] if equal else factors)
        ]
        totals = self._evaluate(plan, parts * self.correlation if equal else parts, weights)
        return {irreps_of_target(l): jnp.stack(totals[l], axis=1) for l in self.targets}

    def _reduce(self, order, target, equal, table):
        """Return the paths to evaluate and their weights, shape (elements, paths, C)."""
        if not equal:
            return product_paths(self.max_degree, order, target), table
        paths, combination = independent_paths(self.max_degree, order, target, self.old_signs)
        exact = jax.lax.Precision.HIGHEST  # no rounding to bfloat16 or TF32
        combination = jnp.asarray(combination, table.dtype)
        return paths, jnp.einsum("qp,zpc->zqc", combination, table, precision=exact)

    def _evaluate(self, plan, parts, weights) -> dict[int, Components]:
        """Compute the products, for each target its components.

        Args:
          plan: Paths for each (target, order), in the order of the weights.
          parts: Components of each degree of each factor.
          weights: Weight of each path, shape (N, C).
        """
        weights = iter(weights)
        values: dict[ProductPath, Components] = {}

        def value(path):
            if path not in values:
                l, order = path.degrees[-1], len(path.degrees)
                values[path] = (
                    parts[0][l]
                    if order == 1
                    else self._couple(
                        value(path.parent),
                        parts[order - 1][l],
                        (path.results[-2], l, path.results[-1]),
                    )
                )
            return values[path]

        totals = {}
        for (target, order), paths in plan.items():
            if order < self.correlation or order == 1:
                terms = [_scale(next(weights), value(path)) for path in paths]
            else:
                groups: dict[tuple[int, int], list[Components]] = {}
                for path in paths:
                    last = (path.results[-2], path.degrees[-1])
                    groups.setdefault(last, []).append(_scale(next(weights), value(path.parent)))
                terms = [
                    self._couple(_add(group), parts[order - 1][l], (degree, l, target))
                    for (degree, l), group in groups.items()
                ]
            totals[target] = _add([totals[target], *terms] if target in totals else terms)
        return totals

    def _couple(self, x: Components, y: Components, degrees: tuple[int, int, int]) -> Components:
        """Couple two factors of the first two `degrees` to the third one."""
        terms = _terms(*degrees, self.old_signs, x is y)
        return [
            sum_of_products([(ratio, x[a], y[b]) for a, b, ratio in rows]) * scale
            for rows, scale in terms
        ]


def irreps_of_target(degree: int):
    """Return the irrep of a degree with parity (-1)^degree."""
    return natural(degree)[degree]


def _unstack(values: jax.Array) -> list[jax.Array]:
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
def _terms(l1: int, l2: int, l3: int, old_signs: bool, equal: bool):
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


def _scale(weight: jax.Array, values: Components) -> Components:
    return [weight * x for x in values]


def _add(terms: list[Components]) -> Components:
    return [functools.reduce(jnp.add, parts) for parts in zip(*terms)]
