"""Allegro of nequip-allegro 0.8, from the state dict and the arguments of its `AllegroModel`.

Units of energy are those of the training; lengths are in Å.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlip_jax import models
from mlip_jax.importers.formats import weights as weight_files
from mlip_jax.importers.formats.state_dict import StateDict, numbers_of_symbols
from mlip_jax.importers.formats.weights import WeightsError, check_shapes
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.potential import Potential

# Arguments that do not change the energy, or which the shapes of the weights determine.
_IGNORED = (
    "cls",
    "_target_",
    "seed",
    "model_dtype",
    "compile_mode",
    "per_type_energy_scales",
    "per_type_energy_shifts",
    "per_type_energy_scales_trainable",
    "per_type_energy_shifts_trainable",
    "radial_chemical_embed_dim",
    "scalar_embed_mlp_hidden_layers_depth",
    "scalar_embed_mlp_hidden_layers_width",
    "allegro_mlp_hidden_layers_depth",
    "allegro_mlp_hidden_layers_width",
    "readout_mlp_hidden_layers_depth",
    "readout_mlp_hidden_layers_width",
    "per_edge_type_cutoff",  # the weights contain the reciprocals
    "do_derivatives",
)
_ACTIVATIONS = ("scalar_embed_mlp", "allegro_mlp", "readout_mlp")


class AllegroWeights(NamedTuple):
    """Result of converting the weights of Allegro; energies are in the units of its training.

    Attributes:
      options: Options of the model.
      params: Parameters of the model.
      shifts: Energy to add for each element, shape (119,).
    """

    options: dict[str, Any]
    params: dict[str, Any]
    shifts: np.ndarray


def load(path: str | Path, settings: Mapping[str, Any], energy_unit: float = 1.0) -> Potential:
    """Load a force field from a file with the state dict of an Allegro model.

    Args:
      path: .npz or .safetensors file, see importers/formats/weights.py.
      settings: Arguments of nequip-allegro's `AllegroModel`.
      energy_unit: Energy unit that the model was trained in (eV), such as `ase.units.kcal /
        ase.units.mol`.

    Raises:
      FileNotFoundError, WeightsError: See `weights.read` and `convert`.
    """
    try:
        options, params, shifts = convert(weight_files.read(path), settings)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    model, cutoff, reference = models.create("allegro", **options), options["cutoff"], shifts * energy_unit
    metadata = {
        "source": "nequip-allegro",
        "file": Path(path).name,
        "config": {"model": {"name": "allegro", "options": options}},
        "statistics": {
            "cutoff": cutoff,
            "reference_energies": reference.tolist(),
            "energy_scale": energy_unit,
            "elements": sorted(options["elements"]),
        },
    }
    elements = tuple(sorted(options["elements"]))
    return Potential(model, params, cutoff, reference, energy_unit, elements, metadata)


def convert(weights: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> AllegroWeights:
    """Convert a state dict.

    Args:
      weights: State dict as arrays, possibly with a common prefix of all names.
      settings: Arguments of nequip-allegro's `AllegroModel`.

    Raises:
      WeightsError: Weights are missing, have an unexpected shape, or have no counterpart, or a
        setting is not supported; the message lists them.
    """
    settings = _Settings(settings)
    names = settings.get("type_names")
    elements = numbers_of_symbols(names)
    width, channels = settings.get("num_scalar_features", 64), settings.get("num_tensor_features", 16)
    max_degree, num_layers = settings.get("l_max"), settings.get("num_layers", 2)
    options: dict[str, Any] = {
        "num_features": width,
        "num_tensor_features": channels,
        "num_layers": num_layers,
        "max_degree": max_degree,
        "parity": settings.get("parity", True),
        "cutoff": float(settings.get("r_max")),
        "elements": elements,
        "avg_num_neighbors": _by_type(settings.get("avg_num_neighbors"), names),
        "path_channel_coupling": settings.get("tp_path_channel_coupling", True),
        "learned_shift": False,
    }
    state = _state(weights)
    options |= _cutoffs(state, len(elements))
    embedding, more = _embedding(state, settings.get("radial_chemical_embed"), len(elements), width)
    options |= more
    settings.finish()
    order = _degree_first(channels, max_degree)
    params = embedding | {
        "embedding": _network(state, "scalar_embed_mlp.mlp_module.mlp", width),
        "tensors": _network(state, "tensor_embed.env_embed_linear.mlp", order=order),
        "environments": _network(
            state, "allegro.first_layer_env_embed_projection.mlp", width, order
        ),
        "readout": _network(state, "edge_readout.mlp_module.mlp", 1),
    }
    for n in range(num_layers):
        params[f"latent_{n}"] = _network(
            state, f"allegro.latents.{n}.mlp", width, order if n < num_layers - 1 else []
        )
        paths = state.take(f"allegro.tps.{n}.weights")
        rows = channels if options["path_channel_coupling"] else 1
        params[f"paths_{n}"] = paths.reshape(rows, -1).T
    for field, name in (("embedding", "embedding"), ("latent", "latent_0"), ("readout", "readout")):
        kernels = list(params[name].values())
        options[f"{field}_hidden"] = tuple(kernel.shape[1] for kernel in kernels[:-1])
    scales, shifts = _scale_and_shift(state, elements)
    if scales is not None:
        params["scale"], options["learned_scale"] = scales, True
    state.finish()
    check_shapes(models.create("allegro", **options), {"params": params})
    return AllegroWeights(options, {"params": params}, shifts)


class _Settings:
    """Settings that have not been used yet."""

    def __init__(self, settings: Mapping[str, Any]):
        self._left = {name: value for name, value in settings.items() if name not in _IGNORED}
        for name in _ACTIVATIONS:
            value = self._left.pop(f"{name}_nonlinearity", "silu")
            if value != "silu":
                raise WeightsError(f"{name}_nonlinearity must be 'silu', received {value!r}")
        potential = self._left.pop("pair_potential", None)
        if potential is not None:
            raise WeightsError(f"pair_potential is not supported, received {potential!r}")

    def get(self, name: str, *default: Any) -> Any:
        """Return a setting, or its default in nequip-allegro."""
        if name not in self._left and not default:
            raise WeightsError(f"setting {name!r} is missing; received {sorted(self._left)}")
        return self._left.pop(name, *default)

    def finish(self) -> None:
        """Raise WeightsError if settings remain."""
        if self._left:
            raise WeightsError(f"these settings have no counterpart here: {sorted(self._left)}")


def _state(weights) -> StateDict:
    """Remove the common prefix of the names, such as "model." of a compiled model."""
    mark = "allegro.tps.0.weights"
    matches = [name for name in weights if name.endswith(mark)]
    if len(matches) != 1:
        raise WeightsError(
            f"expected the state dict of one Allegro model, with one {mark!r}; received "
            f"{len(matches)} of them among {len(weights)} arrays"
        )
    prefix = matches[0].removesuffix(mark)
    return StateDict({name.removeprefix(prefix): array for name, array in weights.items()})


def _by_type(value, names) -> float | tuple[float, ...]:
    """Return one number, or one for each type."""
    return tuple(float(value[n]) for n in names) if isinstance(value, Mapping) else float(value)


def _cutoffs(state: StateDict, num_types: int) -> dict[str, Any]:
    """Return the cutoffs of pairs of types, if there are any (Å)."""
    reciprocals = state.take("edge_norm._rmax_recip").astype(np.float64)
    if reciprocals.ndim == 0:
        return {}
    if reciprocals.shape != (num_types**2,):
        raise WeightsError(
            f"weight 'edge_norm._rmax_recip': expected one number or {num_types**2}, received "
            f"{reciprocals.shape}"
        )
    return {"pair_cutoffs": tuple((1.0 / reciprocals).tolist())}


def _embedding(state: StateDict, settings: Mapping[str, Any], num_types: int, width: int):
    """Return the parameters and options of the two-body embedding."""
    prefix, settings = "radial_chemical_embed", dict(settings)
    target = settings.pop("_target_").rpartition(".")[2]
    settings.pop("seed", None)
    settings.pop("module_output_dim", None)
    if target == "TwoBodySplineScalarEmbed":
        num = settings.pop("num_splines")
        options = {"embedding": "spline", "num_splines": num, "spline_span": settings.pop("spline_span")}
        for name in ("lower", "upper"):
            state.take(f"{prefix}.spline.{name}")  # ends of the splines, which the options determine
        table = state.take(f"{prefix}.spline.class_embed.weight", num_types**2, width * num)
        params = {"splines": table.reshape(num_types**2, width, num).transpose(2, 0, 1)}
    elif target == "TwoBodyBesselScalarEmbed":
        for name in ("bessel_trainable", "type_embed_forward_weight_init"):
            settings.pop(name, None)
        roots = state.take(f"{prefix}.bessel_encode.bessel_weights", 1, None)[0]
        kernel = state.take(f"{prefix}.type_embed.basis_linear.mlp.0.weight", len(roots), None)
        half = kernel.shape[1] // 2
        params = {"radial_roots": roots, "center_radial": kernel[:, :half], "neighbor_radial": kernel[:, half:]}
        for name in ("center", "neighbor"):
            params[name] = state.take(f"{prefix}.type_embed.{name}_embed.weight", num_types, half)
        options = {
            "embedding": "bessel",
            "embedding_width": 2 * half,
            "num_radial": len(roots),
            "trainable_radial": True,
            "cutoff_power": settings.pop("polynomial_cutoff_p", 6),
        }
        settings.pop("num_bessels", None)
    else:
        raise WeightsError(
            "radial_chemical_embed must be TwoBodyBesselScalarEmbed or TwoBodySplineScalarEmbed, "
            f"received {target!r}"
        )
    if settings:
        raise WeightsError(f"these settings of {target} have no counterpart here: {sorted(settings)}")
    return params, options


def _degree_first(channels: int, max_degree: int) -> list[int]:
    """Return the columns of weights per channel and degree in the order degree, channel."""
    return np.arange(channels * (max_degree + 1)).reshape(channels, -1).T.ravel().tolist()


def _network(state: StateDict, name: str, width: int = 0, order=()) -> dict[str, np.ndarray]:
    """Return the kernels of a network.

    Args:
      state: Weights.
      name: Name of the network.
      width: Number of outputs that keep their order; further ones follow.
      order: Order of the further outputs.
    """
    layers = state.numbers(rf"{name}\.(\d+)\.weight")
    kernels = [state.take(f"{name}.{n}.weight", None, None) for n in layers]
    if not kernels or kernels[-1].shape[1] != width + len(order):
        raise WeightsError(f"network {name!r} must have {width + len(order)} outputs")
    columns = np.r_[np.arange(width), width + np.asarray(order, int)]
    kernels[-1] = kernels[-1][:, columns]
    return {f"kernel_{n}": kernel for n, kernel in enumerate(kernels)}


def _scale_and_shift(state: StateDict, elements) -> tuple[np.ndarray | None, np.ndarray]:
    """Return the scale of each type, if there is one, and the shift of each element."""
    scales, shifts = None, np.zeros(MAX_ATOMIC_NUMBER + 1)
    prefix = "per_type_energy_scale_shift"
    if f"{prefix}.scales" in state:
        scales = state.take(f"{prefix}.scales")
        scales = np.broadcast_to(scales.reshape(-1), len(elements)).copy()
    if f"{prefix}.shifts" in state:
        shifts[list(elements)] = state.take(f"{prefix}.shifts").reshape(-1)
    return scales, shifts
