"""Learning-rate schedules, optimizers, and errors that name the nearest valid name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mlip_jax.training import optimizer

BASE = {"name": "adam", "learning_rate": 1e-3, "learning_rate_end": 1e-5, "warmup_steps": 100, "schedule": "cosine",
        "b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 10.0}


def rates(steps, num_steps=1000, **changes):
    rate = optimizer.learning_rate(BASE | changes, num_steps)
    return np.array([float(rate(s)) for s in steps])


@pytest.mark.parametrize("schedule", optimizer.SCHEDULES)
def test_warm_up_is_linear_and_starts_above_zero(schedule):
    values = rates(range(101), schedule=schedule)
    assert values[0] > 0
    np.testing.assert_allclose(np.diff(values[:100]), np.diff(values[:2])[0], rtol=1e-3)
    assert values[100] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(("schedule", "middle", "end"), [
    ("cosine", 0.5 * (1e-3 + 1e-5), 1e-5), ("exponential", 1e-4, 1e-5), ("constant", 1e-3, 1e-3)])
def test_decay(schedule, middle, end):
    values = rates([100, 550, 1000], schedule=schedule)
    np.testing.assert_allclose(values, [1e-3, middle, end], rtol=1e-3)
    decay = rates(range(100, 1001, 30), schedule=schedule)
    assert (np.diff(decay) <= 1e-12).all()


@pytest.mark.parametrize("schedule", optimizer.SCHEDULES)
@pytest.mark.parametrize(("num_steps", "warmup"), [(1, 0), (1, 100), (10, 100), (10, 0)])
def test_short_runs(schedule, num_steps, warmup):
    values = rates(range(num_steps + 2), num_steps, schedule=schedule, warmup_steps=warmup)
    assert np.isfinite(values).all() and (values > 0).all() and (values <= 1e-3 * (1 + 1e-6)).all()
    if warmup == 0:
        assert values[0] == pytest.approx(1e-3)


def test_schedule_can_be_traced():
    rate = optimizer.learning_rate(BASE, 1000)
    assert float(jax.jit(rate)(jnp.int32(300))) == pytest.approx(float(rate(300)), rel=1e-6)


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_descends(name):
    config = BASE | {"name": name, "learning_rate": 0.1, "learning_rate_end": 0.01, "warmup_steps": 0}
    rule = optimizer.create(config, 200)
    params = {"a": jnp.array([[3.0, -2.0]]), "b": jnp.array([1.0])}
    state = rule.init(params)

    def loss(p):
        return sum(jnp.sum(x ** 2) for x in jax.tree.leaves(p))

    step = jax.jit(lambda p, s: rule.update(jax.grad(loss)(p), s, p))
    for _ in range(200):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert loss(params) < 1e-2


def test_weight_decay_leaves_biases_alone():
    rule = optimizer.create(BASE | {"name": "adamw", "warmup_steps": 0}, 100)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    updates, _ = rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)
    assert (updates["kernel"] < 0).all() and not updates["bias"].any()


def test_gradients_are_clipped():
    """Adam forgets the scale of gradients, its second moment does not."""
    params = {"a": jnp.ones(3)}
    huge = {"a": jnp.array([1e6, 0.0, 0.0])}
    for clip, norm in ((10.0, 10.0), (0.0, 1e6), (None, 1e6)):
        rule = optimizer.create(BASE | {"clip_norm": clip}, 100)
        _, state = rule.update(huge, rule.init(params), params)
        leaves = jax.tree_util.tree_leaves_with_path(state)
        moment = next(leaf for path, leaf in leaves if ".mu" in jax.tree_util.keystr(path))
        assert float(jnp.linalg.norm(moment)) == pytest.approx(0.1 * norm, rel=1e-4)


@pytest.mark.parametrize(("changes", "message"), [
    ({"schedule": "cosin"}, "unknown optimizer.schedule 'cosin'. Did you mean 'cosine'"),
    ({"name": "adamww"}, "unknown optimizer.name 'adamww'. Did you mean 'adamw'"),
    ({"name": "lion"}, "Known: adam, adamw")])
def test_unknown_names(changes, message):
    with pytest.raises(ValueError, match=message):
        optimizer.create(BASE | changes, 100)
