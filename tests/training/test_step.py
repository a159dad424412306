"""The compiled training step: one compile, the right gradient, the average of the parameters."""

import contextlib
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from mlip_jax import models
from mlip_jax.datasets import readers, statistics
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.filters import Filters
from mlip_jax.graphs.batching import choose_budget, measure
from mlip_jax.potential import evaluate, example_graph
from mlip_jax.training import losses
from mlip_jax.training.data import Batches, Split
from mlip_jax.training.evaluation import add, predict, validate
from mlip_jax.training.step import Trainer

DATA = Path(__file__).parents[1] / "data/gfn2_small.hdf5"
OPTIONS = {"penalty": "mse", "energy_per_atom": True, "huber_delta": 0.05}
RATE, DECAY = 1e-2, 0.9


@pytest.fixture(scope="module")
def setup():
    with readers.open_data(DATA) as source:
        columns = Columns.from_structures(source)
    filters = Filters(elements=("H", "C", "N", "O", "S"), charge=0.0)
    columns = columns.take(np.flatnonzero(filters.reasons(columns) == 0))
    model = models.create("painn", num_features=8, num_layers=1, num_radial=6, zero_init=False)
    split = Split(columns, np.arange(len(columns)), measure(columns, model.cutoff))
    reference = statistics.reference_energies(statistics.Summary([columns]), "least_squares")
    batches = Batches((choose_budget(split.sizes, 4),), model.cutoff, reference, jax.local_device_count())
    trainer = Trainer(model, 1.3, optax.sgd(RATE), lambda step: 0.7, DECAY, OPTIONS)
    return model, split, batches, trainer, model.init(jax.random.key(0), example_graph())


def test_all_steps_of_an_epoch_share_one_compile(setup):
    _, split, batches, trainer, params = setup
    state = trainer.init(params)
    before = trainer.num_compiles
    with contextlib.closing(batches.training(split, seed=0)) as stream:
        for group, graphs in stream:
            state, _ = trainer.train(state, graphs)
            if group.epoch == 2:
                break
    assert trainer.num_compiles <= before + 1 and trainer.num_compiles == 1


def test_update_is_a_gradient_step_of_the_stated_loss(setup):
    model, split, batches, trainer, params = setup
    group, graphs = next(batches.training(split, seed=1))
    one = jax.tree.map(lambda x: jax.numpy.asarray(x[0, 0, 0]), graphs)

    def loss(p):
        s = losses.sums(evaluate(model, p, one, 1.3), one, **OPTIONS)
        return 0.3 * s.energy_loss / s.energies + 0.7 * s.force_loss / s.forces

    expected = jax.tree.map(lambda p, g: p - RATE * g, params, jax.grad(loss)(params))
    state = trainer.single(trainer.train(trainer.init(params), graphs)[0])
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    averaged = jax.tree.map(lambda p, q: p + (q - p) * (1 - min(DECAY, 1 / 10)), params, expected)
    for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(averaged)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    assert state.step == 1


def test_predictions_agree_with_validation_sums(setup):
    _, split, batches, trainer, params = setup
    params = trainer.replicate(params)
    predicted = predict(trainer, params, split, batches)
    sums = validate(trainer, params, split, batches)
    columns = split.columns()
    energy = np.abs(predicted.energy - columns.energy) / columns.n_atoms
    assert sums.energies == len(columns) and sums.forces == columns.forces.size
    np.testing.assert_allclose(sums.energy_abs, energy.sum(), rtol=1e-4)
    np.testing.assert_allclose(sums.force_abs, np.abs(predicted.forces - columns.forces).sum(), rtol=1e-4)


def test_sums_add_up_over_steps():
    ones = losses.Sums(*(np.full(1, i + 1.0, np.float32) for i in range(8)))
    assert add([ones, ones, ones]) == losses.Sums(*(3.0 * (i + 1) for i in range(8)))
