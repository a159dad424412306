"""SO3LR in the form of so3krates-torch: its .model file, with names and layouts of mlff."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlip_jax.importers.formats.torch_records import Record, kind_of, modules_of, plain, state_dict
from mlip_jax.importers.formats.weights import WeightsError

_STATE_PARTS = {
    "Embed_0/embedding": "Wq.weight",
    "Embed_1/embedding": "Wk",
    "Embed_2/embedding": "Wv",
    "Residual_0/layers_0/kernel": "mlp.1.weight",
    "Residual_0/layers_1/kernel": "mlp.3.weight",
}
_ATTENTION = {
    "Wq1": "W_q_inv",
    "Wk1": "W_k_inv",
    "Wv1": "W_v_inv",
    "Wq2": "W_q_ev",
    "Wk2": "W_k_ev",
}
_FILTERS = {
    "radial_filter1": "filter_net_inv.mlp_rbf",
    "radial_filter2": "filter_net_ev.mlp_rbf",
    "spherical_filter1": "filter_net_inv.mlp_ev",
    "spherical_filter2": "filter_net_ev.mlp_ev",
}
_HEADS = {
    "observables_0/energy_dense_regression": "atomic_energy_output_block.layers.0",
    "observables_0/energy_dense_final": "atomic_energy_output_block.final_layer",
    "charges/charge_dense_regression_vec": "partial_charges_output_block.transform_inv_features.0",
    "charges/charge_dense_final_vec": "partial_charges_output_block.transform_inv_features.2",
    "ratios/hirshfeld_ratios_dense_regression": "hirshfeld_output_block.transform_features.0",
    "ratios/hirshfeld_ratios_dense_final": "hirshfeld_output_block.transform_features.2",
}
_TABLES = {
    "charges/Embed_0/embedding": "partial_charges_output_block.atomic_embedding.weight",
    "ratios/Embed_0/embedding": "hirshfeld_output_block.v_shift_embedding.weight",
    "ratios/Embed_1/embedding": "hirshfeld_output_block.q_embedding.weight",
}
_ZBL = ("a1", "a2", "a3", "a4", "c1", "c2", "c3", "c4", "p", "d")
# constants of the model, which its options determine, and second names of the filters
_UNUSED = (
    "radial_basis_fn.",
    "degree_repeats",
    "so3_conv_invariants.",
    "attention_block.filter_net_",
)


def is_so3lr(content: Any) -> bool:
    """Return whether the content of a file is a pickled SO3LR of so3krates-torch."""
    return kind_of(content).startswith("so3krates_torch.")


def read_model(model: Any, hyperparameters: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the weights of a pickled SO3LR by their names in mlff.

    Args:
      model: Content of the file.
      hyperparameters: Expected options.

    Raises:
      WeightsError: The model is not SO3LR, or has other options.
    """
    if not isinstance(model, Record) or model.name != "SO3LR":
        raise WeightsError(
            f"expected the class SO3LR of so3krates-torch, received {kind_of(model) or type(model)}"
        )
    _check_options(model, hyperparameters)
    left = {k: v for k, v in state_dict(model).items() if not any(part in k for part in _UNUSED)}
    arrays = {}

    def take(target: str, source: str, convert=lambda array: array):
        if source not in left:
            raise WeightsError(f"the model has no {source!r}; it is not SO3LR, or incomplete")
        arrays[target] = convert(left.pop(source))

    take("feature_embeddings_0/Embed_0/embedding", "inv_feature_embedding.embedding.weight", _table)
    for n, state in enumerate(("charge", "spin"), 1):
        for target, source in _STATE_PARTS.items():
            convert = _table if source == "Wq.weight" else np.transpose
            convert = convert if source.endswith("weight") else np.asarray
            prefix = f"feature_embeddings_{n}/ChargeSpinEmbedSparse_0/"
            take(prefix + target, f"{state}_embedding.{source}", convert)
    for n in range(hyperparameters["num_layers"]):
        _take_layer(take, n)
    for target, source in _HEADS.items():
        take(f"{target}/kernel", f"{source}.weight", np.transpose)
        take(f"{target}/bias", f"{source}.bias")
    for target, source in _TABLES.items():
        take(target, source)
    block = "atomic_energy_output_block."
    take("observables_0/energy_offset", f"{block}energy_shifts", _row)
    take("observables_0/atomic_scales", f"{block}energy_scales.weight", _row)
    for name in _ZBL:
        take(f"observables_0/zbl_repulsion/{name}", f"zbl_repulsion.{name}_raw")
    if left:
        raise WeightsError(f"arrays without a counterpart in SO3LR: {', '.join(sorted(left)[:8])}")
    return arrays


def _take_layer(take, n: int) -> None:
    """Take the weights of a layer."""
    source, target = f"euclidean_transformers.{n}.", f"layers_{n}/"
    for name, filters in _FILTERS.items():
        last = f"{filters}.{filters.rpartition('.')[2]}_layer_1.0"
        for k, layer in ((1, f"{filters}.0"), (2, last)):
            prefix = f"{target}attention_block/{name}_layer_{k}/"
            take(f"{prefix}kernel", f"{source}{layer}.weight", np.transpose)
            take(f"{prefix}bias", f"{source}{layer}.bias")
    for name, weights in _ATTENTION.items():
        block = f"{source}euclidean_attention_block.{weights}"
        take(f"{target}attention_block/{name}", block, lambda array: array.transpose(0, 2, 1))
    exchange = f"{source}interaction_block.linear_layer."
    take(f"{target}exchange_block/mlp_layer_2/kernel", f"{exchange}weight", np.transpose)
    take(f"{target}exchange_block/mlp_layer_2/bias", f"{exchange}bias")
    for k in (1, 2):
        for part, stored in (("scale", "weight"), ("bias", "bias")):
            norm = f"{target}layer_normalization_{k}/{part}"
            take(norm, f"{source}layer_norm_inv_{k}.{stored}")
        layer = f"{source}mlp_1.{2 * k - 1}."
        take(f"{target}res_mlp_1_layer_{k}/kernel", f"{layer}weight", np.transpose)
        take(f"{target}res_mlp_1_layer_{k}/bias", f"{layer}bias")


def _table(array: np.ndarray) -> np.ndarray:
    """Return a table by atomic number from a matrix (features, elements from 1 on)."""
    return np.concatenate([np.zeros((1, len(array)), array.dtype), array.T])


def _row(array: np.ndarray) -> np.ndarray:
    """Return a row by atomic number from values for the elements from 1 on."""
    return np.concatenate([np.zeros(1, array.dtype), array.reshape(-1)])


def _check_options(model: Record, expected: Mapping[str, Any]) -> None:
    """Raise WeightsError if an option of the model differs from the expected one."""
    received: dict[str, Any] = {}
    for _, module in modules_of(model):
        if module.name == "EuclideanAttentionBlock":
            for name in ("degrees", "num_heads", "num_features", "avg_num_neighbors"):
                received[name] = plain(module.get(name))
        elif module.name == "BernsteinBasis":
            received |= {"num_radial_basis_fn": module.get("n_rbf"), "cutoff": module.get("r_cut")}
    for name in ("electrostatic_energy_scale", "dispersion_energy_scale", "use_charge_embed"):
        received[name] = plain(model.get(name))
    for name, value in received.items():
        if isinstance(value, list):
            value = tuple(value)
        if isinstance(value, np.ndarray):
            value = float(value)
        if value is not None and value != expected[name]:
            raise WeightsError(f"option {name} must be {expected[name]!r}, received {value!r}")
