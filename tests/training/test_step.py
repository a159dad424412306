"""Tests for the compiled training step: one compilation, gradient and average of parameters."""

import contextlib
import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from mlip_jax import models
from mlip_jax.datasets import readers, statistics
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality.filters import Filters
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.padding import choose_budget, graph_sizes
from mlip_jax.graphs.pipeline import stack
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.potential import evaluate, example_graph
from mlip_jax.target_device import compiling_for
from mlip_jax.training import losses
from mlip_jax.training.data import Batches, Split
from mlip_jax.training.evaluation import add, predict, validate
from mlip_jax.training.objectives import ForceField
from mlip_jax.training.step import Trainer
from tests.models.parameters import quick_parameters

DATA = Path(__file__).parents[1] / "data/gfn2_small.hdf5"
OPTIONS = {"penalty": "mse", "energy_per_atom": True, "huber_delta": 0.05}
RATE, DECAY = 1e-2, 0.9


@pytest.fixture(scope="module")
def setup():
    with readers.open_data(DATA) as source:
        columns = Columns.from_structures(source)
    filters = Filters(elements=("H", "C", "N", "O", "S"), charge=0.0)
    columns = columns.take(np.flatnonzero(filters.reasons(columns) == 0))
    model = models.create("schnet", num_features=8, num_layers=1, num_radial=6, zero_init=False)
    split = Split(columns, np.arange(len(columns)), graph_sizes(columns, model.cutoff))
    reference = statistics.reference_energies(statistics.Summary([columns]), "least_squares")
    batches = Batches(
        (choose_budget(split.sizes, 4),), model.cutoff, reference, jax.local_device_count()
    )
    trainer = Trainer(
        ForceField(model, 1.3, lambda step: 0.7, 0.7, OPTIONS), optax.sgd(RATE), DECAY
    )
    return model, split, batches, trainer, quick_parameters(model, example_graph())


def test_all_steps_of_an_epoch_share_one_compile(setup):
    _, split, batches, trainer, params = setup
    state = trainer.init(params)
    before = trainer.num_compiles
    with contextlib.closing(batches.training(split, seed=0)) as stream:
        for plan, graphs in stream:
            state, _ = trainer.train(state, graphs)
            if plan.epoch == 2:
                break
    assert trainer.num_compiles <= before + 1 and trainer.num_compiles == 1


def test_update_is_a_gradient_step_of_the_stated_loss(setup):
    model, split, batches, trainer, params = setup
    plan, graphs = next(batches.training(split, seed=1))
    one = jax.tree.map(lambda x: jax.numpy.asarray(x[0, 0, 0]), graphs)

    def loss(p):
        s = losses.sums(evaluate(model, p, one, 1.3), one, **OPTIONS)
        return 0.3 * s.energy_loss / s.energies + 0.7 * s.force_loss / s.forces

    expected = jax.tree.map(lambda p, g: p - RATE * g, params, jax.jit(jax.grad(loss))(params))
    state = trainer.single(trainer.train(trainer.init(params), graphs)[0])
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    averaged = jax.tree.map(lambda p, q: p + (q - p) * (1 - min(DECAY, 1 / 10)), params, expected)
    for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(averaged)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    assert state.step == 1


