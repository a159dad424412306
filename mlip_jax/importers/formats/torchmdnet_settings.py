"""Hyperparameters of TorchMD-Net's equivariant transformer: from its files and from its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.foreign_files.texts import read_yaml
from mlip_jax.importers.formats.torchmdnet_state import MODEL, StateDict
from mlip_jax.importers.formats.weights import WeightsError

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "ssp": "shifted_softplus_float32",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "mish": "mish",
}


_SUPPORTED = {
    "model": ("equivariant-transformer",),
    "output_model": ("Scalar",),
    "reduce_op": ("add", "sum"),
    "atom_filter": (-1,),
    "box_vecs": (None,),
}


REQUIRED = ("num_heads", "cutoff_lower", "cutoff_upper", "activation", "attn_activation")


def read_hparams(path: str | Path) -> dict[str, Any]:
    """Read the hyperparameters of an hparams.yaml or input.yaml.

    Raises:
      ValueError: The file is not a plain mapping.
    """
    try:
        settings = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path}: invalid or unsafe YAML ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path}: expected a table of hyperparameters, received {type(settings).__name__}"
        )
    return settings


def model_options(weights: StateDict, hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of models/equivariant_transformer.py.

    Raises:
      ValueError: A hyperparameter is missing, not supported, or in conflict with the weights.
    """
    inferred = _infer_hparams(weights)
    _check_hparams(hparams, inferred)
    lower, upper = float(hparams["cutoff_lower"]), float(hparams["cutoff_upper"])
    if inferred["embedding_dimension"] % int(hparams["num_heads"]):
        raise ValueError(
            f"hyperparameter num_heads={hparams['num_heads']} does not divide the width of "
            f"the weights, {inferred['embedding_dimension']}. Check that hyperparameters and "
            "weights belong together."
        )
    centers, widths = _radial_constants(weights, inferred["rbf_type"])
    return {
        "num_features": inferred["embedding_dimension"],
        "num_layers": inferred["num_layers"],
        "num_heads": int(hparams["num_heads"]),
        "cutoff": upper,
        "cutoff_lower": lower,
        "radial_basis": {"expnorm": "expnorm", "gauss": "gaussian"}[inferred["rbf_type"]],
        "num_radial": inferred["num_rbf"],
        "trainable_rbf": bool(hparams.get("trainable_rbf", False)),
        "radial_centers": centers,
        "radial_widths": widths,
        "activation": ACTIVATIONS[hparams["activation"]],
        "attn_activation": ACTIVATIONS[hparams["attn_activation"]],
        "distance_influence": inferred["distance_influence"],
        "neighbor_embedding": inferred["neighbor_embedding"],
        "vector_cutoff": bool(hparams.get("vector_cutoff", False)),
        "epsilon": 0.0,
        "head": "gated",
    }


def _infer_hparams(weights: StateDict) -> dict[str, Any]:
    """Infer hyperparameters from the state dict."""
    first = f"{MODEL}attention_layers.0."
    influence = (f"{first}dk_proj.weight" in weights, f"{first}dv_proj.weight" in weights)
    layers = {name.split(".")[2] for name in weights.names(re.escape(f"{MODEL}attention_layers."))}
    basis = "gauss" if f"{MODEL}distance_expansion.offset" in weights else "expnorm"
    centers = weights(f"{MODEL}distance_expansion.{'offset' if basis == 'gauss' else 'means'}")
    embedding = weights(f"{MODEL}embedding.weight")
    if embedding.ndim != 2 or not embedding.size:
        raise WeightsError(
            f"{MODEL}embedding.weight must be a table by atomic number, (elements, features), "
            f"received shape {embedding.shape}"
        )
    return {
        "embedding_dimension": embedding.shape[1],
        "num_layers": len(layers),
        "rbf_type": basis,
        "num_rbf": len(centers),
        "neighbor_embedding": f"{MODEL}neighbor_embedding.embedding.weight" in weights,
        "distance_influence": {
            (True, True): "both",
            (True, False): "keys",
            (False, True): "values",
            (False, False): "none",
        }[influence],
    }


def _check_hparams(hparams, inferred) -> None:
    """Raise ValueError if hyperparameters are missing, unsupported or contradict the weights."""
    for name, allowed in _SUPPORTED.items():
        if name in hparams and hparams[name] not in allowed:
            raise ValueError(
                f"hyperparameter {name} must be {' or '.join(map(repr, allowed))}, received "
                f"{hparams[name]!r}; other models and outputs of TorchMD-Net are not supported"
            )
    missing = [name for name in REQUIRED if name not in hparams]
    if missing:
        raise ValueError(
            f"hyperparameters that the weights do not determine are missing: {', '.join(missing)}"
        )
    for name in ("activation", "attn_activation"):
        if hparams[name] not in ACTIVATIONS:
            raise ValueError(
                f"hyperparameter {name} must be one of {', '.join(ACTIVATIONS)}, received "
                f"{hparams[name]!r}"
            )
    for name, value in inferred.items():
        if hparams.get(name, value) != value:
            raise ValueError(
                f"hyperparameter {name} is {hparams[name]!r}, but the weights belong to a "
                f"model with {value!r}. Check that hyperparameters and weights belong "
                "together."
            )


def _radial_constants(weights: StateDict, basis: str):
    """Return centers and widths of the radial basis."""
    name = f"{MODEL}distance_expansion."
    if basis == "expnorm":
        centers, widths = weights(f"{name}means"), weights(f"{name}betas")
    else:
        coefficient = weights(f"{name}coeff").astype(np.float64)
        centers, widths = weights(f"{name}offset"), np.sqrt(-0.5 / coefficient).reshape(1)
    return tuple(map(float, centers)), tuple(map(float, widths))


def priors(hparams: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, arguments) of each prior, for all forms that TorchMD-Net accepts."""
    models = hparams.get("prior_model") or []
    named = []
    for prior in models if isinstance(models, list | tuple) else [models]:
        named += (
            [(k, v or {}) for k, v in prior.items()]
            if isinstance(prior, Mapping)
            else [(prior, {})]
        )
    arguments = hparams.get("prior_args")
    if arguments is None:
        return named
    arguments = list(arguments) if isinstance(arguments, list | tuple) else [arguments]
    return [(name, values or {}) for (name, _), values in zip(named, arguments)]
