"""Tests that invalid options of the part "train" are errors before anything is read."""

import pytest

from mlip_jax.config import ConfigError, complete, load_file
from mlip_jax.datasets import source
from mlip_jax.defaults import train_defaults
from mlip_jax.tasks import train
from mlip_jax.training import optimizer
from mlip_jax.training.prepare import with_intervals

NONSENSE = [
    ("num_steps", 0),
    ("num_steps", -5),
    ("num_epochs", 0.0),
    ("num_epochs", -1.0),
    ("num_epochs", float("nan")),
    ("num_epochs", float("inf")),
    ("batch_size", 0),
    ("batch_size", -16),
    ("micro_batches", 0),
    ("micro_batches", -2),
    ("ema_decay", -0.1),
    ("ema_decay", 1.0),
    ("ema_decay", float("nan")),
    ("log_every", 0),
    ("log_every", -1),
    ("valid_every", 0),
    ("checkpoint_every", 0),
    ("checkpoint_every", -3),
    ("max_valid", 0),
    ("steps_per_dispatch", -1),
    ("profile_steps", -1),
    ("on_nonfinite", "ignore"),
]


def check_options(**changes):
    c = train_defaults()
    c.train.update(changes)
    complete(c, train_defaults())


def test_defaults_and_limits_are_valid():
    check_options()
    check_options(
        num_epochs=0.5,
        ema_decay=0.0,
        steps_per_dispatch=25,
        micro_batches=1,
        log_every=1,
        num_steps=1,
        batch_size=1,
        max_valid=1,
        on_nonfinite="rollback",
    )


@pytest.mark.parametrize(("field", "value"), NONSENSE)
def test_invalid_options_are_errors(field, value):
    with pytest.raises(ConfigError, match=f"train.{field}.*{value}"):
        check_options(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train.valid_every", 0, "train.valid_every must be at least 1 or unset, received 0"),
        ("loss.penalty", "maee", "unknown loss.penalty 'maee'. Did you mean 'mae'"),
        ("loss.force_penalty", "nrm", "unknown loss.force_penalty 'nrm'. Did you mean 'norm'"),
        ("loss.beta", -0.1, "loss.beta must be from 0 to 1, received -0.1"),
        ("loss.beta_schedule", "cosine", "unknown loss.beta_schedule 'cosine'"),
        ("optimizer.name", "adamm", "unknown optimizer.name 'adamm'. Did you mean 'adam'"),
        (
            "optimizer.schedule",
            "plato",
            "unknown optimizer.schedule 'plato'. Did you mean 'plateau'",
        ),
        (
            "optimizer.clip_norm",
            -1.0,
            "optimizer.clip_norm must be at least 0 or unset, received -1.0",
        ),
        (
            "optimizer.freeze",
            ("params/embeding",),
            "'params/embeding' matches none.* the nearest are params/embedding",
        ),
    ],
)
def test_the_task_checks_options_before_it_reads_data(tmp_path, monkeypatch, field, value, message):
    """The workdir must not belong to the invalid config, so that the corrected one can use it."""
    monkeypatch.setattr(source, "load", lambda _: pytest.fail("data are loaded"))
    c = train_defaults()
    c.data.path = str(tmp_path / "nowhere.hdf5")
    c.model.name, c.model.options = "schnet", {"num_features": 8, "num_layers": 1}
    c.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        train.run(c, tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()


def test_unset_intervals_follow_the_number_of_steps():
    """Detects a short run without a validation before its end."""
    options = train_defaults().train
    assert with_intervals(options, 200) == options  # set values are kept
    options.log_every = options.valid_every = options.checkpoint_every = None
    for steps, expected in ((3, (1, 1, 1)), (200, (2, 10, 10)), (100_000, (100, 1000, 1000))):
        o = with_intervals(options, steps)
        assert (o.log_every, o.valid_every, o.checkpoint_every) == expected


@pytest.mark.parametrize("name", ["train", "force2prop", "force2prop:scratch,small"])
def test_configs_for_own_data_leave_the_intervals_to_the_number_of_steps(name):
    """Short runs of property predictors used to log nothing and to validate only at the end."""
    options = load_file(name).train
    assert options.log_every is options.valid_every is options.checkpoint_every is None


def test_an_unset_warmup_is_a_tenth_of_the_steps():
    """Detects a short run that ends before its warmup."""
    c = load_file("train").optimizer
    assert c.warmup_steps is None
    for steps, warmup in ((5, 0), (100, 10), (100_000, 200)):
        rate = optimizer.learning_rate(c, steps)
        assert float(rate(warmup)) == pytest.approx(c.learning_rate)
        assert warmup == 0 or float(rate(warmup - 1)) < 0.999 * c.learning_rate