def test_a_packed_state_gives_the_same_step(setup):
    """As on GPUs and TPUs, where a call passes few arrays."""
    _, split, batches, trainer, params = setup
    _, graphs = next(batches.training(split, seed=1))
    expected, result = trainer.train(trainer.init(params), graphs)
    with compiling_for("gpu"):
        packed = Trainer(trainer.objective, optax.sgd(RATE), DECAY)
        state = packed.init(params)
        assert len(jax.tree.leaves(state)) == 4  # each array of a call takes time on the host
        state, packed_result = packed.train(state, graphs)
        sums = packed.evaluate(state.ema, jax.tree.map(lambda x: x[:, 0, 0], graphs))[1]
    assert jax.tree.structure(packed.snapshot(state)) == jax.tree.structure(expected)
    for a, b in zip(
        jax.tree.leaves(packed.single((state, packed_result))),
        jax.tree.leaves(trainer.single((expected, result))),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert np.isfinite(sums.energy_abs).all()


def test_predictions_agree_with_validation_sums(setup):
    _, split, batches, trainer, params = setup
    params = trainer.replicate(params)
    predicted = predict(trainer, params, split, batches)
    sums = validate(trainer, params, split, batches)
    columns = split.columns()
    energy = np.abs(predicted.energy - columns.energy) / columns.n_atoms
    assert sums.energies == len(columns) and sums.forces == columns.forces.size
    np.testing.assert_allclose(sums.energy_abs, energy.sum(), rtol=1e-4)
    np.testing.assert_allclose(
        sums.force_abs, np.abs(predicted.forces - columns.forces).sum(), rtol=1e-4
    )


def test_sums_add_up_over_steps():
    ones = losses.LossSums(*(np.full(1, i + 1.0, np.float32) for i in range(8)))
    assert add([ones, ones, ones]) == losses.LossSums(*(3.0 * (i + 1) for i in range(8)))


def with_gaps(split, columns, kind):
    """Return a split in which some or all structures lack labels."""
    energy, forces = columns.energy.copy(), columns.forces.copy()
    if kind == "some":
        energy[::3] = np.nan
        forces[columns.atoms_of(np.arange(0, len(columns), 2))] = np.nan
        forces[1::5, 0] = np.nan
    elif kind == "no energies":
        energy[:] = np.nan
    elif kind == "no forces":
        forces[:] = np.nan
    elif kind == "none":
        energy[:], forces[:] = np.nan, np.nan
    return dataclasses.replace(
        split, rows=dataclasses.replace(columns, energy=energy, forces=forces)
    )


@pytest.mark.parametrize(
    "penalty",
    [
        ("mse", "rmse"),
        *(pytest.param(p, marks=pytest.mark.slow) for p in (("huber", "norm"), ("mae", None))),
    ],
)
def test_micro_batches_equal_one_large_batch(setup, penalty):
    """Some micro-batches lack labels or structures, and beta has several values."""
    model, split, batches, _, params = setup
    options = {"penalty": penalty[0], "force_penalty": penalty[1], "huber_delta": 0.1}
    members = np.array_split(np.arange(9), 3) + [np.zeros(0, np.int64)]
    budget = choose_budget(split.sizes, 5)
    whole_budget = PaddingBudget(*(4 * n for n in budget))
    betas = np.array([0.7, 1.0, 0.0], np.float32)
    # the step is used to choose beta, so that one program serves for all
    trainer = Trainer(
        ForceField(model, 1.3, lambda step: jax.numpy.asarray(betas)[step], 0.7, options),
        optax.sgd(RATE),
        DECAY,
    )

    @jax.jit
    def expected(p, graph, beta):
        def loss(p):
            s = losses.sums(evaluate(model, p, graph, 1.3), graph, **options)
            return losses.combine(s, s, beta), s

        (_, s), grads = jax.value_and_grad(loss, has_aux=True)(p)
        return jax.tree.map(lambda p, g: p - RATE * g, p, grads), s

    def built(split, members, budget):
        return build_batch(split.columns(members), budget, model.cutoff, batches.reference)

    for kind in ("all", "some", "no energies", "no forces", "none"):
        part = with_gaps(split, split.rows, kind)
        whole = built(part, np.arange(9), whole_budget)
        micro = jax.tree.map(
            lambda x: x[None, None], stack([built(part, p, budget) for p in members])
        )
        for step, beta in enumerate(betas):
            state = trainer.init(params)._replace(step=trainer.replicate(np.int32(step)))
            state, result = trainer.train(state, micro)
            after, sums = expected(params, whole, beta)
            state, result = trainer.single(state), trainer.single(result)
            assert result.finite[0], (kind, beta)
            for name, a, b in zip(sums._fields, result.sums, sums):
                np.testing.assert_allclose(
                    a[0], b, rtol=2e-4, atol=1e-5, err_msg=f"{kind} {beta} {name}"
                )
            for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(after)):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6, err_msg=f"{kind} {beta}")
            moved = any(
                np.abs(a - b).max() > 1e-4
                for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(params))
            )
            silent = {"none": True, "no energies": beta == 0.0, "no forces": beta == 1.0}.get(
                kind, False
            )
            assert moved != silent, (kind, beta)
    assert trainer.num_compiles == 1


def test_the_learning_rate_is_scaled_without_compilation(setup):
    _, split, batches, trainer, params = setup
    with contextlib.closing(batches.training(split, seed=1)) as stream:
        _, graphs = next(stream)
    full = trainer.single(trainer.train(trainer.init(params), graphs)[0].params)
    before = trainer.num_compiles
    state, _ = trainer.train(trainer.scale_rate(trainer.init(params), 0.25), graphs)
    for start, a, b in zip(*map(jax.tree.leaves, (params, full, trainer.single(state.params)))):
        np.testing.assert_allclose(b - start, 0.25 * (a - start), rtol=1e-3, atol=1e-6)
    assert trainer.single(state.rate_scale) == 0.25 and trainer.num_compiles == before


def test_a_snapshot_survives_later_steps(setup):
    """The buffers of the state are donated to later steps."""
    _, split, batches, trainer, params = setup
    with contextlib.closing(batches.training(split, seed=1)) as stream:
        first = trainer.init(params)
        taken = trainer.snapshot(first)
        state = first
        for _ in range(3):
            state, _ = trainer.train(state, next(stream)[1])
    for a, b in zip(jax.tree.leaves(taken.params), jax.tree.leaves(params)):
        np.testing.assert_array_equal(a, b)
    assert taken.step == 0 and trainer.single(state.step) == 3
    with pytest.raises((RuntimeError, ValueError), match="delete|donate"):
        trainer.train(first, next(batches.training(split, seed=1))[1])


def test_every_process_receives_a_stop_request(setup):
    _, split, batches, trainer, params = setup
    with contextlib.closing(batches.training(split, seed=1)) as stream:
        _, graphs = next(stream)
    state = trainer.init(params)
    for wish in (False, True):
        state, result = trainer.train(state, graphs, stop=wish)
        assert (trainer.single(result.stop)[0] > 0) == wish


def test_energy_only_training_equals_beta_zero(setup):
    """The program computes no derivative with respect to positions and reports no force errors."""
    model, split, batches, _, params = setup
    graph = next(iter(batches.in_order(split)))[1]
    inputs = jax.tree.map(lambda x: x[:, None, None], graph)
    after, sums = [], []
    for energy_only in (False, True):
        objective = ForceField(model, 1.3, lambda step: 0.0, 0.0, OPTIONS, energy_only=energy_only)
        trainer = Trainer(objective, optax.sgd(RATE), DECAY)
        state, result = trainer.train(trainer.init(params), inputs)
        after.append(trainer.single(state.params))
        sums.append(trainer.single(result.sums))
    for a, b in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(sums[1].energy_loss, sums[0].energy_loss, rtol=1e-6)
    assert sums[0].forces > 0 and sums[1].forces == 0
    row = objective.averages(jax.tree.map(float, jax.tree.map(np.sum, sums[1])), "train", 0)
    assert np.isnan(row["train_force_mae_mev_per_ang"]) and np.isfinite(row["train_loss"])
