"""Tests for models with weights for some elements only, and for models without the charge."""

from pathlib import Path

import pytest

from mlip_jax import defaults, models
from mlip_jax.tasks.force_field_training.preparation import TrainingRun, warn_of_charges
from mlip_jax.terms import with_terms

DATA = Path(__file__).parents[1] / "data/gfn2_small.hdf5"


def test_elements_without_weights_are_an_error():
    """Detects atoms that would silently get the weights of another element."""
    models.check_elements(models.create("painn"), [1, 6, 92])
    some = models.create("nequip", elements=(1, 6))
    models.check_elements(some, [6])
    for model in (some, with_terms(some, {"zbl": {}})):
        with pytest.raises(ValueError, match="contain N, O.*elements=1,6,7,8,"):
            models.check_elements(model, [8, 7, 6])


def test_training_checks_the_elements(tmp_path):
    config = defaults.train_defaults()
    config.data.path, config.data.directory = str(DATA), str(tmp_path / "data")
    config.model.name = "mace"
    config.model.options.update({"elements": (1, 6), "cutoff": 4.0})
    with pytest.raises(ValueError, match="the data contain N, O.* for which the model has no"):
        TrainingRun.prepare(config, tmp_path)


def test_charges_that_the_model_does_not_see_are_warned_of(caplog):
    """Ions and neutral molecules of equal geometry would silently have equal energies."""
    painn = models.create("painn")
    warn_of_charges(painn, [0.0])
    warn_of_charges(with_terms(painn, {"electrostatics": {}}), [0.0, 1.0])
    embedded = models.create("so3krates", charge_embedding=True)
    for model in (embedded, with_terms(embedded, {"zbl": {}})):
        warn_of_charges(model, [0.0, 1.0])
    assert not caplog.text
    warn_of_charges(with_terms(painn, {"zbl": {}}), [1.0, 0.0, -1.0])
    assert "total charges -1, 0, +1" in caplog.text
