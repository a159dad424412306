"""Tests for options of the equivariant transformer.

Agreement with TorchMD-Net is tested in tests/importers/test_torchmdnet.py.
"""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from mlip_jax import models
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.potential import evaluate, example_graph
from mlip_jax.structure import Structure

SMALL = {"num_features": 8, "num_layers": 1, "num_heads": 2, "num_radial": 8, "zero_init": False}


pytestmark = pytest.mark.usefixtures("double_precision")


def make(**options):
    """Return a model with random parameters: no bias is zero."""
    model: Any = models.create("equivariant_transformer", **SMALL | options)
    rng = np.random.default_rng(0)
    template = jax.eval_shape(model.init, jax.random.key(0), example_graph())
    return model, jax.tree.map(lambda p: 0.4 * rng.standard_normal(p.shape), template)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, batch):
    return model.apply(params, batch)


def energy_of(model, params, structure):
    batch = build_batch(
        Columns.from_structures([structure]), PaddingBudget(3, 4, 2), model.cutoff, dtype=np.float64
    )
    return float(np.asarray(apply(model, params, batch).energies)[: len(structure)].sum())


def runner(model):
    function = jax.jit(lambda p, g: evaluate(model, p, g, 1.0))

    def run(params, structure):
        columns = Columns.from_structures([structure])
        batch = build_batch(columns, PaddingBudget(10, 70, 2), model.cutoff, dtype=np.float64)
        result = function(params, batch)
        return float(result.energy[0]), np.asarray(result.forces)[: len(structure)]

    return run


def pair(distance):
    return Structure(np.array([6, 8]), np.array([[0.0, 0.0, 0.0], [0.0, 0.6, 0.8]]) * distance)


def test_the_published_form_jumps_at_the_cutoff_and_the_default_does_not():
    jumps = []
    for vector_cutoff in (False, True):
        model, params = make(vector_cutoff=vector_cutoff)
        jumps.append(
            abs(
                energy_of(model, params, pair(5.0 - 1e-8))
                - energy_of(model, params, pair(5.0 + 1e-8))
            )
        )
    assert jumps[0] > 1e-5 and jumps[1] < 1e-9


def test_pairs_outside_the_range_do_not_interact():
    """Below `cutoff_lower`, and beyond the cutoff in a list with a skin."""
    model, params = make(
        cutoff_lower=1.5, cutoff=3.0, vector_cutoff=False, distance_influence="none"
    )
    function = jax.jit(lambda p, g: evaluate(model, p, g, 1.0))
    for distance in (1.2, 3.4):
        near, apart = (
            build_batch(Columns.from_structures([s]), PaddingBudget(3, 4, 2), 6.0, dtype=np.float64)
            for s in (pair(distance), pair(50.0))
        )
        assert near.n_edge[0] == 2 and apart.n_edge[0] == 0
        result, expected = function(params, near), function(params, apart)
        assert float(result.energy[0]) == pytest.approx(float(expected.energy[0]), rel=1e-12)
        assert not np.asarray(result.forces).any()


@pytest.mark.slow
def test_splines_follow_the_exact_filters():
    rng = np.random.default_rng(3)
    structure = Structure(np.array([6, 1, 8, 7]), rng.normal(size=(4, 3)) * 1.2)
    exact, params = make()
    _, expected = runner(exact)(params, structure)
    errors = []
    for knots in (24, 48):
        _, forces = runner(exact.clone(radial_filter="spline", num_knots=knots))(params, structure)
        errors.append(np.abs(forces - expected).max() / np.abs(expected).max())
    assert errors[0] < 1e-1 and errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("basis", ["expnorm", "gaussian"])
def test_given_radial_constants_equal_the_computed_ones(basis):
    """The documented defaults, given as numbers, change nothing; other numbers do."""
    model, params = make(radial_basis=basis)
    if basis == "gaussian":
        centers, widths = np.linspace(0.0, 5.0, 8), [5.0 / 7]
    else:
        centers, widths = (
            np.linspace(np.exp(-5.0), 1.0, 8),
            np.full(8, (2 / 8 * (1 - np.exp(-5.0))) ** -2),
        )
    structure = pair(1.3)
    energy = energy_of(model, params, structure)
    given = model.clone(
        radial_centers=tuple(map(float, centers)), radial_widths=tuple(map(float, widths))
    )
    assert energy_of(given, params, structure) == pytest.approx(energy, rel=1e-13)
    other = given.clone(radial_centers=tuple(map(float, centers + 0.1)))
    assert abs(energy_of(other, params, structure) - energy) > 1e-6


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("radial_basis", "bessel", "bessel"),
        ("distance_influence", "all", "all"),
        ("head", "vector", "vector"),
        ("radial_filter", "splines", "splines"),
        ("activation", "silo", "silo"),
        ("attn_activation", "silo", "silo"),
        ("num_heads", 3, "num_heads=3"),
        ("cutoff_lower", 6.0, "cutoff_lower=6.0"),
        ("radial_centers", (1.0, 2.0), "radial_centers contains 2 numbers.*num_radial=8"),
    ],
)
def test_invalid_option_value_is_reported(option, value, message):
    model: Any = models.create("equivariant_transformer", **SMALL | {option: value})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), example_graph())
