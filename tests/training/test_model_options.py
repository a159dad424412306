"""Tests for the options of new runs: older runs and fine-tuned ones keep the energies they had."""

import types

import ml_collections
import numpy as np
import pytest

from mlip_jax.config import complete
from mlip_jax.defaults import train_defaults
from mlip_jax.graphs.shapes import Sizes
from mlip_jax.training import options as training_options


def config_of(monkeypatch, name, stored, given=None, init=""):
    """Return the config of a run; `stored`: options of its checkpoint, None: new run."""
    config = train_defaults()
    config.model.name, config.init.workdir = name, init
    config.model.options.update(given or {})
    metadata = {"config": {"model": {"name": name, "options": stored}}}
    restored = None if stored is None else types.SimpleNamespace(metadata=metadata)
    monkeypatch.setattr(training_options, "restore", lambda workdir: restored)
    training_options.set_model_options(config, "run")
    return config


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
    config = config_of(monkeypatch, "painn", stored, given, init)
    assert config.model.options.to_dict() == expected


# two structures of the training split: 4 and 6 atoms with 10 and 24 directed edges
SIZES = Sizes(np.array([4, 6]), np.array([10, 24]))


@pytest.mark.parametrize(
    ("name", "stored", "given", "expected"),
    [
        ("mace", None, {}, 3.4),  # a new run
        ("nequip", None, {"avg_num_neighbors": 7.0}, 7.0),
        ("mace", {"avg_num_neighbors": 5.0}, {}, 5.0),  # resumed, also with changed data
        ("mace", {}, {}, 20.0),  # resumes a run that is older than the statistic
        ("painn", None, {}, None),  # a model without it
        ("so3krates", None, {}, None),  # by default, no divisor
        ("so3krates", None, {"message_normalization": "avg_num_neighbors"}, 3.4),
    ],
)
def test_average_number_of_neighbors(monkeypatch, name, stored, given, expected):
    """Messages of a new run have unit size; those of an older run keep their factor."""
    config = config_of(monkeypatch, name, stored, given)
    training_options.set_average_neighbors(config, SIZES)
    assert config.model.options.get("avg_num_neighbors") == expected


def test_average_number_of_neighbors_of_other_runs():
    """Fine-tuning keeps the factor, also of a run that does not state it."""
    for stored, expected in (({"avg_num_neighbors": 5.0}, 5.0), ({}, 16.0)):
        config = train_defaults()
        config.model.name = "nequip"
        training_options.inherit_options(config, stored)
        training_options.set_average_neighbors(config, SIZES)
        assert config.model.options.avg_num_neighbors == expected


def test_average_number_of_neighbors_of_isolated_atoms():
    config = train_defaults()
    config.model.name = "nequip"
    training_options.set_average_neighbors(config, Sizes(np.ones(3, int), np.zeros(3, int)))
    assert "avg_num_neighbors" not in config.model.options  # not zero, which would divide by zero


def test_options_of_a_config_of_the_command_line(monkeypatch):
    """The flags lock a config, and `complete` keeps the lock of the options alone."""
    given = train_defaults()
    given.model.name, given.model.options = "painn", ml_collections.ConfigDict({"num_layers": 2})
    config = complete(given.lock(), train_defaults())
    monkeypatch.setattr(training_options, "restore", lambda workdir: None)
    training_options.set_model_options(config, "run")
    assert config.model.options.to_dict() == {"num_layers": 2, "epsilon": 1e-4}
