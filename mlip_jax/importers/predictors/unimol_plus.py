"""Uni-Mol+ (PCQM4Mv2), from saved weights.

The state dict determines the widths and the depth. It does not contain the number of heads, of
iterations and of tokens. The outputs of the reference are averages over up to 8 RDKit geometries:
`mlip_jax.predict` has the option `num_conformers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax import models
from mlip_jax.datasets.property_data import Target
from mlip_jax.importers.formats import state_files
from mlip_jax.importers.formats.torch_weights import TorchWeights
from mlip_jax.importers.formats.weights import WeightsError, check_shapes
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.models.layers.readouts import BACKBONE, with_heads
from mlip_jax.predictor import Predictor

MODEL = "unimol_plus"
_ENCODER = "molecule_encoder"


def load(
    path: str | Path,
    *,
    target: str = "gap",
    num_tokens: int,
    num_heads: int = 48,
    num_iterations: int = 2,
) -> Predictor:
    """Load a predictor from a file with the state dict of a Uni-Mol+.

    Args:
      path: File with the state dict, see importers/formats/state_files.py.
      target: Name of the output.
      num_tokens: Number of tokens, which the result depends on. The reference uses the number of
        heavy atoms of the largest molecule of a batch plus 4, rounded down to a multiple of 4.
      num_heads: Number of attention heads.
      num_iterations: Number of times that the geometry is refined.

    Raises:
      FileNotFoundError, WeightsError: See `state_files.read`; weights are missing, have an
        unexpected shape, or have no counterpart.
    """
    try:
        return _convert(state_files.read(path), target, num_tokens, num_heads, num_iterations, path)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def _convert(weights: Mapping[str, np.ndarray], target, num_tokens, num_heads, iterations, path):
    state = TorchWeights(weights, "atom_feature.vnode_encoder.weight", "Uni-Mol+")
    params = _network(state)
    final = state.dense("energy_head.linear_out")
    state.check_all_taken()
    first = params["layer_0"]
    options = {
        "num_features": params["atom"].shape[1],
        "pair_features": params["bond"].shape[1],
        "pair_width": first["outer_in"]["kernel"].shape[1] // 2,
        "num_layers": sum(name.startswith("layer_") for name in params),
        "num_heads": num_heads,
        "hidden_width": first["feed_forward"]["layer_1"]["kernel"].shape[1],
        "num_radial": len(params["distances"]["mean"]),
        "num_iterations": iterations,
        "num_tokens": num_tokens,
    }
    heads = {target: {"kind": "scalar", "pooling": "mean", "width": 0}}
    model = with_heads(models.create(MODEL, **options), heads)
    variables = {"params": {BACKBONE: params, f"head_{target}": {"final": final}}}
    check_shapes(model, variables)
    elements = tuple(range(1, MAX_ATOMIC_NUMBER + 1))
    metadata = {"source": "Uni-Mol+", "file": Path(path).name}
    return Predictor(model, variables, (Target(target, "scalar"),), 0.0, elements, metadata)


def _network(state: TorchWeights) -> dict[str, Any]:
    """Return the parameters of the network."""
    kernel = "se3_invariant_kernel"
    params: dict[str, Any] = {
        "atom": state.take("atom_feature.atom_encoder.weight", 512, None),
        "degree": state.take("atom_feature.degree_encoder.weight", 128, None),
        "virtual_atom": state.take("atom_feature.vnode_encoder.weight", 1, None),
        "bond": state.take("edge_feature.edge_encoder.weight", 64, None),
        "path": state.take("edge_feature.shorest_path_encoder.weight", 512, None),
        "virtual_pair": state.take("edge_feature.vnode_virtual_distance.weight", 1, None),
        "slope": state.take(f"{kernel}.gaussian.mul.weight", 512, 1),
        "offset": state.take(f"{kernel}.gaussian.bias.weight", 512, 1),
        "distances": {
            "mean": state.take(f"{kernel}.gaussian.mean", None),
            "deviation": state.take(f"{kernel}.gaussian.std"),
            "layer_1": state.dense(f"{kernel}.out_proj.layer1"),
            "layer_2": state.dense(f"{kernel}.out_proj.layer2"),
        },
        "token_norm": state.norm(f"{_ENCODER}.layer_norm"),
        "pair_norm": state.norm(f"{_ENCODER}.pair_layer_norm"),
        "head": state.dense("energy_head.linear_in"),
        "head_norm": state.norm("energy_head.layer_norm"),
        "movement": _movement(state),
    }
    for n in range(state.count(f"{_ENCODER}.layers")):
        params[f"layer_{n}"] = _layer(state, f"{_ENCODER}.layers.{n}")
    return params


def _movement(state: TorchWeights) -> dict[str, Any]:
    head = "movement_pred_head"
    params: dict[str, Any] = {
        "norm": state.norm(f"{head}.layer_norm"),
        "attention": {
            "query": state.dense(f"{head}.q_proj", use_bias=False),
            "key": state.dense(f"{head}.k_proj", use_bias=False),
            "value": state.dense(f"{head}.v_proj", use_bias=False),
            "bias": state.dense(f"{head}.linear_bias"),
        },
    }
    for k in range(3):
        params[f"axis_{k}"] = state.dense(f"{head}.force_proj{k + 1}")
    return params


def _layer(state: TorchWeights, layer: str) -> dict[str, Any]:
    """Return the parameters of a layer of the transformer."""
    attention, triangle = f"{layer}.self_attn", f"{layer}.pair_tri_mul"

    def feed_forward(name):
        return {f"layer_{k}": state.dense(f"{layer}.{name}.linear_{k}") for k in (1, 2)}

    return {
        "attention": {
            "query": state.dense(f"{attention}.linear_q", use_bias=False),
            "key": state.dense(f"{attention}.linear_k", use_bias=False),
            "value": state.dense(f"{attention}.linear_v", use_bias=False),
            "bias": state.dense(f"{attention}.linear_bias"),
        },
        "attention_out": state.dense(f"{attention}.linear_o"),
        "attention_norm": state.norm(f"{layer}.self_attn_layer_norm"),
        "feed_forward": feed_forward("ffn"),
        "norm": state.norm(f"{layer}.final_layer_norm"),
        "outer_in": state.dense(f"{layer}.opm.linear_in"),
        "outer_out": state.dense(f"{layer}.opm.linear_out"),
        "outer_norm": state.norm(f"{layer}.pair_layer_norm_opm"),
        "triangle": {
            "product": state.dense(f"{triangle}.linear_ab_p"),
            "gate": state.dense(f"{triangle}.linear_ab_g"),
            "scale": state.dense(f"{triangle}.linear_g"),
            "out": state.dense(f"{triangle}.linear_z"),
            "norm": state.norm(f"{triangle}.layer_norm_out"),
        },
        "triangle_norm": state.norm(f"{layer}.pair_layer_norm_trimul"),
        "pair_feed_forward": feed_forward("pair_ffn"),
        "pair_norm": state.norm(f"{layer}.pair_layer_norm_ffn"),
    }
