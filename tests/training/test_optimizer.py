"""Tests for schedules, optimizers, frozen parameters, plateaus and error messages."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.checkpoint import to_arrays
from mlip_jax.training import optimizer
from mlip_jax.training.optimizer import Plateau

BASE = {
    "name": "adam",
    "learning_rate": 1e-3,
    "learning_rate_end": 1e-5,
    "warmup_steps": 100,
    "schedule": "cosine",
    "decay_factor": 0.5,
    "decay_epochs": 2.0,
    "plateau_patience": 10,
    "plateau_threshold": 1e-4,
    "b1": 0.9,
    "b2": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip_norm": 10.0,
    "freeze": (),
}
# as flax names them, and a list
PARAMS = {
    "params": {
        "embedding": {"kernel": jnp.ones((3, 2))},
        "layers": [{"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, {"bias": jnp.ones(2)}],
    }
}


def rates(steps, num_steps=1000, steps_per_epoch=200.0, **changes):
    rate = optimizer.learning_rate(BASE | changes, num_steps, steps_per_epoch)
    return np.array([float(rate(s)) for s in steps])


def paths_where(tree, holds):
    return sorted(path for path, leaf in to_arrays(tree).items() if holds(leaf))


@pytest.mark.parametrize("schedule", optimizer.SCHEDULES)
def test_warm_up_is_linear_and_starts_above_zero(schedule):
    values = rates(range(101), schedule=schedule)
    assert values[0] > 0
    np.testing.assert_allclose(np.diff(values[:100]), np.diff(values[:2])[0], rtol=1e-3)
    assert values[100] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "middle", "end"),
    [
        ("cosine", 0.5 * (1e-3 + 1e-5), 1e-5),
        ("exponential", 1e-4, 1e-5),
        ("step", 5e-4, 2.5e-4),
        ("constant", 1e-3, 1e-3),
        ("plateau", 1e-3, 1e-3),
    ],
)
def test_decay(schedule, middle, end):
    values = rates([100, 550, 1000], schedule=schedule)
    np.testing.assert_allclose(values, [1e-3, middle, end], rtol=1e-3)
    decay = rates(range(100, 1001, 30), schedule=schedule)
    assert (np.diff(decay) <= 1e-12).all()


def test_no_schedule_falls_below_its_end_value():
    for schedule in optimizer.SCHEDULES:
        assert (rates([1000, 1500, 10_000], schedule=schedule) >= 1e-5 * (1 - 1e-6)).all()


@settings(max_examples=30, deadline=None)
@given(
    epochs=st.floats(0.01, 5.0),
    per_epoch=st.floats(0.5, 300.0),
    factor=st.floats(0.05, 0.95),
    warmup=st.integers(0, 50),
    data=st.data(),
)
def test_steps_decay_at_multiples_of_their_period(epochs, per_epoch, factor, warmup, data):
    period = max(round(epochs * per_epoch), 1)
    rate = optimizer.learning_rate(
        BASE
        | {
            "schedule": "step",
            "decay_epochs": epochs,
            "decay_factor": factor,
            "warmup_steps": warmup,
        },
        10_000,
        per_epoch,
    )
    stair = data.draw(st.integers(0, 40))
    for step in (
        stair * period - 1,
        stair * period,
        stair * period + data.draw(st.integers(0, period - 1)),
    ):
        if step >= warmup:
            expected = max(1e-3 * factor ** (step // period), 1e-5)
            assert float(rate(step)) == pytest.approx(expected, rel=1e-5)
            assert float(rate(jnp.int32(step))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("schedule", optimizer.SCHEDULES)
@pytest.mark.parametrize(("num_steps", "warmup"), [(1, 0), (1, 100), (10, 100), (10, 0)])
def test_short_runs(schedule, num_steps, warmup):
    values = rates(range(num_steps + 2), num_steps, schedule=schedule, warmup_steps=warmup)
    assert np.isfinite(values).all() and (values > 0).all() and (values <= 1e-3 * (1 + 1e-6)).all()
    if warmup == 0:
        assert values[0] == pytest.approx(1e-3)


@pytest.mark.parametrize("schedule", optimizer.SCHEDULES)
def test_schedule_can_be_traced(schedule):
    rate = optimizer.learning_rate(BASE | {"schedule": schedule}, 1000, 20.0)
    assert float(jax.jit(rate)(jnp.int32(300))) == pytest.approx(float(rate(300)), rel=1e-6)


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_optimizers_descend(name):
    config = BASE | {
        "name": name,
        "learning_rate": 0.1,
        "learning_rate_end": 0.01,
        "warmup_steps": 0,
    }
    rule = optimizer.create(config, 200)
    params = {"a": jnp.array([[3.0, -2.0]]), "b": jnp.array([1.0])}
    state = rule.init(params)

    def loss(p):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    step = jax.jit(lambda p, s: rule.update(jax.grad(loss)(p), s, p))
    for _ in range(200):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert loss(params) < 1e-2


@pytest.mark.parametrize("name", ("adam", "amsgrad", "adamw"))
def test_updates_match_the_equations_of_the_papers(name):
    """Gradients shrink, so that the largest second moment is not the last one."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(8, 2, 3)) * np.geomspace(1.0, 1e-3, 8)[:, None, None]
    rule = optimizer.create(
        BASE | {"name": name, "schedule": "constant", "warmup_steps": 0, "clip_norm": None}, 8
    )
    params = rng.normal(size=(2, 3))
    state, step = rule.init(jnp.asarray(params)), jax.jit(rule.update)
    first, second, largest = (np.zeros((2, 3)) for _ in range(3))
    for t, gradient in enumerate(gradients, 1):
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        corrected = second / (1 - 0.99**t)
        largest = np.maximum(largest, corrected)
        expected = (
            first / (1 - 0.9**t) / (np.sqrt(largest if name == "amsgrad" else corrected) + 1e-8)
        )
        expected = -1e-3 * (expected + (0.1 * params if name == "adamw" else 0.0))
        updates, state = step(
            jnp.asarray(gradient, jnp.float32), state, jnp.asarray(params, jnp.float32)
        )
        np.testing.assert_allclose(updates, expected, rtol=2e-4)


