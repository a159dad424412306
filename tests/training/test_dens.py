"""Tests for DeNS: displaced structures, encoded forces and the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax import models
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.models.layers.readouts import with_heads
from mlip_jax.potential import evaluate, example_graph
from mlip_jax.structure import Structure
from mlip_jax.training import losses
from mlip_jax.training.dens import ENCODED, BatchNoise, DeNS, ForceFieldAdapter
from mlip_jax.training.noise import DISPLACEMENT, CoordinateNoise
from mlip_jax.training.objectives import ForceField
from tests.models.parameters import quick_parameters

CUTOFF, NOISE, SCALE = 4.0, 0.05, 2.0
PAINN = {
    "num_features": 8,
    "num_layers": 1,
    "num_radial": 6,
    "cutoff": CUTOFF,
    "zero_init": False,
    "force_encoding": True,
}
LOSS = {"penalty": "mae", "force_penalty": "norm", "energy_per_atom": False}


def columns(count=60, known=True):
    rng = np.random.default_rng(0)
    for _ in range(count):
        forces = rng.normal(size=(3, 3))
        if not known:
            forces[1, 1] = np.nan
        yield Structure(
            np.array([8, 1, 1], np.int32),
            np.array([[0, 0, 0], [0.96, 0, 0], [-0.2, 0.9, 0]]) + 0.05 * rng.normal(size=(3, 3)),
            energy=rng.normal(),
            forces=forces,
        )


DATA = Columns.from_structures(columns())
CORRUPTED = BatchNoise(CoordinateNoise(NOISE, CUTOFF, 1), 0.3)


def test_a_fraction_of_the_structures_is_displaced_and_the_others_are_unchanged():
    displaced = CORRUPTED(DATA, np.arange(60), 0)
    moved = np.isfinite(displaced.atom_properties[DISPLACEMENT]).all((1,)).reshape(60, 3)
    assert (moved.all(1) == moved.any(1)).all() and 8 < moved.all(1).sum() < 30
    atoms = moved.ravel()
    np.testing.assert_array_equal(displaced.positions[~atoms], DATA.positions[~atoms])
    np.testing.assert_array_equal(displaced.forces[~atoms], DATA.forces[~atoms])
    assert (
        np.isnan(displaced.forces[atoms]).all()
        and (displaced.atom_properties[ENCODED][~atoms] == 0).all()
    )
    np.testing.assert_array_equal(displaced.atom_properties[ENCODED][atoms], DATA.forces[atoms])
    np.testing.assert_array_equal(displaced.energy, DATA.energy)
    assert (displaced.positions[atoms] != DATA.positions[atoms]).all()
    assert (CORRUPTED(DATA, np.arange(60), 1).positions != displaced.positions).any()
    np.testing.assert_array_equal(CORRUPTED(DATA, np.arange(60), 0).positions, displaced.positions)


def test_structures_with_unknown_forces_are_not_displaced():
    unknown = Columns.from_structures(columns(20, known=False))
    displaced = CORRUPTED(unknown, np.arange(20), 0)
    np.testing.assert_array_equal(displaced.positions, unknown.positions)
    assert np.isnan(displaced.atom_properties[DISPLACEMENT]).all()


@pytest.fixture(scope="module")
def setup():
    model = with_heads(models.create("painn", **PAINN), {DISPLACEMENT: {"kind": "atom_vector"}})
    params = quick_parameters(model, example_graph())
    half = BatchNoise(CoordinateNoise(NOISE, CUTOFF, 1), 0.5)
    graph = build_batch(
        half(DATA.take(np.arange(10)), np.arange(10), 0),
        PaddingBudget(34, 90, 11),
        CUTOFF,
        properties=(DISPLACEMENT, ENCODED),
    )
    field = ForceField(ForceFieldAdapter(model), SCALE, lambda step: 0.9, 0.9, LOSS)
    return model, params, graph, DeNS(field, 0.5, NOISE, SCALE)


def test_the_loss_equals_a_calculation_by_hand(setup):
    model, params, graph, objective = setup
    evaluation, sums = jax.jit(objective.evaluate)(params, graph)
    labels = graph.nodes["properties"][DISPLACEMENT]
    known = np.isfinite(labels).all(1) & (np.arange(34) < 30)
    error = np.asarray(evaluation.properties[DISPLACEMENT])[known] - labels[known] / NOISE
    assert float(sums.atoms) == known.sum() > 0
    np.testing.assert_allclose(sums.denoising, (error**2).sum() / 3, rtol=1e-4)
    encoded = graph._replace(
        nodes={**graph.nodes, ENCODED: graph.nodes["properties"][ENCODED] / SCALE}
    )
    field = ForceFieldAdapter(model)
    plain = jax.jit(lambda p, g: losses.sums(evaluate(field, p, g, SCALE), g, **LOSS))(
        params, encoded
    )
    np.testing.assert_allclose(sums.force_field, plain, rtol=1e-4)
    loss = losses.combine(plain, plain, 0.9) + 0.5 * sums.denoising / sums.atoms
    np.testing.assert_allclose(objective.combine(sums, sums, 0), loss, rtol=1e-4)
    row = objective.averages(jax.tree.map(float, sums), "train", 0)
    assert row["train_loss"] == pytest.approx(float(loss), rel=1e-4) and set(row) == {
        f"train_{c}" for c in objective.columns
    }
    counts = objective.counts(graph)
    assert counts.atoms == sums.atoms and counts.force_field.energies == sums.force_field.energies


@pytest.mark.slow
def test_encoded_forces_affect_only_displaced_structures(setup):
    model, params, graph, objective = setup
    evaluation = jax.jit(objective.evaluate)(params, graph)[0]
    other = dict(graph.nodes["properties"])
    other[ENCODED] = -other[ENCODED]
    changed = jax.jit(objective.evaluate)(
        params, graph._replace(nodes={**graph.nodes, "properties": other})
    )[0]
    moved = np.asarray(graph.nodes["properties"][ENCODED]).any(1)
    differs = (
        np.abs(
            np.asarray(evaluation.properties[DISPLACEMENT] - changed.properties[DISPLACEMENT])
        ).max(1)
        > 1e-5
    )
    assert moved.any() and (differs == moved).all()
    grads = jax.grad(lambda p: objective.combine(s := objective.sums(p, graph), s, 0))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert jnp.abs(grads["params"]["backbone"]["encode_forces"]["kernel"]).max() > 0


@pytest.mark.slow
def test_large_forces_do_not_make_the_features_overflow():
    model = models.create(
        "painn", num_features=128, num_layers=3, cutoff=CUTOFF, force_encoding=True
    )
    params = jax.jit(model.init)(jax.random.key(0), example_graph())
    graph = build_batch(DATA.take(np.arange(10)), PaddingBudget(34, 90, 11), CUTOFF)

    real = graph.nodes["numbers"] > 0

    def largest(size):
        forces = np.where(real[:, None], size, 0.0) * np.ones((1, 3), np.float32)
        out = jax.jit(model.apply)(params, graph._replace(nodes={**graph.nodes, ENCODED: forces}))
        return float(jnp.abs(out.features[real]).max())

    # A layer is cubic in its vectors: without scaling, forces of 20 eV/Å overflow after three.
    assert largest(20.0) < 3 * largest(0.0)
    assert largest(20.0) != largest(2.0)
