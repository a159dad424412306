"""Tests that forces of new models are smooth along a stretch of symmetric molecules."""

import dataclasses

import jax
import numpy as np
import pytest

from mlip_jax import models
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.potential import evaluate, example_graph
from mlip_jax.structure import Structure

# one layer contains all norms, and its cutoff functions
SMALL = {"num_features": 16, "num_layers": 1, "num_heads": 2, "degrees": (1, 2), "zero_init": False}
STEP = 0.0005  # Å
COUNT = 400
pytestmark = pytest.mark.usefixtures("double_precision")


def forces_of_stretch(name, **options):
    """Return the force along the bond of N2 for COUNT lengths from 1 Å on, (COUNT,)."""
    fields = {f.name for f in dataclasses.fields(models.find(name))}
    model = models.create(name, **{k: v for k, v in SMALL.items() if k in fields} | options)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), example_graph(np.float64)))
    rng = np.random.default_rng(5)

    def draw(shape):
        scale = shape[-2] ** -0.5 if len(shape) > 1 and shape[0] < 100 else 0.3
        return rng.normal(0, scale, shape)

    params = jax.tree.map(lambda s: draw(s.shape), shapes)
    lengths = 1.0 + STEP * np.arange(COUNT)
    structures = [Structure(np.array([7, 7]), np.array([[0, 0, 0], [0, 0, x]])) for x in lengths]
    budget = PaddingBudget(2 * COUNT + 1, 2 * COUNT + 2, COUNT + 1)
    graph = build_batch(
        Columns.from_structures(structures), budget, float(model.cutoff), dtype=np.float64
    )
    out = jax.jit(lambda p, g: evaluate(model, p, g, 1.0))(params, graph)
    return np.asarray(out.forces)[1 : 2 * COUNT : 2, 2]


def kink(forces):
    """Return the largest change of the force's slope over a step, over the spread of the slopes."""
    slopes = np.diff(forces)
    return np.abs(np.diff(slopes)).max() / (slopes.max() - slopes.min())


# Models with norms of vectors, which can have a kink, run in the fast tests.
WITH_NORMS = ("equivariant_transformer", "painn", "painn_oc")


@pytest.mark.parametrize(
    "name",
    [n if n in WITH_NORMS else pytest.param(n, marks=pytest.mark.slow) for n in models.names()],
)
def test_forces_of_new_models_are_smooth(name):
    assert kink(forces_of_stretch(name, **models.new_run_options(name))) < 0.15


def test_published_epsilon_of_painn_is_not_smooth():
    assert kink(forces_of_stretch("painn")) > 0.3
