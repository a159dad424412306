"""Tests for low-rank adapters: the optimizer trains thin factors and returns merged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlip_jax.training import optimizer
from mlip_jax.training.parameters.low_rank import low_rank
from tests.training.test_optimizer import BASE

RANK = 2


def weights():
    """Return a dense layer, heads, a map of an irrep, and parameters that adapters leave alone."""
    rng = np.random.default_rng(0)
    shapes = {
        "dense": {"kernel": (5, 4), "bias": (4,)},
        "heads": {"kernel": (3, 5, 4)},
        "linear": {"1o": (4, 6)},
        "final": {"kernel": (4, 1)},  # too thin for factors of rank 2: trained as it is
        "embedding": (7, 4),
    }
    return jax.tree.map(
        lambda shape: rng.normal(size=shape), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def loss(params):
    """Return a loss with gradients of full rank."""
    return sum(jnp.sum(jnp.sin(1.3 * p + k)) for k, p in enumerate(jax.tree.leaves(params)))


def train(rule, params, loss, num_steps=5):
    @jax.jit  # one program instead of one per operation
    def step(params, state):
        updates, state = rule.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = rule.init(params)
    for _ in range(num_steps):
        params, state = step(params, state)
    return params, state


def test_merged_weights_equal_those_of_explicit_adapters():
    """Detects a wrong gradient of a factor, or an update that is not the change of the product."""
    with jax.enable_x64(True):
        initial = jax.tree.map(jnp.asarray, weights())
        rule = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05))
        merged, state = train(low_rank(rule, RANK), initial, loss)
        factors = low_rank(rule, RANK).init(initial).factors

        def with_factors(tree):
            """Return W0 + A B, the definition of adapters, for differentiation with respect to A, B."""
            structure = jax.tree.structure(initial)
            return jax.tree.map(
                lambda w, f: (
                    w
                    if isinstance(f, optax.MaskedNode)
                    else w + f["a"] @ f["b"]
                    if isinstance(f, dict)
                    else f
                ),
                initial,
                jax.tree.unflatten(structure, structure.flatten_up_to(tree)),
                is_leaf=lambda x: isinstance(x, jax.Array),
            )

        start = with_factors(factors)
        trained, _ = train(rule, factors, lambda tree: loss(with_factors(tree)))
        expected = with_factors(trained)
    for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(initial), strict=True):
        np.testing.assert_array_equal(a, b)  # zero at the start
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)
    change = jax.tree.map(lambda a, b: np.asarray(a) - b, merged, weights())
    for w in (change["dense"]["kernel"], *change["heads"]["kernel"], change["linear"]["1o"]):
        assert np.linalg.matrix_rank(w, tol=1e-12) == RANK
    assert np.abs(change["final"]["kernel"]).min() > 0
    assert not change["dense"]["bias"].any() and not change["embedding"].any()


def test_frozen_parameters_do_not_move_and_have_no_factors():
    config = BASE | {"freeze": ("heads/*",), "low_rank": RANK, "clip_norm": 0.5}
    rule = optimizer.create(config, num_steps=10)
    initial = jax.tree.map(jnp.asarray, weights())
    trained, state = train(rule, initial, loss, num_steps=2)
    np.testing.assert_array_equal(trained["heads"]["kernel"], initial["heads"]["kernel"])
    assert np.abs(trained["dense"]["kernel"] - initial["dense"]["kernel"]).max() > 0
    names = [optimizer.parameter_path(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert any("dense/kernel/a" in n for n in names) and not any("heads" in n for n in names)


def test_adapters_that_cannot_train_are_errors():
    with pytest.raises(ValueError, match="no linear layers"):
        optimizer.create(BASE | {"low_rank": 1}, 10).init({"embedding": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match="plateau"):
        optimizer.create(BASE | {"low_rank": 1, "schedule": "plateau"}, 10)
