"""Tests for equivariant features of edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.graphs.graph import Pairs
from mlip_jax.models.layers.tensor_products.couplings import coupling, spherical_harmonics
from mlip_jax.models.layers.tensor_products.edge_booster import (
    Direction,
    ElementPairNetwork,
    PairEmbedding,
    product_of_harmonics,
    summed_paths,
)

pytestmark = pytest.mark.usefixtures("double_precision")


def test_products_of_harmonics_are_multiples_of_harmonics():
    vector = np.array([[0.36, -0.48, 0.8]])
    harmonics = [np.asarray(y)[0] for y in spherical_harmonics(jnp.asarray(vector), 3)]
    for path in summed_paths(3, 3):
        l1, l2, l3 = path.source.degree, path.degree, path.target.degree
        product = np.einsum("a,b,abc->c", harmonics[l1], harmonics[l2], coupling(l1, l2, l3))
        expected = product_of_harmonics(l1, l2, l3) * harmonics[l3]
        np.testing.assert_allclose(product, expected, atol=1e-12)


def test_paths_are_divided_by_the_root_of_their_number():
    paths = summed_paths(1, 2)
    assert [(p.source.degree, p.degree, p.target.degree) for p in paths] == [
        (0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 0, 1), (1, 1, 0), (1, 1, 2), (1, 2, 1)
    ]  # fmt: skip
    assert [p.scale for p in paths if p.target.degree == 1] == pytest.approx([3**-0.5] * 3)


def direction(senders, receivers):
    return Direction(Pairs(receivers, senders, jnp.zeros((len(senders), 3)), False), [])


@pytest.mark.parametrize(
    "module", [ElementPairNetwork((5, 4, 3), (1, 6)), PairEmbedding(4, (1, 6))]
)
def test_table_of_element_pairs_gives_the_same_as_single_edges(module):
    """With fewer pairs of elements than edges, networks are evaluated for pairs of elements."""
    numbers = jnp.array([1, 6, 6])
    indices = [jnp.asarray(np.random.default_rng(k).integers(0, 3, 7)) for k in (0, 1)]

    @jax.jit
    def run(params, senders, receivers):
        way = direction(senders, receivers)
        if isinstance(module, PairEmbedding):
            return module.apply(params, way, numbers, jnp.float64)
        weights = module.apply(params, way, numbers, jnp.float64, method="path_weights")
        return weights.values()

    args = (direction(*indices), numbers, jnp.float64)
    method = None if isinstance(module, PairEmbedding) else "path_weights"
    params = jax.jit(lambda key: module.init(key, *args, method=method))(jax.random.key(0))
    many = run(params, *indices)
    few = jnp.concatenate([run(params, *(i[k : k + 1] for i in indices)) for k in range(7)])
    np.testing.assert_allclose(many, few, rtol=1e-12)
