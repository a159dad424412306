"""NequIP (checked against nequip 0.19.1): checkpoints, packages, and state dicts with arguments.

Checkpoints and packages contain the arguments of the model builder. They are read without PyTorch
and without running any code in them (formats/torch_file.py).
Lengths are in Å. The unit of energies is not stored. Names of arrays are those of the model inside
the training module; a prefix such as "model.sole_model." is removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax import models
from mlip_jax.importers.formats import nequip_files
from mlip_jax.importers.formats import weights as weight_files
from mlip_jax.importers.formats.recorded import RecordedWeights, numbers_of, table_of
from mlip_jax.importers.formats.weights import check_arguments, check_shapes
from mlip_jax.models.layers.tensor_products.convolution import convolution_paths, output_irreps
from mlip_jax.models.layers.tensor_products.couplings import e3nn_coupling
from mlip_jax.models.layers.tensor_products.gates import gate_for
from mlip_jax.models.layers.tensor_products.irreps import SCALAR, parse
from mlip_jax.potential import Potential

_REQUIRED = ("type_names", "r_max", "avg_num_neighbors")
# arguments that only affect training, or whose effect the weights show
_IGNORED = {
    "cls",
    "_target_",
    "seed",
    "model_dtype",
    "compile_mode",
    "per_type_energy_scales",
    "per_type_energy_shifts",
    "per_type_energy_scales_trainable",
    "per_type_energy_shifts_trainable",
    "bessel_trainable",
    "radial_mlp_depth",
    "radial_mlp_width",
    "readout_mlp_hidden_layers_depth",
    "readout_mlp_hidden_layers_width",
    "per_edge_type_cutoff",
    "type_embed_num_features",
    "num_bessels",
    "forward_normalize",
    "do_derivatives",
}
_ALLOWED = {
    "readout_mlp_nonlinearity": ("silu", None),
    "pair_potential": (None,),
    "convnet_resnet": (False,),
    "convnet_nonlinearity_type": ("gate",),
}
_READ = {
    *_REQUIRED,
    "polynomial_cutoff_p",
    "l_max",
    "parity",
    "num_layers",
    "num_features",
    "irreps_edge_sh",
    "feature_irreps_hidden",
}


def accepts(content: Any) -> bool:
    """Return whether the content of a file of torch.save is a checkpoint or package of NequIP."""
    return nequip_files.is_nequip(content)


def load(
    path: str | Path, config: Mapping[str, Any] | str | Path | None = None, energy_unit: float = 1.0
) -> Potential:
    """Load a force field from a checkpoint, a package, or saved weights.

    Args:
      path: Checkpoint (.ckpt) or package (.nequip.zip) of NequIP, or .npz or .safetensors file with
        the state dict of the model.
      config: Arguments of nequip's model builder (NequIPGNNModel or FullNequIPGNNModel), or the
        path of a YAML file with them; None for those in the checkpoint or package.
      energy_unit: Energy per unit of the network's energies (eV).

    Raises:
      FileNotFoundError: No such file.
      ValueError: The weights are not those of NequIP, or they do not match the arguments.
    """
    path = Path(path)
    config = None if config is None else weight_files.read_arguments(config)
    if path.suffix not in (".npz", ".safetensors"):
        state, config = nequip_files.read(path, config)
    elif config is None:
        raise ValueError(
            f"{path}: weights do not describe the model completely; give config, the arguments of the "
            "model builder, or the checkpoint"
        )
    else:
        state = weight_files.read(path)
    return potential(state, config, energy_unit, {"file": path.name})


def potential(
    state: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    energy_unit: float = 1.0,
    metadata: Mapping[str, Any] | None = None,
) -> Potential:
    """Convert a state dict to a force field; for arguments and errors see `load`."""
    weights = RecordedWeights(state, "NequIP", "type_embed.embed_module.weight")
    options = model_options(weights, config)
    model = models.create("nequip", **options)
    params, elements = model_params(weights, model), options["elements"]
    shifts = table_of(elements, weights("per_type_energy_scale_shift.shifts"))
    weights.check_all_taken()
    check_shapes(model, {"params": params})
    metadata = {"source": "NequIP", "statistics": {"elements": sorted(elements)}} | dict(
        metadata or {}
    )
    return Potential(
        model,
        {"params": params},
        options["cutoff"],
        shifts * energy_unit,
        energy_unit,
        tuple(sorted(elements)),
        metadata,
    )


def model_options(weights: RecordedWeights, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of models/nequip.py.

    Raises:
      ValueError: An argument is missing or not supported, or conflicts with the weights.
    """
    check_arguments(config, _REQUIRED, _ALLOWED, _IGNORED | _READ)
    elements, r_max = numbers_of(config["type_names"]), float(config["r_max"])
    reciprocal = weights("edge_norm._rmax_recip").astype(np.float64).reshape(-1)
    average = config["avg_num_neighbors"]
    if isinstance(average, Mapping):
        average = tuple(float(average[name]) for name in config["type_names"])
    radial = weights.series(r"layer0_convnet\.conv\.edge_mlp\.mlp\.(\d+)\.weight")
    readout = weights.series(r"per_atom_energy_readout\.mlp_module\.mlp\.(\d+)\.weight")
    return _feature_options(config) | {
        "cutoff": r_max,
        "pair_cutoffs": None if reciprocal.size == 1 else tuple((1 / reciprocal).tolist()),
        "num_radial": weights("bessel_encode.bessel_weights").size,
        "radial_roots": tuple(weights("bessel_encode.bessel_weights").reshape(-1).tolist()),
        "cutoff_power": int(config.get("polynomial_cutoff_p", 6)),
        "radial_widths": tuple(kernel.shape[1] for kernel in radial[:-1]),
        "embedding_width": weights("type_embed.embed_module.weight").shape[1],
        "elements": elements,
        "avg_num_neighbors": average if isinstance(average, tuple) else float(average),
        "energy_widths": tuple(kernel.shape[1] for kernel in readout[:-1]),
        "learned_scale": True,
        "learned_shift": False,
    }


