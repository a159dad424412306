"""Tests for Allegro with the weights of nequip-allegro.

The fixtures tests/data/parity_allegro_*.npz are outputs of nequip-allegro 0.8.3 in float64 for
small models with random weights: acetamide, water and a crystal whose cell is smaller than the
cutoff. "parity": three layers with pseudotensors, Bessel functions with moved roots. "natural":
splines, cutoffs and numbers of neighbors by element, one weight for all channels, linear readout.
"""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.padding import graph_sizes
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.importers import allegro
from mlip_jax.importers.formats.weights import WeightsError
from mlip_jax.potential import evaluate
from mlip_jax.structure import Structure

DATA = Path(__file__).parents[1] / "data"
KEYS = ("structures/3", "structures/4", "periodic/0")


@pytest.fixture
def saved(tmp_path):
    """Function kind -> (path of a weights file, arguments of the model, arrays of the fixture)."""

    def save(kind):
        with np.load(DATA / f"parity_allegro_{kind}.npz") as data:
            arrays = dict(data)
        state = {
            k.removeprefix("weights/"): v for k, v in arrays.items() if k.startswith("weights/")
        }
        np.savez(tmp_path / "weights.npz", **{f"sole_model.{k}": v for k, v in state.items()})
        return tmp_path / "weights.npz", ast.literal_eval(str(arrays["config"])), arrays

    return save


def outputs(potential, arrays, dtype):
    """Return total energies, forces and the stress of the crystal."""
    cells = [{"cell": arrays[f"{k}/cell"], "pbc": arrays[f"{k}/pbc"]} for k in KEYS[2:]]
    structures = [
        Structure(arrays[f"{k}/numbers"], arrays[f"{k}/positions"], **cell)
        for k, cell in zip(KEYS, [{}, {}, *cells])
    ]
    columns = Columns.from_structures(structures)
    sizes = graph_sizes(columns, potential.cutoff)
    budget = PaddingBudget(int(sizes.n_node.sum()) + 3, int(sizes.n_edge.sum()) + 6, 5)
    batch = build_batch(columns, budget, potential.cutoff, dtype=dtype)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), potential.params)
    run = jax.jit(lambda p, g: evaluate(potential.model, p, g, 1.0, with_stress=True))
    result = run(params, batch)
    reference = [potential.reference_energies[s.numbers].sum() for s in structures]
    return (
        np.asarray(result.energy[:3], np.float64) + reference,
        np.asarray(result.forces[: len(columns.numbers)]),
        np.asarray(result.stress[2]),
    )


@pytest.mark.parametrize(
    ("kind", "precision", "relative"),
    [
        ("parity", "float64", 1e-11),
        ("natural", "float64", 1e-11),
        # seconds of compilation
        pytest.param("natural", "float32", 1e-5, marks=pytest.mark.slow),
    ],
)
def test_agrees_with_nequip_allegro(saved, kind, precision, relative):
    path, config, arrays = saved(kind)
    potential = allegro.load(path, config)
    with jax.enable_x64(precision == "float64"):
        found = outputs(potential, arrays, np.dtype(precision))
    expected = [
        np.concatenate([arrays[f"{k}/{what}"] for k in KEYS]) for what in ("energy", "forces")
    ]
    expected.append(arrays["periodic/0/stress"])
    for values, reference in zip(found, expected):
        np.testing.assert_allclose(
            values, reference, rtol=0, atol=relative * np.abs(reference).max()
        )
    assert potential.elements == (1, 6, 7, 8, 16)


def test_energy_unit_multiplies_all_energies(saved):
    path, config, _ = saved("natural")
    one, two = allegro.load(path, config), allegro.load(path, config, energy_unit=2.0)
    assert two.energy_scale == 2.0 * one.energy_scale
    np.testing.assert_array_equal(two.reference_energies, 2.0 * one.reference_energies)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"avg_num_neighbors": None}, "lack avg_num_neighbors"),
        ({"allegro_mlp_nonlinearity": "mish"}, "must be 'silu', received 'mish'"),
        ({"pair_potential": {"_target_": "ZBL"}}, "pair_potential must be None"),
        ({"charge_embed": True}, "charge_embed of the model are not supported"),
        ({"radial_chemical_embed": {"_target_": "Other"}}, "received 'Other'"),
        ({"type_names": ["H", "C", "N", "O", "Xx"]}, "chemical symbols, received Xx"),
        ({"num_layers": 1}, "must have 12 outputs"),
        ({"num_scalar_features": 11}, "must have 11 outputs"),
    ],
)
def test_other_models_are_refused(saved, changes, message):
    path, config, _ = saved("parity")
    with pytest.raises((ValueError, WeightsError), match=message):
        allegro.load(path, config | changes)
