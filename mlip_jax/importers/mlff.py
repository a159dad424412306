"""Weights and hyperparameters of mlff v1.0: So3krates (sparse form) with the terms of SO3LR.

Units are those of the training, as given in hyperparameters.yaml; only eV and Å are supported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax import models
from mlip_jax.datasets.formats import safe_pickle
from mlip_jax.importers.formats import weights as weight_files
from mlip_jax.importers.formats.mlff_settings import (
    model_options,
    model_settings,
    read_hyperparameters,
    term_options,
)
from mlip_jax.importers.formats.mlff_weights import MlffWeights
from mlip_jax.importers.formats.weights import WeightsError, check_shapes
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.potential import Potential
from mlip_jax.terms import with_terms


def load(
    path: str | Path,
    hyperparameters: Mapping[str, Any] | str | Path,
    elements: Iterable[int],
    long_range_cutoff: float | None = None,
    dispersion_switch_width: float = 2.0,
    reference_energies: np.ndarray | None = None,
) -> Potential:
    """Load a force field from saved weights.

    Args:
      path: .npz or .safetensors file with names that contain "/", or mlff's own .pkl, a pickle of
        NumPy arrays. An unpickler that accepts nothing but arrays reads it.
      hyperparameters: Arguments of mlff's constructor, or the path of a hyperparameters.yaml.
      elements, long_range_cutoff, dispersion_switch_width, reference_energies: See `potential`.

    Raises:
      FileNotFoundError: No such file.
      ValueError: The file contains no weights, or they do not match the hyperparameters.
    """
    if not isinstance(hyperparameters, Mapping):
        hyperparameters = read_hyperparameters(hyperparameters)
    return potential(
        read(path),
        hyperparameters,
        elements,
        long_range_cutoff=long_range_cutoff,
        dispersion_switch_width=dispersion_switch_width,
        reference_energies=reference_energies,
        metadata={"source": "mlff", "file": Path(path).name},
    )


def read(path: str | Path) -> Mapping[str, Any]:
    """Read the weights of a file; for formats and errors see `load`."""
    path = Path(path)
    if path.suffix != ".pkl":
        return weight_files.read(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Give a pickle with parameters of mlff.")
    with path.open("rb") as file:
        tree = safe_pickle.load(file, allowed=safe_pickle.NUMPY, source=str(path))
    if not isinstance(tree, dict) or not isinstance(tree.get("params"), dict):
        raise WeightsError(
            f"{path}: expected a dict with the entry 'params', received {safe_pickle.short_repr(tree)}"
        )
    return tree["params"]


def potential(
    tree: Mapping[str, Any],
    hyperparameters: Mapping[str, Any],
    elements: Iterable[int],
    *,
    long_range_cutoff: float | None = None,
    dispersion_switch_width: float = 2.0,
    reference_energies: np.ndarray | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Potential:
    """Convert weights of mlff to a force field.

    Args:
      tree: Weights, see `MlffWeights`.
      hyperparameters: Arguments of mlff's constructor, or the whole content of its
        hyperparameters.yaml.
      elements: Atomic numbers that the force field was trained on.
      long_range_cutoff: Cutoff of long-range pairs (Å); None for all pairs, which requires open
        boundaries.
      dispersion_switch_width: Width of the interval before the cutoff in which dispersion goes to
        zero (Å).
      reference_energies: Reference energy of each element (eV), shape (119,); None for zeros. mlff
        subtracts the shifts of its hyperparameters before training.
      metadata: Metadata of the force field.

    Raises:
      WeightsError: Weights and hyperparameters do not match, or they use an unsupported feature.
    """
    weights, settings = MlffWeights(tree), model_settings(hyperparameters)
    model = models.create("so3krates", **model_options(settings))
    terms = term_options(settings, long_range_cutoff, dispersion_switch_width)
    model = with_terms(model, terms)
    params = model_params(weights, settings)
    if terms:
        params = {"model": params} | {name: TERM_PARAMS[name](weights) for name in terms}
    weights.check_all_used()
    params = {"params": params}
    check_shapes(model, params)
    if reference_energies is None:
        reference_energies = np.zeros(MAX_ATOMIC_NUMBER + 1)
    return Potential(
        model,
        params,
        float(model.cutoff),
        reference_energies,
        1.0,
        tuple(elements),
        dict(metadata or {}),
    )


def model_params(weights: MlffWeights, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert weights to parameters of models/so3krates.py."""
    params = {"embedding": weights.elements("feature_embeddings_0/Embed_0/embedding", None)}
    states = [name for name in ("charge", "spin") if settings.get(f"use_{name}_embed")]
    for n, name in enumerate(states, 1):
        params[f"{name}_embedding"] = _state_embedding(
            weights, f"feature_embeddings_{n}/ChargeSpinEmbedSparse_0"
        )
    for n in range(settings["num_layers"]):
        params |= _layer(weights, settings, n)
    head = {
        "hidden": weights.dense("observables_0/energy_dense_regression"),
        "final": weights.dense("observables_0/energy_dense_final"),
    }
    if settings.get("energy_learn_atomic_type_scales"):
        head["scale"] = weights.elements("observables_0/atomic_scales")
    if settings.get("energy_learn_atomic_type_shifts"):
        head["shift"] = weights.elements("observables_0/energy_offset")
    return params | {"energy": head}


