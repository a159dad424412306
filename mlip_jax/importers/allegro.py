"""Allegro (checked against nequip-allegro 0.8.3): state dict and the arguments of its model builder.

Lengths are in Å. The unit of energies is not stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax import models
from mlip_jax.importers.formats import weights as weight_files
from mlip_jax.importers.formats.recorded import RecordedWeights, numbers_of, table_of
from mlip_jax.importers.formats.weights import check_shapes
from mlip_jax.potential import Potential

_REQUIRED = ("type_names", "r_max", "l_max", "avg_num_neighbors", "radial_chemical_embed")
_READ = {*_REQUIRED, "parity", "num_layers", "num_scalar_features", "num_tensor_features"}
_READ |= {"tp_path_channel_coupling"}
# arguments that only affect training, or whose effect the weights show
_IGNORED = {
    "cls",
    "_target_",
    "seed",
    "model_dtype",
    "compile_mode",
    "do_derivatives",
    "per_type_energy_scales",
    "per_type_energy_shifts",
    "per_type_energy_scales_trainable",
    "per_type_energy_shifts_trainable",
    "per_edge_type_cutoff",
    "radial_chemical_embed_dim",
    "scalar_embed_mlp_hidden_layers_depth",
    "scalar_embed_mlp_hidden_layers_width",
    "allegro_mlp_hidden_layers_depth",
    "allegro_mlp_hidden_layers_width",
    "readout_mlp_hidden_layers_depth",
    "readout_mlp_hidden_layers_width",
}
_ALLOWED = {
    "scalar_embed_mlp_nonlinearity": ("silu",),
    "allegro_mlp_nonlinearity": ("silu",),
    "readout_mlp_nonlinearity": ("silu", None),
    "pair_potential": (None,),
}
_EMBED = "radial_chemical_embed"


def load(
    path: str | Path, config: Mapping[str, Any] | str | Path, energy_unit: float = 1.0
) -> Potential:
    """Load a force field from saved weights.

    Args:
      path: .npz or .safetensors file with the state dict of the model.
      config: Arguments of nequip-allegro's `AllegroModel`, or the path of a YAML file with them.
      energy_unit: Energy per unit of the network's energies (eV).

    Raises:
      FileNotFoundError: No such file.
      ValueError: The weights are not those of Allegro, or they do not match the arguments.
    """
    path = Path(path)
    if not isinstance(config, Mapping):
        config = weight_files.read_yaml(config)
    return potential(weight_files.read(path), config, energy_unit, {"file": path.name})


def potential(
    state: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    energy_unit: float = 1.0,
    metadata: Mapping[str, Any] | None = None,
) -> Potential:
    """Convert a state dict to a force field; for arguments and errors see `load`."""
    weights = RecordedWeights(state, "Allegro", "allegro.tps.0.weights")
    options = model_options(weights, config)
    params, elements = model_params(weights, options), options["elements"]
    shifts = table_of(elements, weights("per_type_energy_scale_shift.shifts"))
    weights.check_all_taken()
    model = models.create("allegro", **options)
    check_shapes(model, {"params": params})
    elements = tuple(sorted(elements))
    metadata = {"source": "Allegro", "statistics": {"elements": list(elements)}} | dict(
        metadata or {}
    )
    return Potential(
        model,
        {"params": params},
        options["cutoff"],
        shifts * energy_unit,
        energy_unit,
        elements,
        metadata,
    )


def model_options(weights: RecordedWeights, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of models/allegro.py.

    Raises:
      ValueError: An argument is missing or not supported, or conflicts with the weights.
    """
    _check_arguments(config)
    reciprocal = weights("edge_norm._rmax_recip").astype(np.float64).reshape(-1)
    average = config["avg_num_neighbors"]
    if isinstance(average, Mapping):
        average = tuple(float(average[name]) for name in config["type_names"])
    return _embedding_options(weights, config[_EMBED]) | {
        "num_features": int(config.get("num_scalar_features", 64)),
        "num_tensor_features": int(config.get("num_tensor_features", 16)),
        "num_layers": int(config.get("num_layers", 2)),
        "max_degree": int(config["l_max"]),
        "parity": "full" if config.get("parity", True) else "natural",
        "cutoff": float(config["r_max"]),
        "pair_cutoffs": None if reciprocal.size == 1 else tuple((1 / reciprocal).tolist()),
        "elements": numbers_of(config["type_names"]),
        "avg_num_neighbors": average if isinstance(average, tuple) else float(average),
        "embedding_widths": _widths(weights, "scalar_embed_mlp.mlp_module"),
        "latent_widths": _widths(weights, "allegro.latents.0"),
        "energy_widths": _widths(weights, "edge_readout.mlp_module"),
        "path_channel_coupling": bool(config.get("tp_path_channel_coupling", True)),
        "learned_scale": True,
        "learned_shift": False,
    }


