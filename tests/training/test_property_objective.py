"""Tests for the loss of properties: unknown labels, padding and sums over devices."""

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest

from mlip_jax.config import ConfigError, complete
from mlip_jax.datasets.property_data import Target
from mlip_jax.defaults import property_defaults
from mlip_jax.training.noise import DISPLACEMENT
from mlip_jax.training.property_objective import Properties, check

TARGETS = (
    Target("gap", "scalar", weight=2.0, scale=0.5, shift=3.0),
    Target("dipole", "vector", scale=2.0),
    Target("charges", "atom", scale=0.1),
)


class Fixed:
    """Model whose outputs are its parameters."""

    @staticmethod
    def apply(params, graph):
        return params


def graph(gap=(1.0, np.nan, 7.0), charge=0.5):
    """Batch of two molecules with two atoms and one atom, and one padding atom."""
    n = 4
    return jraph.GraphsTuple(
        nodes={
            "positions": np.zeros((n, 3), np.float32),
            "properties": {
                "charges": np.array([charge, np.nan, 1.0, 9.0], np.float32),
                DISPLACEMENT: np.array(
                    [[0.1, 0, 0], [0, 0, 0], [0, 0.2, 0], [5, 5, 5]], np.float32
                ),
            },
        },
        edges={},
        senders=np.zeros(0, np.int32),
        receivers=np.zeros(0, np.int32),
        globals={
            "properties": {
                "gap": np.array(gap, np.float32),
                "dipole": np.array([[1, 2, 3], [0, 0, 0], [9, 9, 9]], np.float32),
            }
        },
        n_node=np.array([2, 1, 1], np.int32),
        n_edge=np.zeros(3, np.int32),
    )


PREDICTED = {
    "gap": jnp.array([1.5, 2.0, 0.0]),
    "dipole": jnp.array([[1.0, 2, 4], [0, 1, 0], [0, 0, 0]]),
    "charges": jnp.array([0.0, 0.3, 1.0, 0.0]),
    DISPLACEMENT: jnp.array([[0.0, 3.0, 0], [1, 1, 1], [0, 0.7, 0], [1, 0, 0]]),
}


def objective(**options):
    return Properties(Fixed, TARGETS, **options)


def test_sums_equal_a_calculation_by_hand():
    o = objective(penalty="mse", align_weight=0.1)
    _, sums = o.evaluate(PREDICTED, graph())
    # one gap with error 0.5; six components, two with error 1; two charges, one with error 0.5
    assert {k: float(v) for k, v in sums.count.items()} == {"gap": 1, "dipole": 6, "charges": 2}
    assert float(sums.penalty["gap"]) == pytest.approx(0.25) and float(
        sums.absolute["gap"]
    ) == pytest.approx(0.25)
    assert float(sums.penalty["dipole"]) == 2 and float(sums.absolute["dipole"]) == 4
    assert float(sums.penalty["charges"]) == pytest.approx(0.25)
    # perpendicular and parallel; an atom at its reference position has no direction
    assert float(sums.aligned) == 2 and float(sums.alignment) == pytest.approx(1.0)
    loss = float(o.combine(sums, sums, 0))
    assert loss == pytest.approx(2 * 0.25 + 2 / 6 + 0.25 / 2 + 0.1 * 1.0 / 2)
    row = o.averages(jax.tree.map(float, sums), "train", 0)
    assert row["train_loss"] == pytest.approx(loss) and row["train_gap_mae"] == pytest.approx(0.25)
    assert row["train_alignment"] == pytest.approx(0.5)
    # of a validation the properties count
    assert o.averages(jax.tree.map(float, sums), "valid")["valid_loss"] == pytest.approx(
        loss - 0.05
    )
    assert o.columns == ("loss", "gap_mae", "dipole_mae", "charges_mae", "alignment")
    assert "gap 0.2500 eV" in o.line(row, "train")


def test_counts_do_not_evaluate_the_model():
    o = objective(align_weight=1.0)
    sums, counts = o.sums(PREDICTED, graph()), o.counts(graph())
    assert counts.count == sums.count and counts.aligned == sums.aligned


