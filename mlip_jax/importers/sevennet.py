"""SevenNet (checked against sevenn 0.13.0): checkpoints, and state dicts with their config.

A checkpoint (.pth) is a pickle. It is read without PyTorch and without running any code in it
(formats/torch_file.py). Lengths are in Å, energies in eV.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax import models
from mlip_jax.importers.formats import torch_file
from mlip_jax.importers.formats import weights as weight_files
from mlip_jax.importers.formats.recorded import RecordedWeights, table_of
from mlip_jax.importers.formats.torch_records import entries_of, plain
from mlip_jax.importers.formats.weights import WeightsError, check_shapes
from mlip_jax.models.layers.tensor_products.convolution import (
    convolution_paths,
    num_weights,
    output_irreps,
)
from mlip_jax.models.layers.tensor_products.couplings import e3nn_coupling
from mlip_jax.models.layers.tensor_products.gates import gate_for
from mlip_jax.models.layers.tensor_products.irreps import (
    EVEN,
    SCALAR,
    Irrep,
    Irreps,
    parse,
    reachable,
)
from mlip_jax.potential import Potential

_RENAMED = {
    "EdgeEmbedding": "edge_embedding",
    "reducing nn input to hidden": "reduce_input_to_hidden",
    "reducing nn hidden to energy": "reduce_hidden_to_energy",
    "rescale atomic energy": "rescale_atomic_energy",
}  # sevenn before 0.10
# buffers that do not affect the energy, and empty arrays
_DROPPED = r".*\.(bias|output_mask)|.*(convolution\.weight|gate\.mul\.weight)|.*_w3j_\d+_\d+_\d+"
_ALLOWED = {
    "act_radial": ("silu",),
    "interaction_type": ("nequip", None),
    "use_bias_in_linear": (False,),
    "use_modal_node_embedding": (False,),
    "use_modal_wise_scale": (False,),
    "act_scalar": ({"e": "silu", "o": "tanh"},),
    "act_gate": ({"e": "silu", "o": "tanh"},),
    "readout_fcn_activation": ("relu", None),
}
_REQUIRED = (
    "cutoff",
    "channel",
    "lmax",
    "is_parity",
    "num_convolution_layer",
    "radial_basis",
    "cutoff_function",
    "self_connection_type",
    "_type_map",
)


def accepts(content: Any) -> bool:
    """Return whether the content of a file of torch.save is a checkpoint of sevenn."""
    return (
        isinstance(content, dict)
        and {"model_state_dict", "config"} <= set(content)
        and "_type_map" in entries_of(content["config"])
    )


def load(
    path: str | Path,
    config: Mapping[str, Any] | str | Path | None = None,
    modality: str | None = None,
) -> Potential:
    """Load a force field from a checkpoint or from saved weights.

    Args:
      path: Checkpoint of sevenn (.pth), or .npz or .safetensors file with the state dict.
      config: Settings of the model, or the path of a YAML file with them; None for those in the
        checkpoint.
      modality: Reference method, for force fields that were trained on several.

    Raises:
      FileNotFoundError: No such file.
      ValueError: The weights are not those of SevenNet, or do not match the settings.
    """
    path = Path(path)
    if path.suffix not in (".npz", ".safetensors"):
        state, settings = _read_checkpoint(path)
    else:
        state, settings = weight_files.read(path), None
    if config is not None:
        settings = weight_files.read_arguments(config)
    if settings is None:
        raise ValueError(
            f"{path}: weights do not describe the model completely; give config, the settings of sevenn, "
            "or the checkpoint (.pth)"
        )
    return potential(state, settings, modality, {"file": path.name})


def _read_checkpoint(path):
    content = torch_file.read(path)
    if not isinstance(content, dict) or not {"model_state_dict", "config"} <= set(content):
        raise WeightsError(
            f"{path}: not a checkpoint of sevenn; expected 'model_state_dict' and 'config'"
        )
    config = content["config"]
    return content["model_state_dict"], config if isinstance(config, dict) else plain(config)


def potential(
    state: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    modality: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Potential:
    """Convert a state dict to a force field; for arguments and errors see `load`."""
    weights = RecordedWeights(
        {_current(name): array for name, array in state.items()},
        "SevenNet",
        "edge_embedding.basis_function.coeffs",
    )
    _check_settings(config)
    modal = _modality(config, modality)
    options = model_options(weights, config)
    model = models.create("sevennet", **options)
    params, elements = _Converter(weights, config, model, modal).params(), options["elements"]
    shifts = weights("rescale_atomic_energy.shift")
    shifts = table_of(elements, shifts if shifts.ndim < 2 else shifts[modal])
    weights.drop(_DROPPED)
    weights.check_all_taken()
    check_shapes(model, {"params": params})
    metadata = {"source": "SevenNet", "statistics": {"elements": sorted(elements)}} | dict(
        metadata or {}
    )
    return Potential(
        model, {"params": params}, options["cutoff"], shifts, 1.0, tuple(sorted(elements)), metadata
    )


def _current(name: str) -> str:
    """Return the name of an array in sevenn 0.13."""
    head, dot, tail = name.partition(".")
    return (
        _RENAMED.get(head, head.replace(" ", "_"))
        + dot
        + tail.replace("denumerator", "denominator")
    )


def _check_settings(config) -> None:
    """Raise ValueError if a setting is missing or not supported."""
    missing = [name for name in _REQUIRED if name not in config]
    if missing:
        raise ValueError(f"the settings lack {', '.join(missing)}, which the weights do not show")
    for name, allowed in _ALLOWED.items():
        if name in config and config[name] not in allowed:
            raise ValueError(
                f"setting {name} must be {' or '.join(map(repr, allowed))}, received {config[name]!r}"
            )
    kinds = (
        config["radial_basis"]["radial_basis_name"],
        config["cutoff_function"]["cutoff_function_name"],
    )
    if kinds[0] != "bessel" or kinds[1] not in ("poly_cut", "XPLOR"):
        raise ValueError(
            f"radial basis and cutoff function must be 'bessel', and 'poly_cut' or 'XPLOR', received "
            f"{kinds}"
        )


def _modality(config, modality) -> int | None:
    """Return the index of the modality, None if the force field has none."""
    known = config.get("_modal_map") or {}
    if (modality is None) == bool(known) or (known and modality not in known):
        raise ValueError(
            f"modality must be one of {sorted(known)} for this force field, received {modality!r}. "
            f"State it as in X.pth#modality={sorted(known)[0]}"
            if known
            else f"this force field has no modalities, received {modality!r}"
        )
    return known[modality] if known else None


def model_options(weights: RecordedWeights, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of models/sevennet.py.

    Raises:
      ValueError: The irreps of the settings are not supported.
    """
    layers, function = int(config["num_convolution_layer"]), config["cutoff_function"]
    type_map = config["_type_map"]
    centers = weights("edge_embedding.basis_function.coeffs").reshape(-1)
    connection = config["self_connection_type"]
    connection = connection if isinstance(connection, list | tuple) else [connection] * layers
    radial = weights.series(r"0_convolution\.weight_nn\.layer(\d+)\.weight")
    denominators = [
        float(weights(f"{n}_convolution.denominator", 1).reshape(())) for n in range(layers)
    ]
    is_xplor = function["cutoff_function_name"] == "XPLOR"
    readout = weights.series(r"readout_FCN\.fcn\.layer(\d+)\.weight")
    return _feature_options(config) | {
        "num_layers": layers,
        "cutoff": float(config["cutoff"]),
        "cutoff_onset": float(function["cutoff_on"]) if is_xplor else None,
        "cutoff_power": int(function.get("poly_cut_p_value", 6)),
        "num_radial": len(centers),
        "radial_centers": tuple(map(float, centers)),
        "learned_centers": False,
        # without the setting, as before it existed, harmonics are not normalized
        "normalize_harmonics": bool(config.get("_normalize_sph", False)),
        "radial_widths": tuple(kernel.shape[1] for kernel in radial[:-1]),
        "self_connection": tuple(
            {"nequip": "elements", "linear": "linear"}[kind] for kind in connection
        ),
        "elements": tuple(int(z) for z in sorted(type_map, key=type_map.get)),
        "avg_num_neighbors": tuple(denominators),
        "use_bias": bool(config.get("_modal_map")),
        "energy_widths": tuple(kernel.shape[1] for kernel in readout[:-1])
        if config.get("readout_as_fcn")
        else None,
        "learned_scale": True,
        "learned_shift": False,
    }


