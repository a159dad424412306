"""Small force fields with random and with trained parameters."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ase.build import molecule

from mlip_jax import models, terms
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.potential import Potential, evaluate, example_graph
from mlip_jax.simulation.relaxation.relax import Relaxation, Relaxer
from mlip_jax.structure import Structure

CUTOFF = 4.0
ELEMENTS = (1, 6, 7, 8, 16)
OPTIONS = {
    "so3krates": {
        "num_features": 16,
        "num_layers": 1,
        "degrees": (1, 2),
        "cutoff": CUTOFF,
        "zero_init": False,
    },
    "painn": {"num_features": 16, "num_layers": 1, "cutoff": CUTOFF, "zero_init": False},
    "tiny": {"num_features": 16, "num_layers": 1, "cutoff": CUTOFF, "zero_init": False},
    "charged": {"num_features": 16, "num_layers": 1, "cutoff": CUTOFF, "zero_init": False},
}
MODELS = {"tiny": "schnet", "charged": "painn"}  # SchNet compiles fastest
TERMS = {"charged": {"electrostatics": {"cutoff": None}}}


@functools.cache
def random_potential(kind: str, seed: int = 0) -> Potential:
    """Return a force field with random parameters and large random reference energies."""
    model = terms.with_terms(
        models.create(MODELS.get(kind, kind), **OPTIONS[kind]), TERMS.get(kind, {})
    )
    rng = np.random.default_rng(seed)
    # only shapes: compiling the initialization would take longer than the tests
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), example_graph()))
    params = jax.tree.map(lambda s: _random(rng, s.shape), shapes)
    reference = np.zeros(119)
    reference[list(ELEMENTS)] = rng.normal(-2e3, 1e3, len(ELEMENTS))
    return Potential(
        model=model,
        params=params,
        cutoff=CUTOFF,
        reference_energies=reference,
        energy_scale=1.7,
        elements=ELEMENTS,
    )


def _random(rng, shape):
    scale = shape[-2] ** -0.5 if len(shape) > 1 and shape[0] != 119 else 0.3
    return rng.normal(0, scale, shape).astype(np.float32)


@pytest.fixture(scope="session")
def make_potential():
    """Function make_potential(kind, seed=0), with kind a key of OPTIONS."""
    return random_potential


@pytest.fixture
def zero_steps(monkeypatch):
    """Relaxations of zero steps, which compile nothing, for tests of what precedes or follows them."""

    def stream(relaxer, molecules):
        for key, atoms in molecules:
            yield key, Relaxation(atoms, "converged", energy=0.0)

    monkeypatch.setattr(Relaxer, "stream", stream)


@pytest.fixture(scope="session")
def morse_potential():
    """Force field "tiny" fitted to methanol with Morse bonds between all pairs of atoms, so that it has a
    minimum.
    """
    minimum = molecule("CH3OH")
    ideal = minimum.get_all_distances()
    rng = np.random.default_rng(0)
    structures = []
    for amplitude in np.repeat([0.03, 0.08, 0.15], 12):
        positions = minimum.positions + rng.normal(0, amplitude, (len(minimum), 3))
        energy, forces = _morse(positions, ideal)
        structures.append(Structure(minimum.numbers, positions, energy, forces))
    n = len(structures)
    batch = jax.tree.map(
        jnp.asarray,
        build_batch(
            Columns.from_structures(structures), PaddingBudget(6 * n + 1, 30 * n + 2, n + 1), CUTOFF
        ),
    )
    potential = random_potential("tiny", seed=1)
    model = potential.model

    def loss(params):
        out = evaluate(model, params, batch, potential.energy_scale)
        errors = out.energy - batch.globals["energy"], out.forces - batch.nodes["forces"]
        return jnp.mean(errors[0] ** 2) + 10 * jnp.mean(errors[1] ** 2)

    optimizer = optax.adam(optax.exponential_decay(5e-3, 300, 0.02))

    @jax.jit
    def fit(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=300)[0][0]

    return dataclasses.replace(potential, params=jax.device_get(fit(potential.params)))


def _morse(positions, ideal):
    vectors = positions[:, None] - positions[None]
    distances = np.linalg.norm(vectors, axis=-1) + np.eye(len(positions))
    decay = np.exp(-1.5 * (distances - ideal)) * (1 - np.eye(len(positions)))
    energy = 0.5 * np.sum((1 - decay) ** 2 * (1 - np.eye(len(positions))))
    slope = 3.0 * (1 - decay) * decay
    return energy, -np.sum((slope / distances)[:, :, None] * vectors, axis=1)