def test_denoising_errors_are_in_units_of_the_noise():
    o = Properties(Fixed, (), align_weight=1.0, alignment="mse", noise=0.1)
    sums = o.sums(
        {DISPLACEMENT: jnp.array([[1.0, 0, 0], [0, 0, 0], [0, 1, 0], [7, 7, 7]])}, graph()
    )
    assert float(sums.aligned) == 3 and float(sums.alignment) == pytest.approx(1 / 3)
    assert o.averages(jax.tree.map(float, sums), "valid")["valid_loss"] == pytest.approx(1 / 9)


class Refining:
    """Model whose predictions are its parameters, if it is asked for refined positions."""

    @staticmethod
    def apply(params, graph, method):
        assert method == "with_refinement"
        return params


def test_refined_positions_have_absolute_errors_in_angstrom():
    o = Properties(Refining, (), align_weight=1.0, alignment="mae", noise=0.1)
    labels = graph().nodes["properties"][DISPLACEMENT]
    sums = o.sums({DISPLACEMENT: labels + jnp.array([0.1, -0.2, 0.0])}, graph())
    assert float(sums.aligned) == 3 and float(sums.alignment) == pytest.approx(3 * 0.3)


@pytest.mark.parametrize("alignment", ["cosine", "mse"])
@pytest.mark.parametrize("penalty", ["mse", "mae", "huber"])
def test_gradients_are_finite_without_labels(penalty, alignment):
    o = objective(penalty=penalty, align_weight=0.3, alignment=alignment)
    zero = jax.tree.map(jnp.zeros_like, PREDICTED)
    for params in (PREDICTED, zero):
        grads = jax.grad(lambda p: o.combine(s := o.sums(p, graph()), s, 0))(params)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
        assert grads["gap"][1] == 0 and grads["gap"][2] == 0 and not grads["dipole"][2].any()
        assert grads["charges"][1] == 0 and not grads[DISPLACEMENT][3].any()


def test_parts_of_devices_add_up():
    o = objective(align_weight=0.1)
    parts = [o.sums(PREDICTED, g) for g in (graph(), graph(gap=(2.0, 4.0, 0.0), charge=np.nan))]
    total = jax.tree.map(jnp.add, *parts)
    assert float(sum(o.combine(p, total, 0) for p in parts)) == pytest.approx(
        float(o.combine(total, total, 0))
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"property.targets": ()}, "nothing to learn: property.targets is empty"),
        ({"property.penalty": "l2"}, "unknown property.penalty 'l2'"),
        ({"align.loss": "cos"}, "Did you mean 'cosine'"),
        ({"align.weight": 0.1}, "no input is displaced"),
        ({"align.weight": -1.0}, "align.weight must be at least 0"),
        ({"align.frames_share": 1.5}, "align.frames_share must be from 0 to 1"),
        ({"align.weight": 1.0, "align.loss": "mse", "align.frames": "pm3"}, "set align.noise"),
        (
            {"dens.weight": 1.0, "align.noise": 0.1},
            "property.targets and align.frames must be empty",
        ),
        (
            {"dens.weight": 1.0, "align.noise": 0.1, "property.targets": (), "dens.share": 0.0},
            "dens.share must be above",
        ),
    ],
)
def test_inconsistent_configs_are_errors(changes, message):
    c = property_defaults()
    c.property.targets = ("gap",)
    c.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        c = complete(c, property_defaults())
        check(c.property, c.align, c.dens)


def test_a_direction_of_length_zero_does_not_decide_the_step():
    """Detects a derivative of 1e9 times the displacement, which clipping turns into the whole step."""
    objective = Properties(Fixed, (), align_weight=1.0)

    def loss(output):
        return objective.sums({DISPLACEMENT: output}, graph()).alignment

    slopes = [jax.grad(loss)(jnp.full((4, 3), length)) for length in (0.0, 1e-12, 1e-3)]
    assert all(0 < jnp.abs(slope).max() <= 200 for slope in slopes)
