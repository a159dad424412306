"""Allegro (checked against nequip-allegro 0.8.3): state dict and the arguments of its model builder.

Lengths are in Å. The unit of energies is not stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from mlip_jax import models
from mlip_jax.importers.formats import state_files
from mlip_jax.importers.formats.recorded import table_of
from mlip_jax.importers.formats.torch_weights import TorchWeights
from mlip_jax.importers.formats.weights import check_arguments, check_shapes, read_arguments
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
      path: .npz, .safetensors or .pt file with the state dict of the model.
      config: Arguments of nequip-allegro's `AllegroModel`, or the path of a YAML file with them.
      energy_unit: Energy per unit of the network's energies (eV).

    Raises:
      FileNotFoundError: No such file.
      ValueError: The weights are not those of Allegro, or they do not match the arguments.
    """
    path = Path(path)
    return potential(state_files.read(path), config, energy_unit, {"file": path.name})


def potential(
    state: Mapping[str, np.ndarray],
    config: Mapping[str, Any] | str | Path,
    energy_unit: float = 1.0,
    metadata: Mapping[str, Any] | None = None,
) -> Potential:
    """Convert a state dict to a force field; for arguments and errors see `load`."""
    config = read_arguments(config)
    check_arguments(config, _REQUIRED, _ALLOWED, _IGNORED | _READ)
    weights = TorchWeights(state, "allegro.tps.0.weights", "Allegro")
    options = _size_options(config) | _neighbor_options(weights, config)
    first, more = _first_scalars(weights, config[_EMBED], len(options["elements"]), options)
    params, elements = first | _networks(weights, options | more), options["elements"]
    params["scale"] = table_of(elements, weights.take("per_type_energy_scale_shift.scales"))
    shifts = table_of(elements, weights.take("per_type_energy_scale_shift.shifts"))
    weights.check_all_taken()
    networks = {
        "embedding_widths": "embedding",
        "latent_widths": "latent_0",
        "energy_widths": "readout",
    }
    for option, name in networks.items():
        options[option] = tuple(kernel.shape[1] for kernel in params[name].values())[:-1]
    model = models.create("allegro", **options, **more)
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


def _size_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are arguments of the model."""
    return {
        "num_features": int(config.get("num_scalar_features", 64)),
        "num_tensor_features": int(config.get("num_tensor_features", 16)),
        "num_layers": int(config.get("num_layers", 2)),
        "max_degree": int(config["l_max"]),
        "parity": "full" if config.get("parity", True) else "natural",
        "cutoff": float(config["r_max"]),
        "path_channel_coupling": bool(config.get("tp_path_channel_coupling", True)),
        "learned_scale": True,
        "learned_shift": False,
    }


def _neighbor_options(weights: TorchWeights, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return elements, cutoffs of pairs of elements and average numbers of neighbors."""
    names = config["type_names"]
    unknown = [name for name in names if name not in atomic_numbers]
    if unknown:
        raise ValueError(f"type_names must be chemical symbols, received {', '.join(unknown)}")
    reciprocal = weights.take("edge_norm._rmax_recip").astype(np.float64).reshape(-1)
    average = config["avg_num_neighbors"]
    if isinstance(average, Mapping):
        average = tuple(float(average[name]) for name in names)
    return {
        "elements": tuple(atomic_numbers[name] for name in names),
        "pair_cutoffs": None if reciprocal.size == 1 else tuple((1 / reciprocal).tolist()),
        "avg_num_neighbors": average if isinstance(average, tuple) else float(average),
    }


def _first_scalars(weights: TorchWeights, config: Mapping[str, Any], num_types: int, options):
    """Return the parameters and the options of the first scalars of the edges."""
    target = str(config.get("_target_")).rpartition(".")[2]
    if target == "TwoBodySplineScalarEmbed":
        num, span = int(config["num_splines"]), int(config["spline_span"])
        weights.drop(f"{_EMBED}.spline.lower")  # ends of the splines, known from the options
        weights.drop(f"{_EMBED}.spline.upper")
        width = options["num_features"]
        table = weights.take(f"{_EMBED}.spline.class_embed.weight", num_types**2, width * num)
        splines = table.reshape(-1, width, num).transpose(2, 0, 1)
        return {"splines": splines}, {
            "embedding": "spline",
            "num_splines": num,
            "spline_span": span,
        }
    if target != "TwoBodyBesselScalarEmbed":
        raise ValueError(
            f"{_EMBED} must be TwoBodyBesselScalarEmbed or TwoBodySplineScalarEmbed, received "
            f"{config.get('_target_')!r}"
        )
    roots = weights.take(f"{_EMBED}.bessel_encode.bessel_weights").reshape(-1)
    (kernel,) = _kernels(weights, f"{_EMBED}.type_embed.basis_linear")
    half = kernel.shape[1] // 2
    params = {"center_radial": kernel[:, :half], "neighbor_radial": kernel[:, half:]}
    for name in ("center", "neighbor"):
        params[name] = weights.take(f"{_EMBED}.type_embed.{name}_embed.weight", num_types, half)
    return params, {
        "embedding": "bessel",
        "embedding_width": 2 * half,
        "num_radial": roots.size,
        "radial_roots": tuple(roots.tolist()),
        "cutoff_power": int(config.get("polynomial_cutoff_p", 6)),
    }


def _kernels(weights: TorchWeights, name: str) -> list[np.ndarray]:
    """Return the kernels of a network of scalars; activations have odd places in it."""
    kernels: list[np.ndarray] = []
    while f"{name}.mlp.{2 * len(kernels)}.weight" in weights:
        kernels.append(weights.take(f"{name}.mlp.{2 * len(kernels)}.weight", None, None))
    return kernels


def _networks(weights: TorchWeights, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of all networks of scalars, and the weights of the paths."""
    width, channels = options["num_features"], options["num_tensor_features"]
    num_degrees = options["max_degree"] + 1

    def network(name, kept, has_weights):
        """Convert a network whose outputs are `kept` scalars, then weights of the harmonics."""
        kernels = _kernels(weights, name)
        columns = np.arange(kept)
        if has_weights:  # by channel and degree, here by degree and channel
            order = np.arange(channels * num_degrees).reshape(channels, num_degrees).T
            columns = np.r_[columns, kept + order.reshape(-1)]
        if not kernels or kernels[-1].shape[1] != len(columns):
            raise ValueError(f"network {name!r} must have {len(columns)} outputs")
        kernels[-1] = kernels[-1][:, columns]
        return {f"kernel_{n}": kernel for n, kernel in enumerate(kernels)}

    params: dict[str, Any] = {
        "embedding": network("scalar_embed_mlp.mlp_module", width, False),
        "tensors": network("tensor_embed.env_embed_linear", 0, True),
        "environments": network("allegro.first_layer_env_embed_projection", width, True),
        "readout": network("edge_readout.mlp_module", 1, False),
    }
    for n in range(options["num_layers"]):
        has_weights = n < options["num_layers"] - 1
        params[f"latent_{n}"] = network(f"allegro.latents.{n}", width, has_weights)
        paths = weights.take(f"allegro.tps.{n}.weights")
        rows = channels if options["path_channel_coupling"] else 1
        params[f"paths_{n}"] = paths.reshape(rows, -1).T
    return params