def _state_embedding(weights, name):
    return {
        "queries": weights.elements(f"{name}/Embed_0/embedding", None),
        "keys": weights(f"{name}/Embed_1/embedding"),
        "values": weights(f"{name}/Embed_2/embedding"),
        "residual": {
            f"layer_{k}": weights.dense(f"{name}/Residual_0/layers_{k - 1}") for k in (1, 2)
        },
    }


def _layer(weights, settings, n):
    block, layer, radial = f"layers_{n}/attention_block", {}, {}
    for mark, branch in ((1, "features"), (2, "ev")):
        layer[f"q_{branch}"] = {"kernel": weights(f"{block}/Wq{mark}")}
        layer[f"k_{branch}"] = {"kernel": weights(f"{block}/Wk{mark}")}
        layer[f"spherical_{branch}"] = _two_layers(weights, f"{block}/spherical_filter{mark}_layer")
        radial[f"layer_{n}_radial_{branch}"] = _two_layers(
            weights, f"{block}/radial_filter{mark}_layer"
        )
    layer["v_features"] = {"kernel": weights(f"{block}/Wv1")}
    layer["exchange"] = weights.dense(f"layers_{n}/exchange_block/mlp_layer_2")
    for mark in (1, 2):
        if settings[f"layer_normalization_{mark}"]:
            name = f"layers_{n}/layer_normalization_{mark}"
            layer[f"layer_norm_{mark}"] = {
                part: weights(f"{name}/{part}") for part in ("scale", "bias")
            }
        if settings[f"residual_mlp_{mark}"]:
            layer[f"residual_mlp_{mark}"] = _two_layers(weights, f"layers_{n}/res_mlp_{mark}_layer")
    return radial | {f"layer_{n}": layer}


def _two_layers(weights, name):
    return {f"layer_{k}": weights.dense(f"{name}_{k}") for k in (1, 2)}


def zbl_params(weights: MlffWeights) -> dict[str, np.ndarray]:
    """Convert weights to parameters of terms/zbl.py.

    Both programs store softplus⁻¹ of the values.
    """

    def stored(*names):
        return np.concatenate(
            [weights.number(f"observables_0/zbl_repulsion/{name}") for name in names]
        )

    return {
        "exponents": stored("a1", "a2", "a3", "a4"),
        "coefficients": stored("c1", "c2", "c3", "c4"),
        "power": stored("p")[0],
        "inverse_length": stored("d")[0],
    }


def electrostatics_params(weights: MlffWeights) -> dict[str, Any]:
    """Convert weights to parameters of terms/electrostatics.py."""
    name = weights.ending("charge_dense_final_vec/kernel")
    return {
        "bias": weights.elements(f"{name}Embed_0/embedding", 1)[:, 0],
        "hidden": weights.dense(f"{name}charge_dense_regression_vec"),
        "final": weights.dense(f"{name}charge_dense_final_vec"),
    }


def dispersion_params(weights: MlffWeights) -> dict[str, Any]:
    """Convert weights to parameters of terms/dispersion.py."""
    name = weights.ending("hirshfeld_ratios_dense_final/kernel")
    return {
        "shift": weights.elements(f"{name}Embed_0/embedding", 1)[:, 0],
        "queries": weights.elements(f"{name}Embed_1/embedding", None),
        "hidden": weights.dense(f"{name}hirshfeld_ratios_dense_regression"),
        "final": weights.dense(f"{name}hirshfeld_ratios_dense_final"),
    }


TERM_PARAMS = {
    "zbl": zbl_params,
    "electrostatics": electrostatics_params,
    "dispersion": dispersion_params,
}