def test_muon_updates_are_orthogonal_matrices():
    """Each head is a separate matrix; all singular values of an update are nearly equal."""
    rule = optimizer.create(
        BASE
        | {
            "name": "muon",
            "schedule": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "clip_norm": None,
        },
        8,
    )
    rng = np.random.default_rng(0)
    shapes = {
        "dense": {"kernel": (8, 24), "bias": (24,)},
        "heads": {"kernel": (3, 8, 8)},
        "final": {"kernel": (8, 1)},
        "embedding": {"embedding": (10, 8)},
    }
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )
    gradients = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    updates, _ = rule.update(gradients, rule.init(params), params)
    for matrix in (updates["dense"]["kernel"], *updates["heads"]["kernel"]):
        values = np.linalg.svd(matrix, compute_uv=False) / (1e-3 * 0.2 * max(matrix.shape) ** 0.5)
        assert (values > 0.6).all() and (values < 1.25).all()
    # Adam's first step
    for name, part in (("dense", "bias"), ("final", "kernel"), ("embedding", "embedding")):
        np.testing.assert_allclose(
            np.abs(updates[name][part]), np.abs(updates[name][part]).max(), rtol=1e-3
        )


def test_muon_decays_only_matrices():
    rule = optimizer.create(BASE | {"name": "muon", "warmup_steps": 0}, 100)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    updates, _ = rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)
    assert (updates["kernel"] < 0).all() and not updates["bias"].any()


def test_weight_decay_excludes_biases():
    rule = optimizer.create(BASE | {"name": "adamw", "warmup_steps": 0}, 100)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    updates, _ = rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)
    assert (updates["kernel"] < 0).all() and not updates["bias"].any()


