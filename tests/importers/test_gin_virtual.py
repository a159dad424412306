"""Tests for GIN-virtual with weights of OGB-LSC.

The fixtures tests/data/parity_ogb_gin_virtual*.npz are outputs in float64 of the example of OGB-LSC
for PCQM4Mv2 (commit 61e9784) for small models with random weights and statistics. "train" is the
output of the batch of all molecules in training mode, and the statistics after it.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from mlip_jax.datasets.smiles.bond_graph import bond_graph
from mlip_jax.importers.formats.weights import WeightsError
from mlip_jax.importers.predictors import gin_virtual
from mlip_jax.models.layers.batch_norm import MOMENTUM, STATISTICS
from tests.models.test_bond_graphs import batch

DATA = Path(__file__).parents[1] / "data"
OPTIONS = {
    "ogb_gin_virtual": {},
    "ogb_gin_virtual_residual_sum": {
        "targets": ("gap", "homo"),
        "pooling": "mean",
        "residual": True,
        "sum_layers": True,
    },
}


def load(tmp_path, name, **changes):
    """Return the predictor, and the content of the fixture."""
    data = dict(np.load(DATA / f"parity_{name}.npz"))
    weights = {k.removeprefix("weights/"): v for k, v in data.items() if k.startswith("weights/")}
    weights = {k: v for k, v in {**weights, **changes}.items() if v is not None}
    np.savez(tmp_path / "weights.npz", **weights)
    return gin_virtual.load(tmp_path / "weights.npz", **OPTIONS[name]), data


def values(data, key, count=7):
    return [data[f"structures/{s}/{key}"] for s in range(count)]


def test_features_are_those_of_the_reference():
    """Also the order of the atoms. Edges of the reference have another order."""
    data = np.load(DATA / "parity_ogb_gin_virtual.npz")
    for smiles, atoms, edges, bonds in zip(
        *(values(data, key) for key in ("smiles", "node_feat", "edge_index", "edge_feat"))
    ):
        graph = bond_graph(str(smiles))
        np.testing.assert_array_equal(graph.atoms, atoms)
        ours = np.column_stack([graph.receivers, graph.senders, graph.bonds])
        theirs = np.column_stack([edges[1], edges[0], bonds]).astype(int)
        np.testing.assert_array_equal(ours, sorted(theirs.tolist()) if len(theirs) else ours)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_agree_with_the_reference(tmp_path, name):
    """In evaluation and in training, with the statistics after a step."""
    predictor, data = load(tmp_path, name)
    smiles, expected = list(map(str, values(data, "smiles"))), np.stack(values(data, "output"))
    shifts = np.array([t.shift for t in predictor.targets])
    names = [t.name for t in predictor.targets]

    @jax.jit
    def run(params, graph):
        trained = predictor.model.apply(params, graph, mutable=[STATISTICS])
        return predictor.model.apply(params, graph), *trained

    graph = batch(smiles)
    evaluated, trained, variables = run(predictor.params, graph)
    for outputs, reference in ((evaluated, expected), (trained, data["train/output"])):
        actual = np.stack([outputs[n][:7] for n in names], axis=1) + shifts
        np.testing.assert_allclose(
            actual, reference, rtol=1e-9, atol=1e-9 * np.abs(reference).max()
        )
    old, new = predictor.params[STATISTICS]["backbone"], variables[STATISTICS]["backbone"]
    for ours, theirs in (
        ("norm_0", "batch_norms.0"),
        ("virtual_norm_1_0", "mlp_virtualnode_list.0.1"),
    ):
        for kind, suffix in (("mean", "running_mean"), ("variance", "running_var")):
            after = (1 - MOMENTUM) * old[ours][kind] + MOMENTUM * new[ours][kind]
            reference = data[f"train/after/gnn_node.{theirs}.{suffix}"]
            np.testing.assert_allclose(after, reference, rtol=1e-9)


def test_predictions_of_smiles_in_single_precision(tmp_path):
    """Through the function that users call: nothing is embedded."""
    predictor, data = load(tmp_path, "ogb_gin_virtual_residual_sum")
    smiles, expected = list(map(str, values(data, "smiles"))), np.stack(values(data, "output"))
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), predictor.params)
    predicted = dataclasses.replace(predictor, params=params).predict(smiles)
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(predicted["gap"], expected[:, 0], rtol=0, atol=atol)
    np.testing.assert_allclose(predicted["homo"], expected[:, 1], rtol=0, atol=atol)


def test_weights_without_counterpart_are_listed(tmp_path):
    name = "ogb_gin_virtual_residual_sum"
    with pytest.raises(WeightsError, match="1 weights have no counterpart.*convs.0.surplus"):
        load(tmp_path, name, **{"gnn_node.convs.0.surplus": np.zeros(3)})
    with pytest.raises(WeightsError, match="'gnn_node.convs.0.eps' is missing"):
        load(tmp_path, name, **{"gnn_node.convs.0.eps": None})
