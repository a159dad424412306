"""Symmetric contraction: equivariant polynomials of the features of an atom, as in MACE.

    B_lm = sum_order sum_path w[Z, path] (A_l1 x A_l2 x ... )_path,lm

A path couples the first two factors to an intermediate degree, this with the next factor, and so
on, up to degree l. MACE has a weight for every path, but for equal factors most of the polynomials
are linear combinations of others: of the 23 scalars of order 3 up to degree 3, eight are
independent, of the 51 vectors twelve. Only those are evaluated, with combined weights, which are
computed for each element. The last coupling comes after the sum over the paths that share it
(Horner's scheme). Couplings are computed by product_algebras.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.models.layers.tensor_products.couplings import coupling
from mlip_jax.models.layers.tensor_products.irreps import Features, natural
from mlip_jax.models.layers.tensor_products.linear import element_index, table_rows
from mlip_jax.models.layers.tensor_products.product_algebras import (
    Algebra,
    MatrixProducts,
    WrittenOut,
    unstack,
)


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
    values = np.stack([evaluate_path(path, factors, old_signs).ravel() for path in paths])
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


def evaluate_path(path: ProductPath, factors: list[np.ndarray], old_signs: bool) -> np.ndarray:
    """Evaluate a path for equal factors, shape (samples, 2l + 1) per degree."""
    value, degree = factors[path.degrees[0]], path.results[0]
    for l, result in zip(path.degrees[1:], path.results[1:]):
        value = np.einsum(
            "sa,sb,abc->sc", value, factors[l], coupling(degree, l, result, old_signs)
        )
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
        weights = unstack(table_rows(jnp.concatenate(tables, axis=1), index))
        # few products of equal factors are written out, the many of different factors are not
        algebra = (WrittenOut if equal else MatrixProducts)(self.old_signs)
        factors = [factors] * self.correlation if equal else factors
        parts = [[algebra.split(f[irrep]) for irrep in irreps] for f in factors[:1]]
        parts += [parts[0] if equal else [algebra.split(f[i]) for i in irreps] for f in factors[1:]]
        totals = evaluate_paths(algebra, plan, parts, weights)
        return {natural(l)[l]: algebra.join(totals[l]) for l in self.targets}

    def _reduce(self, order, target, equal, table):
        """Return the paths to evaluate and their weights, shape (elements, paths, C)."""
        if not equal:
            return product_paths(self.max_degree, order, target), table
        paths, combination = independent_paths(self.max_degree, order, target, self.old_signs)
        exact = jax.lax.Precision.HIGHEST  # no rounding to bfloat16 or TF32
        combination = jnp.asarray(combination, table.dtype)
        return paths, jnp.einsum("qp,zpc->zqc", combination, table, precision=exact)


def evaluate_paths(algebra: Algebra, plan, parts, weights) -> dict:
    """Compute the products of each target.

    Args:
      algebra: How to compute couplings.
      plan: Paths for each (target, order), in the order of the weights.
      parts: Value of each degree of each factor.
      weights: Weight of each path, shape (N, C).
    """
    highest = max(order for _, order in plan)
    weights, totals = iter(weights), {}
    values = _intermediate_products(algebra, plan, parts, highest)
    for (target, order), paths in plan.items():
        if order < highest or order == 1:
            terms = [algebra.scale(next(weights), values[path]) for path in paths]
        else:
            groups: dict[tuple[int, int], list] = {}
            for path in paths:
                term = algebra.scale(next(weights), values[path.parent])
                groups.setdefault((path.results[-2], path.degrees[-1]), []).append(term)
            terms = [
                algebra.couple(algebra.add(group), parts[order - 1][l], degree, l, (target,))[0]
                for (degree, l), group in groups.items()
            ]
        totals[target] = algebra.add([totals[target], *terms] if target in totals else terms)
    return totals


def _intermediate_products(algebra: Algebra, plan, parts, highest: int) -> dict:
    """Compute the products of fewer than `highest` factors that the paths of `plan` need."""
    needed = {}  # a dict, since the order of a set is random
    for (_, order), paths in plan.items():
        for path in paths:
            path = path if order < highest or order == 1 else path.parent
            while path.degrees:
                needed[path] = None
                path = path.parent
    values = {path: parts[0][path.degrees[0]] for path in needed if len(path.degrees) == 1}
    for order in range(2, highest):
        groups: dict[tuple[ProductPath, int], list[ProductPath]] = {}
        for path in sorted(path for path in needed if len(path.degrees) == order):
            groups.setdefault((path.parent, path.degrees[-1]), []).append(path)
        for (parent, l), paths in groups.items():
            results = tuple(path.results[-1] for path in paths)
            degree = parent.results[-1]
            products = algebra.couple(values[parent], parts[order - 1][l], degree, l, results)
            values |= dict(zip(paths, products))
    return values
