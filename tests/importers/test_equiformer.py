"""Tests for Equiformer with the weights of its authors' code.

The fixtures tests/data/parity_equiformer_*.npz are outputs of that code (commit 64cb786, e3nn
0.4.4) in float64 for acetamide and water and small models with random weights. "oc20_l1": vectors,
learned Gaussians, tags, direct forces. "md17_l2": degrees up to 2, exponential functions, attention
times the number of neighbors, gradient forces.
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
from mlip_jax.importers import equiformer
from mlip_jax.importers.formats.weights import WeightsError
from mlip_jax.potential import evaluate
from mlip_jax.structure import Structure

DATA = Path(__file__).parents[1] / "data"
KEYS = ("structures/3", "structures/4")


@pytest.fixture
def saved(tmp_path):
    """Function kind -> (path of a weights file, arguments of the model, arrays of the fixture)."""

    def save(kind, left_out=()):
        with np.load(DATA / f"parity_equiformer_{kind}.npz") as data:
            arrays = dict(data)
        state = {
            k.removeprefix("weights/"): v for k, v in arrays.items() if k.startswith("weights/")
        }
        state = {f"module.{k}": v for k, v in state.items() if k not in left_out}
        np.savez(tmp_path / "weights.npz", **state)
        return tmp_path / "weights.npz", ast.literal_eval(str(arrays["config"])), arrays

    return save


def outputs(potential, arrays, dtype, with_forces=True):
    """Return energies and forces."""
    structures = [Structure(arrays[f"{k}/numbers"], arrays[f"{k}/positions"]) for k in KEYS]
    columns = Columns.from_structures(structures)
    sizes = graph_sizes(columns, potential.cutoff)
    atoms = int(sizes.n_node.sum())
    budget = PaddingBudget(atoms + 3, int(sizes.n_edge.sum()) + 6, 4)
    batch = build_batch(columns, budget, potential.cutoff, dtype=dtype)
    if potential.model.num_tags:
        tags = np.concatenate([arrays[f"{k}/tags"] for k in KEYS] + [np.zeros(3)])
        batch = batch._replace(nodes={**batch.nodes, "tags": tags.astype(np.int32)})
    params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), potential.params)
    result = jax.jit(lambda p, g: evaluate(potential.model, p, g, 1.0, with_forces=with_forces))(
        params, batch
    )
    return np.asarray(result.energy[:2]), np.asarray(result.forces[:atoms])


@pytest.mark.parametrize(
    ("kind", "precision", "relative"),
    [
        ("oc20_l1", "float64", 1e-11),
        # seconds of compilation each
        pytest.param("oc20_l1", "float32", 1e-5, marks=pytest.mark.slow),
        pytest.param("md17_l2", "float64", 1e-11, marks=pytest.mark.slow),
    ],
)
def test_agrees_with_the_published_code(saved, kind, precision, relative):
    path, config, arrays = saved(kind)
    potential = equiformer.load(path, config)
    assert potential.conservative == (kind == "md17_l2")
    with jax.enable_x64(precision == "float64"):
        found = outputs(potential, arrays, np.dtype(precision))
    for values, what in zip(found, ("energy", "forces")):
        reference = np.concatenate([arrays[f"{k}/{what}"] for k in KEYS])
        np.testing.assert_allclose(
            values, reference, rtol=0, atol=relative * np.abs(reference).max()
        )


def test_energies_of_the_larger_model_agree(saved):
    """Detects wrong weights of degree 2, without the compilation of forces."""
    path, config, arrays = saved("md17_l2")
    with jax.enable_x64(True):
        energies, _ = outputs(
            equiformer.load(path, config), arrays, np.dtype("float64"), with_forces=False
        )
    reference = np.concatenate([np.atleast_1d(arrays[f"{k}/energy"]) for k in KEYS])
    np.testing.assert_allclose(energies, reference, rtol=1e-11)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"avg_degree": None}, "lack avg_degree"),
        ({"norm_layer": "graph"}, "must be 'layer', received 'graph'"),
        ({"irreps_feature": "24x0e+12x1o"}, "irreps_feature must be even irreps"),
        ({"irreps_pre_attn": "8x0e+8x1e"}, "must be irreps_node_embedding"),
        ({"irreps_sh": "2x0e+1x1e"}, "irreps_sh must be"),
        ({"use_gates": True}, "use_gates of the model are not supported"),
        ({"num_layers": 1}, "shape|counterpart"),
        ({"fc_neurons": [12, 13]}, "shape .*, expected"),
    ],
)
def test_other_models_are_refused(saved, changes, message):
    path, config, _ = saved("oc20_l1")
    with pytest.raises((ValueError, WeightsError), match=message):
        equiformer.load(path, config | changes)


def test_another_radial_basis_is_refused(saved):
    path, config, _ = saved("md17_l2")
    with pytest.raises(WeightsError, match="not those of a cutoff of 5.0"):
        equiformer.load(path, config | {"max_radius": 5.0})
