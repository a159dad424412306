"""Tests for Uni-Mol+ with weights of the reference.

The fixture tests/data/parity_unimol_plus.npz is the output in float64 of unimol_plus (commit 90f52c4)
for a small model with random weights: each molecule with its own number of tokens, and all of them
with 20.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.bonds import bond_sizes, build_bond_batch
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.importers.formats.weights import WeightsError
from mlip_jax.importers.predictors import unimol_plus
from mlip_jax.structure import Structure

DATA = Path(__file__).parents[1] / "data/parity_unimol_plus.npz"


def load(tmp_path, num_tokens=20, **changes):
    """Return the predictor, and the content of the fixture."""
    data = dict(np.load(DATA))
    weights = {k.removeprefix("weights/"): v for k, v in data.items() if k.startswith("weights/")}
    weights = {k: v for k, v in {**weights, **changes}.items() if v is not None}
    np.savez(tmp_path / "weights.npz", **weights)
    path = tmp_path / "weights.npz"
    return unimol_plus.load(path, num_tokens=num_tokens, num_heads=4), data


def molecules(data, chosen=range(5)):
    """Return the structures, which consist of heavy atoms."""
    return Columns.from_structures(
        Structure(
            data[f"structures/{s}/numbers"],
            data[f"structures/{s}/positions_in"],
            smiles=str(data[f"structures/{s}/smiles"]),
        )
        for s in chosen
    )


def run(predictor, columns, dtype=np.float64):
    """Return the outputs (S,), and the refined positions of all atoms."""
    sizes = bond_sizes(columns.smiles)
    budget = PaddingBudget(
        int(sizes.n_node.sum()) + 3, int(sizes.n_edge.sum()) + 2, len(columns) + 2
    )
    graph = build_bond_batch(columns, budget, dtype=dtype)
    params = jax.tree.map(lambda x: np.asarray(x, dtype), predictor.params)

    @jax.jit
    def both(params, graph):
        return predictor.model.apply(params, graph), predictor.model.apply(
            params, graph, method="refine"
        )

    outputs, positions = both(params, graph)
    return outputs["gap"][: len(columns)], positions[: sizes.n_node.sum()]


@pytest.mark.usefixtures("double_precision")
def test_outputs_and_positions_agree_with_the_reference(tmp_path):
    """In one batch with other molecules and padding; the number of tokens is that of the model."""
    predictor, data = load(tmp_path)
    outputs, positions = run(predictor, molecules(data))
    np.testing.assert_allclose(outputs, data["batch/output"], rtol=1e-9)
    sizes = [len(data[f"structures/{s}/numbers"]) for s in range(5)]
    expected = np.concatenate([p[:n] for p, n in zip(data["batch/positions_out"], sizes)])
    np.testing.assert_allclose(positions, expected, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("double_precision")
def test_the_number_of_tokens_is_that_of_the_model(tmp_path):
    predictor, data = load(tmp_path, num_tokens=12)
    outputs, positions = run(predictor, molecules(data, [1]))
    np.testing.assert_allclose(outputs, data["structures/1/output"], rtol=1e-9)
    np.testing.assert_allclose(positions, data["structures/1/positions_out"], rtol=0, atol=1e-9)


@pytest.mark.slow
def test_agrees_in_single_precision(tmp_path):
    predictor, data = load(tmp_path)
    outputs, positions = run(predictor, molecules(data), np.float32)
    np.testing.assert_allclose(outputs, data["batch/output"], rtol=1e-5)
    assert np.isfinite(positions).all()


def test_larger_molecules_and_missing_weights_are_errors(tmp_path):
    predictor, data = load(tmp_path, num_tokens=8)
    with pytest.raises(ValueError, match="17 heavy atoms; this predictor reads at most 7"):
        predictor.predict(molecules(data))
    with pytest.raises(WeightsError, match="'movement_pred_head.force_proj2.bias' is missing"):
        load(tmp_path, **{"movement_pred_head.force_proj2.bias": None})