def test_gradients_are_clipped():
    """Adam's update is independent of the scale of gradients, but its second moment is not."""
    params = {"a": jnp.ones(3)}
    huge = {"a": jnp.array([1e6, 0.0, 0.0])}
    for clip, norm in ((10.0, 10.0), (0.0, 1e6), (None, 1e6)):
        rule = optimizer.create(BASE | {"clip_norm": clip}, 100)
        _, state = rule.update(huge, rule.init(params), params)
        leaves = jax.tree_util.tree_leaves_with_path(state)
        moment = next(leaf for path, leaf in leaves if ".mu" in jax.tree_util.keystr(path))
        assert float(jnp.linalg.norm(moment)) == pytest.approx(0.1 * norm, rel=1e-4)


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_frozen_parameters_do_not_change_and_have_no_moments(name):
    rule = optimizer.create(BASE | {"name": name, "freeze": ["params/embedding/*", "*/bias"]}, 100)
    state = rule.init(PARAMS)
    moments = [path for path in to_arrays(state) if re.search("/(mu|nu|nu_max)/", path)]
    assert moments and all(path.endswith("params/layers/0/kernel") for path in moments)
    step = jax.jit(lambda p, s: rule.update(jax.tree.map(lambda x: 3.0 * x, p), s, p))
    params = PARAMS
    for _ in range(3):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert paths_where(updates, np.any) == ["params/layers/0/kernel"]
    same = jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), params, PARAMS)
    assert paths_where(same, np.logical_not) == ["params/layers/0/kernel"]
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)


def test_frozen_parameters_do_not_affect_the_others():
    """The clipped norm is that of the trained parameters."""
    # with a large epsilon, the update shows the size of the gradients
    config = BASE | {"clip_norm": 0.1, "eps": 0.1}
    gradients = {"a": jnp.array([0.3, -0.2]), "b": jnp.array([1e6, 1e6])}
    params = jax.tree.map(jnp.ones_like, gradients)
    rule, unfrozen_rule = (
        optimizer.create(config | {"freeze": ("b",)}, 100),
        optimizer.create(config, 100),
    )
    updates, _ = rule.update(gradients, rule.init(params), params)
    a = {"a": params["a"]}
    expected, _ = unfrozen_rule.update({"a": gradients["a"]}, unfrozen_rule.init(a), a)
    np.testing.assert_array_equal(updates["a"], expected["a"])
    assert updates["a"].all() and not updates["b"].any()


def test_the_state_without_frozen_parameters_is_unchanged():
    """Checkpoints of runs without frozen parameters can still be read."""
    plain = optax.chain(
        optax.clip_by_global_norm(10.0), optax.adam(optimizer.learning_rate(BASE, 100))
    )
    rule = optimizer.create(BASE, 100)
    assert jax.tree.structure(rule.init(PARAMS)) == jax.tree.structure(plain.init(PARAMS))


def test_paths_are_those_of_checkpoints():
    found, _ = jax.tree_util.tree_flatten_with_path(
        {"state": PARAMS, "count": optax.EmaState(1, (2, 3))}
    )
    expected = to_arrays({"state": PARAMS, "count": optax.EmaState(1, (2, 3))})
    assert [optimizer.parameter_path(path) for path, _ in found] == list(expected)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ("embeding/*",),
            r"'embeding/\*' matches none of the 4 parameters; the nearest are params/embedding/kernel",
        ),
        (("params/layers/0/*", "params/Layers/*"), r"'params/Layers/\*' matches none"),
        (("zzz",), "the nearest are params/embedding/kernel, params/layers/0/bias"),
        (("*",), r"'\*' match all 4 parameters"),
        (("*kernel", "*bias"), r"'\*kernel', '\*bias' match all 4"),
    ],
)
def test_invalid_patterns_are_errors(patterns, message):
    rule = optimizer.create(BASE | {"freeze": patterns}, 100)
    with pytest.raises(ValueError, match=message):
        rule.init(PARAMS)
    with pytest.raises(ValueError, match=message):
        optimizer.check_patterns(PARAMS, BASE | {"freeze": patterns})


