"""Tests for packed trees and grouped updates: the results are those of optax, array by array."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlip_jax.checkpoint import to_arrays
from mlip_jax.target_device import compiling_for
from mlip_jax.training import optimizer
from mlip_jax.training.device import rules
from mlip_jax.training.device.packing import Packed, unpack


@pytest.fixture(autouse=True)
def gpu():
    """Updates are grouped on GPUs and TPUs only."""
    with compiling_for("gpu"):
        yield


MOMENTS = {"b1": 0.9, "b2": 0.99, "eps": 1e-8}
SHAPES = {
    "first": {"kernel": (4, 3), "bias": (3,)},
    "second": {"kernel": (4, 3), "scale": ()},
    "heads": {"kernel": (2, 4, 3)},
    "wide": {"kernel": (3, 5)},
    "final": {"kernel": (4, 1)},
    "embedding": {"embedding": (6, 4)},
}


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32),
        {"params": SHAPES},
        is_leaf=lambda s: isinstance(s, tuple),
    )


def muon_of_optax():
    def axes(path, p):
        is_matrix = path[-1].key == "kernel" and p.shape[-1] > 1
        return optax.contrib.MuonDimensionNumbers(-2, -1) if is_matrix else None

    return optax.contrib.muon(
        0.1,
        weight_decay=0.1,
        adam_b1=0.9,
        adam_b2=0.99,
        eps=1e-8,
        muon_weight_dimension_numbers=lambda p: jax.tree_util.tree_map_with_path(axes, p),
        consistent_rms=0.2,
    )


RULES = {
    "adam": (rules.adam(0.1, MOMENTS), optax.adam(0.1, **MOMENTS)),
    "amsgrad": (rules.amsgrad(0.1, MOMENTS), optax.amsgrad(0.1, **MOMENTS)),
    "adamw": (
        rules.adamw(0.1, 0.1, MOMENTS),
        optax.adamw(
            0.1, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p), **MOMENTS
        ),
    ),
    "muon": (rules.muon(0.1, 0.1, MOMENTS), muon_of_optax()),
}


@pytest.mark.parametrize("name", RULES)
def test_updates_of_groups_are_those_of_single_arrays(name):
    """Detects parameters that swap their moments or their decay, also if some are frozen.

    The states are those of optax, so checkpoints of older runs can be read.
    """
    mask = {"params": {**dict.fromkeys(SHAPES, True), "second": False}}
    params, results = random_tree(0), []
    for rule in RULES[name]:
        rule = optax.masked(rule, mask)
        update, state = jax.jit(rule.update), rule.init(params)
        for seed in (1, 2):
            updates, state = update(random_tree(seed), state, params)
        results.append(to_arrays((updates, state)))
    assert results[0].keys() == results[1].keys()
    for path, expected in results[1].items():
        np.testing.assert_allclose(results[0][path], expected, 2e-5, 2e-6, err_msg=path)


def test_muon_multiplies_all_matrices_of_a_shape_at_once():
    """Detects the products of each matrix by itself, hundreds of launches on a GPU."""
    rule, params = RULES["muon"][0], random_tree(0)
    jaxpr = jax.make_jaxpr(rule.update)(params, rule.init(params), params)
    assert count_products(jaxpr.jaxpr) == 2 * 3  # two shapes, and a loop over iterations


def count_products(jaxpr):
    inner = [
        x.jaxpr if hasattr(x, "jaxpr") else x
        for equation in jaxpr.eqns
        for x in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        if hasattr(getattr(x, "jaxpr", x), "eqns")
    ]
    own = sum(equation.primitive.name == "dot_general" for equation in jaxpr.eqns)
    return own + sum(map(count_products, inner))


def test_the_norm_is_that_of_all_parameters():
    tree = random_tree(0)
    expected = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree)))
    clipped, _ = jax.jit(rules.clip(0.5).update)(tree, optax.EmptyState())
    norm = jax.jit(rules.norm)
    np.testing.assert_allclose((norm(tree), norm(clipped)), (expected, 0.5), rtol=1e-6)


def test_packed_trees_are_restored_exactly():
    config = {
        "name": "muon",
        "learning_rate": 1e-3,
        "learning_rate_end": 1e-5,
        "warmup_steps": 0,
        "schedule": "constant",
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "freeze": ("params/second/*",),
        **MOMENTS,
    }
    state = jax.device_get(optimizer.create(config, 10).init(random_tree(0)))
    packed = Packed.of(state)
    assert {v.dtype for v in packed.vectors} == {np.dtype("float32"), np.dtype("int32")}
    stacked = jax.tree.map(lambda v: np.stack([v, v + 1]), packed)
    for tree in (unpack({"state": packed})["state"], jax.tree.map(lambda x: x[0], stacked.tree())):
        assert jax.tree.structure(tree) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, tree, state)
