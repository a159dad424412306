"""Tests for the embeddings of charge and spin, against a plain implementation of the equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax import models
from mlip_jax.models.layers.embeddings import StateEmbedding
from mlip_jax.potential import example_graph

NUMBERS = np.array([8, 1, 1, 6, 1, 0, 0])
NODE_GRAPH = np.array([0, 0, 0, 1, 1, 2, 2])  # the last atom is padding


pytestmark = pytest.mark.usefixtures("double_precision")


@functools.cache
def compiled_embedding():
    module = StateEmbedding(6)

    @jax.jit
    def init(key):
        return module.init(key, jnp.ones(3), NUMBERS, NODE_GRAPH, np.float64)

    @jax.jit
    def apply(params, psi):
        return module.apply({"params": params}, psi, NUMBERS, NODE_GRAPH, np.float64)

    params = init(jax.random.key(0))["params"]
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    return lambda psi: np.asarray(apply(params, np.array(psi))), params


@pytest.fixture
def embedding():
    """Pair (function of psi, its parameters)."""
    return compiled_embedding()


def plain(params, psi, numbers):
    """Compute the embedding of one structure with the number psi, as in the equations."""
    row = 0 if psi >= 0 else 1
    y = np.array(
        [
            np.log(1 + np.exp(params["queries"][z] @ params["keys"][row] / np.sqrt(6)))
            for z in numbers
        ]
    )
    out = []
    for share in psi * y / y.sum():
        x = share * params["values"][row]
        inner = (x / (1 + np.exp(-x))) @ params["residual"]["layer_1"]["kernel"]
        out.append(x + (inner / (1 + np.exp(-inner))) @ params["residual"]["layer_2"]["kernel"])
    return np.array(out)


@pytest.mark.parametrize("psi", [(2.0, -1.0, 0.0), (-3.0, 1.0, 0.0)])
def test_agrees_with_the_equations(embedding, psi):
    function, params = embedding
    embedded = function(psi)
    np.testing.assert_allclose(embedded[:3], plain(params, psi[0], NUMBERS[:3]), rtol=1e-12)
    np.testing.assert_allclose(embedded[3:5], plain(params, psi[1], NUMBERS[3:5]), rtol=1e-12)
    assert np.abs(embedded[:5]).max() > 0.1


def test_zero_gives_zero(embedding):
    function, _ = embedding
    assert not function((0.0, 0.0, 0.0)).any()
    assert not function((0.0, 4.0, 0.0))[[0, 1, 2, 5, 6]].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, state", [("so3krates", "charge"), ("so3krates", "spin"), ("painn", "charge")]
)
def test_models_depend_on_charge_and_spin(name, state):
    """A charge or spin changes the features; if zero or absent, they are the elements', which
    So3krates divides by sqrt(2).
    """
    options = {"num_features": 12, "num_layers": 1, "zero_init": False}
    if name == "so3krates":
        options |= {"num_heads": 2, "degrees": (1, 2)}
    model = models.create(name, **options, **{f"{state}_embedding": True})
    graph = jax.tree.map(jnp.asarray, example_graph(np.float64))
    params = model.init(jax.random.key(0), graph)

    def energies(value, params=params, model=model):
        globals_ = {k: v for k, v in graph.globals.items() if k != state or value is not None}
        globals_ |= {} if value is None else {state: jnp.array([value, 0.0])}
        return np.asarray(model.apply(params, graph._replace(globals=globals_)).energies)[:2]

    neutral = energies(0.0)
    assert np.abs(energies(1.0) - neutral).max() > 1e-3
    without = {k: v for k, v in params["params"].items() if k != f"{state}_embedding"}
    if name == "so3krates":
        without["embedding"] = without["embedding"] / np.sqrt(2)
    expected = energies(0.0, {"params": without}, models.create(name, **options))
    np.testing.assert_allclose(neutral, expected, rtol=1e-6)
    if state == "spin":
        np.testing.assert_array_equal(energies(None), neutral)
