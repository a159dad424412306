"""Tests for the options of new runs: older runs and fine-tuned ones keep the energies they had."""

import types

import ml_collections
import pytest

from mlip_jax.config import complete
from mlip_jax.defaults import train_defaults
from mlip_jax.training import options as training_options


def options_of(monkeypatch, stored, given=None, init=""):
    """Return the options of PaiNN in a run; `stored`: those of its checkpoint, None: new run."""
    config = train_defaults()
    config.model.name, config.init.workdir = "painn", init
    config.model.options.update(given or {})
    metadata = {"config": {"model": {"name": "painn", "options": stored}}}
    restored = None if stored is None else types.SimpleNamespace(metadata=metadata)
    monkeypatch.setattr(training_options, "restore", lambda workdir: restored)
    training_options.set_model_options(config, "run")
    return config.model.options.to_dict()


@pytest.mark.parametrize(
    ("stored", "given", "init", "expected"),
    [
        (None, {}, "", {"epsilon": 1e-4}),  # a new run
        (None, {"epsilon": 1e-6}, "", {"epsilon": 1e-6}),
        ({}, {}, "", {}),  # resumes a run that is older than the option
        ({"epsilon": 1e-4}, {}, "", {"epsilon": 1e-4}),
        (None, {}, "runs/old", {}),  # the model of the initial force field
    ],
)
def test_options_of_new_resumed_and_fine_tuned_runs(monkeypatch, stored, given, init, expected):
    assert options_of(monkeypatch, stored, given, init) == expected


def test_options_of_a_config_of_the_command_line(monkeypatch):
    """The flags lock a config, and `complete` keeps the lock of the options alone."""
    given = train_defaults()
    given.model.name, given.model.options = "painn", ml_collections.ConfigDict({"num_layers": 2})
    config = complete(given.lock(), train_defaults())
    monkeypatch.setattr(training_options, "restore", lambda workdir: None)
    training_options.set_model_options(config, "run")
    assert config.model.options.to_dict() == {"num_layers": 2, "epsilon": 1e-4}