def test_invalid_patterns_of_multipliers_are_found_before_training():
    """Detects a misspelled pattern that is an error only after the conversion of the data."""
    with pytest.raises(ValueError, match=r"lr_multipliers: 'embeding/\*' matches none"):
        optimizer.check_patterns(PARAMS, BASE | {"freeze": (), "lr_multipliers": "embeding/*=2"})


@pytest.mark.parametrize("restriction", [{"freeze": ("params/embedding/*",)}, {"low_rank": 1}])
def test_multipliers_may_name_parameters_that_are_not_trained(restriction):
    """Detects a first step that fails, and factors of a weight without its multiplier."""
    text = "params/embedding/*=0.5, params/layers/0/*kernel=0.1, params/layers/1/bias=3"
    gradients = jax.tree.map(jnp.ones_like, PARAMS)

    def updates(**changes):
        rule = optimizer.create(BASE | restriction | changes, 100)
        return to_arrays(rule.update(gradients, rule.init(PARAMS), PARAMS)[0])

    plain, scaled = updates(), updates(lr_multipliers=text)
    kernel = "params/layers/0/kernel"
    np.testing.assert_allclose(scaled[kernel], 0.1 * plain[kernel], rtol=1e-3)
    with pytest.raises(ValueError, match="'zzz' matches none of the 4 parameters"):
        updates(lr_multipliers="zzz=2")


def test_a_text_instead_of_a_list_of_patterns_is_an_error():
    with pytest.raises(ValueError, match=r"received the text 'params/\*'. Write \('params/\*',\)"):
        optimizer.create(BASE | {"freeze": "params/*"}, 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosin"}, "unknown optimizer.schedule 'cosin'. Did you mean 'cosine'"),
        ({"name": "adamww"}, "unknown optimizer.name 'adamww'. Did you mean 'adamw'"),
        ({"name": "lion"}, "Known: adam, adamw, amsgrad"),
        (
            {"learning_rate": -1e-3},
            "optimizer.learning_rate must be a positive number, received -0.001",
        ),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number, received nan"),
        ({"learning_rate": None}, "learning_rate must be a positive number, received None"),
        (
            {"learning_rate_end": -1.0},
            "learning_rate_end must be zero or a positive number, received -1.0",
        ),
        (
            {"learning_rate_end": 1.0},
            r"_end must be at most optimizer.learning_rate \(0.001\), received 1.0",
        ),
        (
            {"schedule": "exponential", "learning_rate_end": 0.0},
            "an exponential never reaches zero, received 0.0",
        ),
        ({"warmup_steps": -1}, "warmup_steps must be zero or a positive number, received -1"),
        (
            {"schedule": "step", "decay_factor": 1.0},
            "decay_factor must be between 0 and 1, both excluded, received 1.0",
        ),
        (
            {"schedule": "step", "decay_epochs": 0.0},
            "decay_epochs must be a positive number, received 0.0",
        ),
        ({"schedule": "plateau", "decay_factor": 2.0}, "decay_factor must be between"),
        ({"schedule": "plateau", "plateau_patience": -1}, "plateau_patience must be zero or"),
        (
            {"schedule": "plateau", "plateau_threshold": 1.0},
            "plateau_threshold must be at least 0 and below 1",
        ),
        ({"b1": 1.0}, "b1 must be at least 0 and below 1, received 1.0"),
        ({"eps": 0.0}, "eps must be a positive number"),
        ({"name": "adamw", "weight_decay": -0.1}, "weight_decay must be zero or a positive number"),
        ({"clip_norm": -1.0}, "clip_norm must be zero or a positive number, received -1.0"),
    ],
)
def test_invalid_values_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        optimizer.create(BASE | changes, 100)