def _check_arguments(config) -> None:
    """Raise ValueError if an argument is missing or not supported."""
    missing = [name for name in _REQUIRED if config.get(name) is None]
    if missing:
        raise ValueError(
            f"the arguments of the model lack {', '.join(missing)}, which the weights do not show"
        )
    for name, allowed in _ALLOWED.items():
        if name in config and config[name] not in allowed:
            raise ValueError(
                f"argument {name} must be {' or '.join(map(repr, allowed))}, received {config[name]!r}"
            )
    unknown = sorted(set(config) - _IGNORED - set(_ALLOWED) - _READ)
    if unknown:
        raise ValueError(f"arguments {', '.join(unknown)} of the model are not supported")


def _embedding_options(weights: RecordedWeights, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the first scalars of the edges."""
    target = str(config.get("_target_")).rpartition(".")[2]
    if target == "TwoBodySplineScalarEmbed":
        num, span = int(config["num_splines"]), int(config["spline_span"])
        return {"embedding": "spline", "num_splines": num, "spline_span": span}
    if target != "TwoBodyBesselScalarEmbed":
        raise ValueError(
            f"{_EMBED} must be TwoBodyBesselScalarEmbed or TwoBodySplineScalarEmbed, received "
            f"{config.get('_target_')!r}"
        )
    roots = weights(f"{_EMBED}.bessel_encode.bessel_weights").reshape(-1)
    return {
        "embedding": "bessel",
        "embedding_width": 2 * weights(f"{_EMBED}.type_embed.center_embed.weight").shape[1],
        "num_radial": roots.size,
        "radial_roots": tuple(roots.tolist()),
        "cutoff_power": int(config.get("polynomial_cutoff_p", 6)),
    }


def _kernels(weights: RecordedWeights, name: str) -> list[np.ndarray]:
    """Return the kernels of a network of scalars."""
    return weights.series(rf"{re.escape(name)}\.mlp\.(\d+)\.weight")


def _widths(weights: RecordedWeights, name: str) -> tuple[int, ...]:
    """Return the widths of the hidden layers of a network."""
    return tuple(kernel.shape[1] for kernel in _kernels(weights, name)[:-1])


def model_params(weights: RecordedWeights, options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert weights to parameters of models/allegro.py."""
    width, channels = options["num_features"], options["num_tensor_features"]
    num_degrees = options["max_degree"] + 1

    def network(name, kept, has_weights):
        """Convert a network whose outputs are `kept` scalars, then weights of the harmonics."""
        kernels = _kernels(weights, name)
        columns = np.arange(kept)
        if has_weights:  # by channel and degree, here by degree and channel
            order = np.arange(channels * num_degrees).reshape(channels, num_degrees).T
            columns = np.r_[columns, kept + order.reshape(-1)]
        kernels[-1] = kernels[-1][:, columns]
        return {f"kernel_{n}": kernel for n, kernel in enumerate(kernels)}

    params = _embedding_params(weights, options) | {
        "embedding": network("scalar_embed_mlp.mlp_module", width, False),
        "tensors": network("tensor_embed.env_embed_linear", 0, True),
        "environments": network("allegro.first_layer_env_embed_projection", width, True),
        "readout": network("edge_readout.mlp_module", 1, False),
        "scale": table_of(options["elements"], weights("per_type_energy_scale_shift.scales")),
    }
    for n in range(options["num_layers"]):
        has_weights = n < options["num_layers"] - 1
        params[f"latent_{n}"] = network(f"allegro.latents.{n}", width, has_weights)
        paths = weights(f"allegro.tps.{n}.weights")
        rows = channels if options["path_channel_coupling"] else 1
        params[f"paths_{n}"] = paths.reshape(rows, -1).T
    return params


def _embedding_params(weights: RecordedWeights, options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the weights of the first scalars of the edges."""
    if options["embedding"] == "spline":
        weights.drop(rf"{_EMBED}\.spline\.(lower|upper)")  # ends of the splines, known from options
        shape = (len(options["elements"]) ** 2, options["num_features"], options["num_splines"])
        table = weights(f"{_EMBED}.spline.class_embed.weight", int(np.prod(shape)))
        return {"splines": table.reshape(shape).transpose(2, 0, 1)}
    (kernel,) = _kernels(weights, f"{_EMBED}.type_embed.basis_linear")
    half = options["embedding_width"] // 2
    return {
        "center": weights(f"{_EMBED}.type_embed.center_embed.weight"),
        "neighbor": weights(f"{_EMBED}.type_embed.neighbor_embed.weight"),
        "center_radial": kernel[:, :half],
        "neighbor_radial": kernel[:, half:],
    }
