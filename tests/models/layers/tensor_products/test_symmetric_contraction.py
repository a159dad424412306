"""Tests for products of several factors: against dense coupling matrices, built as MACE does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.models.layers.tensor_products.couplings import coupling
from mlip_jax.models.layers.tensor_products.irreps import natural
from mlip_jax.models.layers.tensor_products.symmetric_contraction import (
    SymmetricContraction,
    independent_paths,
    product_paths,
)

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.mark.parametrize(
    ("max_degree", "order", "numbers"),
    [
        (1, 2, (2, 2, 1, 0)),
        (1, 3, (4, 6, 3, 1)),
        (2, 2, (3, 4, 4, 2)),
        (2, 3, (11, 21, 23, 16)),
        (3, 2, (4, 6, 7, 6)),
        (3, 3, (23, 51, 65, 65)),
    ],
)
def test_numbers_of_paths_are_those_of_mace(max_degree, order, numbers):
    assert tuple(len(product_paths(max_degree, order, l)) for l in range(4)) == numbers


def test_redundant_paths_are_combined():
    """Scalars of order 3 up to degree 3 are products of degrees (l1, l2, l3) with an even sum."""
    basis = independent_paths(3, 3, 0, True)
    assert sorted(tuple(sorted(path.degrees)) for path in basis.paths) == [
        (0, 0, 0),
        (0, 1, 1),
        (0, 2, 2),
        (0, 3, 3),
        (1, 1, 2),
        (1, 2, 3),
        (2, 2, 2),
        (2, 3, 3),
    ]
    assert [len(independent_paths(3, 3, l, True).paths) for l in range(4)] == [8, 12, 14, 15]


def dense_matrices(max_degree, order, old_signs, natural_only):
    """[(degree, parity, (2l + 1, M, ..., M))] of `order` factors, M = (max_degree + 1)**2.

    With natural_only, intermediate products have parity (-1)^l, as in MACE for four factors.
    """
    size = (max_degree + 1) ** 2
    if order == 1:
        rows = np.eye(size)
        return [(l, (-1) ** l, rows[l * l : (l + 1) ** 2]) for l in range(max_degree + 1)]
    found = []
    for l, parity, matrix in dense_matrices(max_degree, order - 1, old_signs, natural_only):
        for l2 in range(max_degree + 1):
            for l3 in range(abs(l - l2), l + l2 + 1):
                new = np.zeros((2 * l3 + 1, *matrix.shape[1:], size))
                # MACE couples in the order (result, previous, next), with norm sqrt(2 l3 + 1)
                values = coupling(l3, l, l2, old_signs) * np.sqrt((2 * l3 + 1) / (2 * l2 + 1))
                part = np.einsum("cab,a...->c...b", values, matrix)
                new[..., l2 * l2 : (l2 + 1) ** 2] = part
                found.append((l3, parity * (-1) ** l2, new))
    if natural_only:
        found = [entry for entry in found if entry[1] == (-1) ** entry[0]]
    return sorted(found, key=lambda entry: entry[:2])


def dense_contraction(factors, target, correlation, weights, rows, old_signs):
    """Products of the factors, (N, M, C) each, to degree `target`: (N, 2l + 1, C)."""
    total, max_degree = 0.0, int(np.sqrt(factors[0].shape[1])) - 1
    for order in range(1, correlation + 1):
        matrices = dense_matrices(max_degree, order, old_signs, order > 3)
        matching = [m for l, p, m in matrices if (l, p) == (target, (-1) ** target)]
        for k, matrix in enumerate(matching):
            value = np.einsum("ci...,niu->nc...u", matrix, factors[0])
            for factor in factors[1:order]:
                value = np.einsum("nci...u,niu->nc...u", value, factor)
            total = total + value * weights[order][rows, k][:, None]
    return total


@pytest.mark.parametrize(
    ("max_degree", "correlation", "old_signs", "equal"),
    [(2, 3, True, True), (2, 3, False, False), (1, 4, True, True), (2, 2, False, False)],
)
def test_agrees_with_dense_matrices(max_degree, correlation, old_signs, equal):
    rng = np.random.default_rng(0)
    numbers, targets = jnp.array([1, 8, 6, 1]), (0, 1)
    num = 1 if equal else correlation
    dense = [rng.normal(size=(4, (max_degree + 1) ** 2, 3)) for _ in range(num)]
    split = [
        {i: jnp.asarray(d[:, i.degree**2 : (i.degree + 1) ** 2]) for i in natural(max_degree)}
        for d in dense
    ]
    factors = split[0] if equal else split
    module = SymmetricContraction(max_degree, targets, correlation, (1, 6, 8), old_signs)
    shapes = jax.eval_shape(module.init, jax.random.key(0), factors, numbers)["params"]
    params = {name: rng.normal(size=leaf.shape) for name, leaf in shapes.items()}
    found = jax.jit(lambda p: module.apply({"params": p}, factors, numbers))(params)
    dense = dense * correlation if equal else dense
    for target in targets:
        weights = {n: params[f"weights_{target}_{n}"] for n in range(1, correlation + 1)}
        expected = dense_contraction(dense, target, correlation, weights, [0, 2, 1, 0], old_signs)
        np.testing.assert_allclose(found[natural(1)[target]], expected, rtol=1e-10, atol=1e-10)