def _feature_options(config) -> dict[str, Any]:
    """Return the options of irreps: degrees, parity, channels and layers."""
    if "feature_irreps_hidden" not in config:
        features = config.get("num_features", 32)
        return {
            "max_degree": int(config.get("l_max", 1)),
            "num_layers": int(config.get("num_layers", 4)),
            "parity": "full" if config.get("parity", True) else "natural",
            "num_features": features if isinstance(features, int) else tuple(features),
        }
    layers, harmonics = config["feature_irreps_hidden"], parse(config["irreps_edge_sh"])
    for parity in ("natural", "even"):
        options = {"max_degree": len(harmonics) - 1, "parity": parity}
        model = models.create("nequip", **options)
        if harmonics == tuple((1, irrep) for irrep in model.harmonic_irreps()):
            return options | {"num_layers": len(layers), "irreps": tuple(layers)}
    raise ValueError(
        "irreps_edge_sh must be one irrep for each degree from 0 on, received "
        f"{config['irreps_edge_sh']}"
    )


def model_params(weights: RecordedWeights, model) -> dict[str, Any]:
    """Convert weights to parameters of models/nequip.py."""
    width, harmonics = model.embedding_width, list(model.harmonic_irreps())
    readout = weights.series(r"per_atom_energy_readout\.mlp_module\.mlp\.(\d+)\.weight")
    params: dict[str, Any] = {
        "embedding": weights("type_embed.embed_module.weight"),
        "energy": {f"kernel_{n}": kernel for n, kernel in enumerate(readout)},
        "scale": table_of(model.elements, weights("per_type_energy_scale_shift.scales")),
    }
    irreps = ((width, SCALAR),)
    for n, wanted in enumerate(model.layer_irreps()):
        gate = gate_for(wanted, [irrep for _, irrep in irreps], harmonics)
        name = f"layer{n}_convnet.conv."
        paths = convolution_paths(irreps, harmonics, {irrep for _, irrep in gate.inputs})
        radial = weights.series(rf"layer{n}_convnet\.conv\.edge_mlp\.mlp\.(\d+)\.weight")
        radial[-1] = _with_signs(weights, f"{name}tp_scatter.tp.", radial[-1], paths)
        layer = {
            "linear_1": weights.linear(f"{name}linear_1.weight", irreps, irreps),
            "radial": {f"kernel_{k}": kernel for k, kernel in enumerate(radial)},
            "linear_2": weights.linear(f"{name}linear_2.weight", output_irreps(paths), gate.inputs),
        }
        if n > 0:
            layer["self_connection"] = weights.products(
                f"{name}sc.weight", irreps, width, gate.inputs
            )
        params[f"layer_{n}"] = layer
        irreps = gate.output
    return params


def _with_signs(weights: RecordedWeights, name: str, kernel: np.ndarray, paths) -> np.ndarray:
    """Return the weights of the paths, with the sign of the couplings that the file stores."""
    kernel, degrees = kernel.copy(), {(p.source.degree, p.degree, p.target.degree) for p in paths}
    for path in degrees:
        stored = f"{name}_compiled_main_left_right._w3j_{'_'.join(map(str, path))}"
        if stored in weights and (weights(stored) * e3nn_coupling(*path)).sum() < 0:
            for p in paths:
                if (p.source.degree, p.degree, p.target.degree) == path:
                    kernel[:, p.start : p.start + p.channels] *= -1
    return kernel