@pytest.mark.parametrize("steps_per_epoch", [0, -1.0, math.inf, math.nan])
def test_an_epoch_must_have_steps(steps_per_epoch):
    with pytest.raises(ValueError, match="steps_per_epoch must be a positive number"):
        optimizer.create(BASE | {"schedule": "step"}, 100, steps_per_epoch)


def test_values_that_a_schedule_does_not_use_are_not_checked():
    optimizer.create(
        BASE | {"schedule": "constant", "learning_rate_end": 1.0, "decay_factor": 7.0}, 100
    )


OPTIONS = {"patience": 3, "factor": 0.5, "threshold": 0.13, "floor": 0.1}


def test_plateau_options_are_those_of_update():
    options = optimizer.plateau_options(BASE | {"schedule": "plateau"})
    assert options == {
        "patience": 10,
        "factor": 0.5,
        "threshold": 1e-4,
        "floor": pytest.approx(0.01),
    }
    Plateau().update(1.0, 1.0, **options)
    assert optimizer.plateau_options(BASE) is None


def scales(values, epochs, plateau=None, **changes):
    plateau, found = plateau or Plateau(), []
    for value, epoch in zip(values, epochs):
        plateau = plateau.update(value, epoch, **(OPTIONS | changes))
        found.append(plateau.scale)
    return found


@pytest.fixture(scope="module")
def optax_plateau():
    """Return the scales of optax.contrib.reduce_on_plateau, whose patience is torch's plus one."""
    rule = optax.contrib.reduce_on_plateau(
        factor=OPTIONS["factor"],
        patience=OPTIONS["patience"] + 1,
        rtol=OPTIONS["threshold"],
        min_scale=OPTIONS["floor"],
    )

    def step(state, value):
        _, state = rule.update(jnp.ones(()), state, value=value)
        return state, state.scale

    return jax.jit(lambda values: jax.lax.scan(step, rule.init(jnp.ones(())), values)[1])


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.one_of(st.integers(1, 20), st.just(math.nan), st.just(math.inf)),
        min_size=40,
        max_size=40,
    )
)
def test_plateau_equals_that_of_optax_for_whole_epochs(optax_plateau, values):
    expected = optax_plateau(jnp.array(values, jnp.float32))
    np.testing.assert_allclose(scales(values, range(1, 41)), expected, rtol=1e-6)


def test_plateau_of_known_numbers():
    """The reduction follows one epoch after the patience, which restarts; the floor holds."""
    assert scales([5.0] + [4.9] * 16, range(1, 18)) == [1.0] * 4 + [0.5] * 4 + [0.25] * 4 + [
        0.125
    ] * 4 + [0.1]
    assert scales([5.0, 6, 6, 6, 4.0, 6, 6, 6, 6], range(1, 10)) == [1.0] * 8 + [0.5]
    assert scales([math.nan] * 4, range(1, 5)) == [1.0, 1.0, 1.0, 0.5]


@settings(max_examples=50, deadline=None)
@given(per_epoch=st.integers(2, 50), start=st.integers(0, 1000), patience=st.integers(0, 8))
def test_patience_counts_epochs_not_validations(per_epoch, start, patience):
    steps = np.arange(start, start + (patience + 2) * per_epoch)
    found = scales([1.0] * len(steps), steps / per_epoch, patience=patience)
    assert found.index(0.5) == patience * per_epoch + 1


@given(values=st.lists(st.floats(0, 10) | st.just(math.nan), max_size=12), cut=st.integers(0, 12))
def test_plateau_resumes_from_json(values, cut):
    plateau = Plateau()
    for epoch, value in enumerate(values[:cut]):
        plateau = plateau.update(value, epoch, **OPTIONS)
    again = Plateau(**json.loads(json.dumps(dataclasses.asdict(plateau))))
    assert again == plateau
    rest, epochs = values[cut:], range(cut, 20)
    assert scales(rest, epochs, again) == scales(rest, epochs, plateau)
