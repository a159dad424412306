"""GIN-virtual of OGB-LSC (PCQM4Mv2), from saved weights.

The reference limits its predictions to the interval from 0 to 20 in evaluation. Predictions of the
imported model are not limited.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax import models
from mlip_jax.datasets.property_data import Target
from mlip_jax.datasets.smiles.bond_graph import ATOM_SIZES, BOND_SIZES
from mlip_jax.importers.formats import state_files
from mlip_jax.importers.formats.torch_weights import TorchWeights
from mlip_jax.importers.formats.weights import WeightsError, check_shapes
from mlip_jax.models.layers.batch_norm import STATISTICS
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.models.layers.readouts import BACKBONE, with_heads
from mlip_jax.predictor import Predictor

MODEL = "gin_virtual"


def load(
    path: str | Path,
    *,
    targets: tuple[str, ...] = ("gap",),
    pooling: str = "sum",
    residual: bool = False,
    sum_layers: bool = False,
) -> Predictor:
    """Load a predictor from a file with the state dict of a GIN with a virtual node.

    Args:
      path: File with the state dict, see importers/formats/state_files.py.
      targets: Names of the outputs.
      pooling: Pooling of the training, "sum" or "mean".
      residual: Whether the training used residual connections.
      sum_layers: Whether the output is the sum of all layers (JK="sum"), not the last one.

    Raises:
      FileNotFoundError, WeightsError: See `state_files.read`; weights are missing, have an
        unexpected shape, or have no counterpart.
    """
    try:
        return _convert(state_files.read(path), targets, pooling, residual, sum_layers, path)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def _convert(weights: Mapping[str, np.ndarray], targets, pooling, residual, sum_layers, path):
    state = TorchWeights(weights, "gnn_node.virtualnode_embedding.weight", "GIN-virtual of OGB")
    params, statistics = _backbone(state)
    kernel = state.take("graph_pred_linear.weight", len(targets), None)
    bias = state.take("graph_pred_linear.bias", len(targets))
    state.drop(r".*\.num_batches_tracked")
    state.check_all_taken()
    # The bias is added once per molecule, not per atom: it is the shift of the target.
    heads = {name: {"kind": "scalar", "pooling": pooling, "width": 0} for name in targets}
    variables: dict[str, Any] = {"params": {BACKBONE: params}, STATISTICS: {BACKBONE: statistics}}
    for name, row in zip(targets, kernel):
        final = {"kernel": row[:, None], "bias": np.zeros(1, row.dtype)}
        variables["params"][f"head_{name}"] = {"final": final}
    options = {
        "num_features": kernel.shape[1],
        "num_layers": state.count("gnn_node.convs"),
        "residual": residual,
        "sum_layers": sum_layers,
    }
    model = with_heads(models.create(MODEL, **options), heads)
    check_shapes(model, variables)
    return Predictor(
        model,
        variables,
        tuple(
            Target(name, "scalar", pooling, shift=float(shift))
            for name, shift in zip(targets, bias)
        ),
        0.0,
        tuple(range(1, MAX_ATOMIC_NUMBER + 1)),
        {"source": "GIN-virtual of OGB", "file": Path(path).name},
    )


def _backbone(state: TorchWeights) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return parameters and statistics of the network."""
    params: dict[str, Any] = {
        "virtual": state.take("gnn_node.virtualnode_embedding.weight", 1, None)
    }
    statistics: dict[str, Any] = {}

    def embedding(ours, theirs, sizes):
        for k, size in enumerate(sizes):
            params[f"{ours}_{k}"] = state.take(f"{theirs}.{k}.weight", size, None)

    def norm(ours, theirs):
        params[ours] = state.norm(theirs)
        statistics[ours] = {
            "mean": state.take(f"{theirs}.running_mean", None),
            "variance": state.take(f"{theirs}.running_var", None),
        }

    embedding("atom", "gnn_node.atom_encoder.atom_embedding_list", ATOM_SIZES)
    for n in range(state.count("gnn_node.convs")):
        conv = f"gnn_node.convs.{n}"
        embedding(f"bond_{n}", f"{conv}.bond_encoder.bond_embedding_list", BOND_SIZES)
        params[f"epsilon_{n}"] = state.take(f"{conv}.eps", 1)[0]
        params[f"layer_1_{n}"] = state.dense(f"{conv}.mlp.0")
        params[f"layer_2_{n}"] = state.dense(f"{conv}.mlp.3")
        norm(f"layer_norm_{n}", f"{conv}.mlp.1")
        norm(f"norm_{n}", f"gnn_node.batch_norms.{n}")
    for n in range(state.count("gnn_node.mlp_virtualnode_list")):
        block = f"gnn_node.mlp_virtualnode_list.{n}"
        for k, (layer, normalization) in enumerate(((0, 1), (3, 4)), 1):
            params[f"virtual_{k}_{n}"] = state.dense(f"{block}.{layer}")
            norm(f"virtual_norm_{k}_{n}", f"{block}.{normalization}")
    return params, statistics