def _feature_options(config) -> dict[str, Any]:
    """Return the options of irreps."""

    def degree(name):
        return int(config[name]) if config.get(name, -1) > 0 else int(config["lmax"])

    options = {
        "max_degree": degree("lmax_node"),
        "harmonics_degree": degree("lmax_edge"),
        "parity": "full" if config["is_parity"] else "even",
        "num_features": int(config["channel"]),
    }
    manual = config.get("irreps_manual")
    if manual:
        first, *hidden, last = [parse(text) for text in manual]
        counts = tuple(channels for channels, _ in hidden[0]) if hidden else (first[0][0],)
        options["num_features"], options["max_degree"] = counts, len(counts) - 1
        expected = tuple((channels, Irrep(l, EVEN)) for l, channels in enumerate(counts))
        if (
            config["is_parity"]
            or any(layer != expected for layer in hidden)
            or not (first == last == ((counts[0], SCALAR),))
        ):
            raise ValueError(
                "irreps_manual must be scalars, then the same even irreps in all layers, then scalars, "
                f"received {manual} with is_parity={config['is_parity']}"
            )
    return options


class _Converter:
    """Conversion of the arrays of a state dict to parameters of models/sevennet.py."""

    def __init__(
        self, weights: RecordedWeights, config: Mapping[str, Any], model, modal: int | None
    ):
        self.weights, self.config, self.model, self.modal = weights, config, model, modal
        self.has_old_order = _version(config) < (
            0,
            11,
        )  # weights of paths in the order of the loops
        self.num_modal = len(config.get("_modal_map") or {})

    def params(self) -> dict[str, Any]:
        """Return the parameters."""
        weights, model, width = self.weights, self.model, self.model.num_scalars()
        params: dict[str, Any] = {
            "embedding": weights(
                "onehot_to_feature_x.linear.weight", len(model.elements) * width
            ).reshape(-1, width),
            "scale": table_of(model.elements, weights("rescale_atomic_energy.scale")),
        }
        irreps = ((width, SCALAR),)
        for n in range(model.num_layers):
            wanted = model.hidden_irreps() if n < model.num_layers - 1 else ((width, SCALAR),)
            gate = gate_for(wanted, [irrep for _, irrep in irreps], model.harmonic_irreps())
            params[f"layer_{n}"] = self._layer(n, irreps, gate)
            irreps = gate.output
        return params | self._readout(width)

    def _layer(self, n: int, irreps: Irreps, gate) -> dict[str, Any]:
        weights, model, harmonics = self.weights, self.model, list(self.model.harmonic_irreps())
        # sevenn keeps all paths up to the largest degree of the layer's output; those that the gate
        # does not take have no effect
        is_last = n == model.num_layers - 1
        largest = max(irrep.degree for _, irrep in gate.output)
        kept = {
            irrep
            for irrep in reachable([irrep for _, irrep in irreps], harmonics)
            if irrep.degree <= largest and not (is_last and irrep.parity != EVEN)
        }
        theirs = convolution_paths(irreps, harmonics, kept, sort_weights=not self.has_old_order)
        ours = convolution_paths(irreps, harmonics, {irrep for _, irrep in gate.inputs})
        radial = weights.series(rf"{n}_convolution\.weight_nn\.layer(\d+)\.weight")
        radial[-1] = self._reorder(n, radial[-1], theirs, ours)
        name = f"{n}_self_connection_intro"
        if model.of_layer("self_connection", n) == "linear":
            connection = weights.linear(f"{name}.linear.weight", irreps, gate.inputs)
        else:
            connection = weights.products(
                f"{name}.fc_tensor_product.weight", irreps, len(model.elements), gate.inputs
            )
        return {
            "linear_1": self._linear(
                f"{n}_self_interaction_1", irreps, irreps, "use_modal_self_inter_intro"
            ),
            "linear_2": self._linear(
                f"{n}_self_interaction_2",
                output_irreps(theirs),
                gate.inputs,
                "use_modal_self_inter_outro",
            ),
            "radial": {f"kernel_{k}": kernel for k, kernel in enumerate(radial)},
            "self_connection": connection,
        }

    def _reorder(self, n, kernel, theirs, ours):
        """Return the columns of our paths, with the sign of the couplings that the file stores."""
        if kernel.shape[1] != num_weights(theirs):
            raise WeightsError(
                f"layer {n} must have {num_weights(theirs)} weights per edge, received "
                f"{kernel.shape[1]}; do the weights and the settings belong together?"
            )
        places = {path[:3]: path.start for path in theirs}
        columns = [None] * len(ours)
        for k, path in enumerate(sorted(ours, key=lambda path: path.start)):
            start = places[path[:3]]
            columns[k] = self._sign(n, path) * kernel[:, start : start + path.channels]
        return np.concatenate(columns, axis=1)

    def _sign(self, n, path) -> int:
        """Return the sign of a stored coupling relative to ours; 1 if none is stored."""
        degrees = path.source.degree, path.degree, path.target.degree
        name = f"{n}_convolution.convolution._compiled_main_left_right._w3j_{'_'.join(map(str, degrees))}"
        if name not in self.weights:
            return 1
        return 1 if (self.weights(name) * e3nn_coupling(*degrees)).sum() > 0 else -1

    def _linear(
        self, name: str, inputs: Irreps, outputs: Irreps, modal_setting: str
    ) -> dict[str, np.ndarray]:
        """Return a linear layer; the one-hot vector of the modality becomes a bias."""
        if not self.num_modal:
            return self.weights.linear(f"{name}.linear.weight", inputs, outputs)
        width = dict((irrep, channels) for channels, irrep in outputs)[SCALAR]
        if not self.config.get(modal_setting):
            return self.weights.linear(f"{name}.linear.weight", inputs, outputs) | {
                "bias": np.zeros(width)
            }
        flat = self.weights(f"{name}.linear.weight").astype(np.float64)
        size = self.num_modal * width
        kernels = RecordedWeights({"weight": flat[:-size]}, "SevenNet", "weight").linear(
            "weight", inputs, outputs
        )
        channels = dict((irrep, count) for count, irrep in inputs)[SCALAR]
        fan_in = channels + self.num_modal
        kernels[str(SCALAR)] = kernels[str(SCALAR)] * sqrt(channels / fan_in)
        return kernels | {
            "bias": flat[-size:].reshape(self.num_modal, width)[self.modal] / sqrt(fan_in)
        }

    def _readout(self, width):
        weights = self.weights
        if self.model.energy_widths is not None:
            kernels = weights.series(r"readout_FCN\.fcn\.layer(\d+)\.weight")
            return {"energy": {f"kernel_{k}": kernel for k, kernel in enumerate(kernels)}}
        half = ((width // 2, SCALAR),)
        return {
            "energy_hidden": self._linear(
                "reduce_input_to_hidden", ((width, SCALAR),), half, "use_modal_output_block"
            ),
            "energy": {
                "kernel_0": weights("reduce_hidden_to_energy.linear.weight", width // 2).reshape(
                    -1, 1
                )
            },
        }


def _version(config) -> tuple[int, ...]:
    """Return the version of sevenn that wrote the settings, (0, 13) if it is not given."""
    parts = str(config.get("version", "0.13.0")).split(".")
    return tuple(int(part) for part in parts[:2])
