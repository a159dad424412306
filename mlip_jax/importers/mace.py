"""MACE models of mace-torch (checked against 0.3.16): .model files, and state dicts with arguments.

A .model file is a pickled model. It is read without PyTorch and without running any code in it
(formats/torch_file.py). A state dict lacks the average number of neighbors and the kinds of blocks.
They are arguments of the constructor, which this code writes for a model of mace-torch:

    from mace.tools.scripts_utils import extract_config_mace_model
    yaml.safe_dump({k: str(v) for k, v in extract_config_mace_model(model).items()}, file)

With the option use_reduced_cg, weights belong to another basis of the products, and are not
supported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import covalent_radii

from mlip_jax import models
from mlip_jax.importers.formats import state_files, torch_file
from mlip_jax.importers.formats import weights as weight_files
from mlip_jax.importers.formats.mace.blocks import contraction_params, number_of, uniform_irreps
from mlip_jax.importers.formats.mace.module import is_mace, read_module, select_head
from mlip_jax.importers.formats.mace.products import align_products
from mlip_jax.importers.formats.recorded import RecordedWeights, table_of
from mlip_jax.importers.formats.weights import WeightsError, check_shapes
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.models.layers.tensor_products.convolution import convolution_paths, output_irreps
from mlip_jax.models.layers.tensor_products.irreps import SCALAR, natural
from mlip_jax.models.mace import ZBL_CONSTANTS
from mlip_jax.potential import Potential

_BLOCKS = {
    "RealAgnosticInteractionBlock": "agnostic",
    "RealAgnosticResidualInteractionBlock": "residual",
    "RealAgnosticDensityInteractionBlock": "agnostic_density",
    "RealAgnosticDensityResidualInteractionBlock": "residual_density",
}
_ZBL = {"c": ZBL_CONSTANTS[:4], "a_exp": ZBL_CONSTANTS[4], "a_prefactor": ZBL_CONSTANTS[5]}
_REQUIRED = ("max_ell", "hidden_irreps", "interaction_cls", "interaction_cls_first")


def accepts(content: Any) -> bool:
    """Return whether the content of a file of torch.save is a model of mace-torch."""
    return is_mace(content)


def load(
    path: str | Path,
    config: Mapping[str, Any] | str | Path | None = None,
    energy_unit: float = 1.0,
    head: str | None = None,
) -> Potential:
    """Load a force field from a .model file or from saved weights.

    Args:
      path: .model file of mace-torch, or .npz, .safetensors or .pt file with the state dict.
      config: Arguments of the constructor, or the path of a YAML file with them; None for those in
        the .model file. Classes and irreps may be texts.
      energy_unit: Energy per unit of the network's energies (eV).
      head: Name of the head, for models with several.

    Raises:
      FileNotFoundError: No such file.
      ValueError: The weights are not those of MACE, or they do not match the arguments.
    """
    path = Path(path)
    if config is None and path.suffix not in (".npz", ".safetensors"):
        content = torch_file.read(path)
        try:
            state, arguments = read_module(content)
            return potential(state, arguments, energy_unit, {"file": path.name}, head)
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from error
    if config is None:
        raise ValueError(
            f"{path}: weights do not describe the model completely; give config, the arguments of the "
            "constructor, or the .model file"
        )
    config = weight_files.read_arguments(config)
    return potential(state_files.read(path), config, energy_unit, {"file": path.name}, head)


def potential(
    state: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    energy_unit: float = 1.0,
    metadata: Mapping[str, Any] | None = None,
    head: str | None = None,
) -> Potential:
    """Convert a state dict to a force field; for arguments and errors see `load`."""
    state = align_products(select_head(state, config, head))
    weights = RecordedWeights(state, "MACE", "node_embedding.linear.weight")
    options = model_options(weights, config)
    model = models.create("mace", **options)
    params = {"params": model_params(weights, model)}
    elements, scale = options["elements"], number_of(weights, "scale_shift.scale")
    energies = weights("atomic_energies_fn.atomic_energies", len(elements))
    references = energies.reshape(-1).astype(np.float64) + number_of(weights, "scale_shift.shift")
    weights.drop(r"num_interactions|(radial_embedding|pair_repulsion_fn)\..*")
    weights.drop(r".*\.U_matrix_\w+|.*\._compiled_main\w*\..*|.*\.output_mask|.*weights_\w+_zeroed")
    weights.check_all_taken()
    check_shapes(model, params)
    known = tuple(sorted(elements))
    metadata = {"source": "MACE", "statistics": {"elements": list(known)}} | dict(metadata or {})
    return Potential(
        model,
        params,
        options["cutoff"],
        table_of(elements, references * energy_unit),
        scale * energy_unit,
        known,
        metadata,
    )


def model_options(weights: RecordedWeights, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of models/mace.py.

    Raises:
      ValueError: An argument is missing or not supported, or conflicts with the weights.
    """
    first, other = (_block(config, name) for name in ("interaction_cls_first", "interaction_cls"))
    elements = tuple(weights("atomic_numbers").reshape(-1).tolist())
    num_layers = int(number_of(weights, "num_interactions"))
    radial = weights.series(r"interactions\.0\.conv_tp_weights\.layer(\d+)\.weight")
    orders = weights.series(r"products\.0\.symmetric_contractions\.contractions\.0\.weights\.(\d+)")
    if "density" in first and "density" in (other if num_layers > 1 else first):
        average = 1.0
    elif config.get("avg_num_neighbors") is None:
        raise ValueError("the arguments lack avg_num_neighbors, which the weights do not show")
    else:
        average = float(config["avg_num_neighbors"])
    hidden = uniform_irreps(config, weights("node_embedding.linear.weight").size // len(elements))
    last = f"readouts.{num_layers - 1}.linear_2.weight"  # a model of one layer lacks it
    return {
        "num_features": hidden[0][0],
        "num_layers": num_layers,
        "max_degree": int(config["max_ell"]),
        "feature_degree": len(hidden) - 1,
        "correlation": len(orders) + 1,
        "radial_network": tuple(kernel.shape[1] for kernel in radial[:-1]),
        "first_interaction": first,
        "interaction": other,
        "avg_num_neighbors": average,
        "readout_width": weights(last).size if last in weights else None,
        "elements": elements,
    } | _radial_options(weights)


def _block(config: Mapping[str, Any], name: str) -> str:
    """Return the block of a class of mace-torch, which may be a text."""
    missing = [name for name in _REQUIRED if config.get(name) is None]
    if missing:
        raise ValueError(f"the arguments lack {', '.join(missing)}, which the weights do not show")
    for option, allowed in (("use_reduced_cg", "False"), ("gate", "silu")):
        if allowed.lower() not in str(config.get(option, allowed)).lower():
            raise ValueError(f"argument {option} must be {allowed}, received {config[option]!r}")
    found = re.search(r"(?<!\w)(\w++)'?>?$", str(config[name]))
    if not found or found[1] not in _BLOCKS:
        raise ValueError(
            f"argument {name} must be one of {', '.join(_BLOCKS)}, received {config[name]!r}"
        )
    return _BLOCKS[found[1]]


def _radial_options(weights: RecordedWeights) -> dict[str, Any]:
    """Return the options of the distances: cutoff, basis, transform, repulsion."""
    waves = weights("radial_embedding.bessel_fn.bessel_weights").reshape(-1)
    power = number_of(weights, "radial_embedding.cutoff_fn.p")
    options = {
        "cutoff": number_of(weights, "r_max"),
        "cutoff_power": int(power),
        "num_radial": len(waves),
        "radial_centers": tuple(waves.astype(np.float64).tolist()),
    }
    transform, repulsion = "radial_embedding.distance_transform.", "pair_repulsion_fn."
    if f"{transform}q" in weights:
        constants = tuple(number_of(weights, transform + name) for name in "qpa")
        options |= {"distance_transform": "agnesi", "agnesi": constants}
    if f"{repulsion}c" in weights:
        stored = {name: weights(repulsion + name).reshape(-1) for name in (*_ZBL, "p")}
        for name, expected in (_ZBL | {"p": power}).items():
            if not np.allclose(stored[name], expected, rtol=1e-6, atol=0):
                raise WeightsError(f"{repulsion}{name} must be {expected}, its default in MACE")
        constants = np.concatenate([stored[name] for name in _ZBL]).astype(np.float64)
        options |= {"zbl": True, "zbl_constants": tuple(constants.tolist())}
    for prefix in (transform, repulsion):
        if f"{prefix}covalent_radii" in weights:
            radii = weights(f"{prefix}covalent_radii").reshape(-1).astype(np.float64)
            if not np.array_equal(radii, covalent_radii[: len(radii)]):
                options["covalent_radii"] = tuple(radii[: MAX_ATOMIC_NUMBER + 1].tolist())
    return options


def model_params(weights: RecordedWeights, model) -> dict[str, Any]:
    """Convert weights to parameters of models/mace.py.

    The root of the number of elements, by which mace-torch divides, is in the tables.
    """
    width, num = model.num_features, len(model.elements)
    embedding = weights("node_embedding.linear.weight", num * width).reshape(num, width)
    params: dict[str, Any] = {"embedding": embedding / np.sqrt(num)}
    for n in range(model.num_layers):
        last = n == model.num_layers - 1
        params[f"layer_{n}"] = _layer(weights, model, n, 0 if last else model.feature_degree)
        name = f"readouts.{n}.linear"
        if last and model.readout_width:
            shape = (width, model.readout_width)
            hidden = weights(f"{name}_1.weight", width * model.readout_width).reshape(shape)
            readout = {"hidden": hidden, "final": weights(f"{name}_2.weight").reshape(-1)}
        else:
            readout = {"final": weights(f"{name}.weight", width).reshape(-1)}
        params[f"readout_{n}"] = readout
    return params


def _layer(weights: RecordedWeights, model, n: int, feature_degree: int) -> dict[str, Any]:
    width, num, degrees = model.num_features, len(model.elements), natural(model.max_degree)
    block = model.interaction if n else model.first_interaction
    name, product = f"interactions.{n}.", f"products.{n}."
    inputs = tuple((width, irrep) for irrep in degrees[: model.feature_degree + 1])
    inputs = inputs if n else ((width, SCALAR),)
    sums = tuple((width, irrep) for irrep in degrees)
    out = sums[: feature_degree + 1]
    paths = convolution_paths(inputs, degrees, degrees, sort_weights=True)
    radial = weights.series(rf"interactions\.{n}\.conv_tp_weights\.layer(\d+)\.weight")
    scale = _bessel_scale(weights)
    radial[0] = radial[0] * scale
    ends = (inputs, out) if "residual" in block else (sums, sums)
    skip = weights.products(f"{name}skip_tp.weight", ends[0], num, ends[1])
    layer = {
        "up": weights.linear(f"{name}linear_up.weight", inputs, inputs),
        "radial": {f"kernel_{k}": kernel for k, kernel in enumerate(radial)},
        "linear": weights.linear(f"{name}linear.weight", output_irreps(paths), sums),
        "skip": {irrep: kernel / np.sqrt(num) for irrep, kernel in skip.items()},
        "contraction": contraction_params(
            weights, f"{product}symmetric_contractions.contractions.", out, model.correlation
        ),
        "product": weights.linear(f"{product}linear.weight", out, out),
    }
    if "density" in block:
        layer["density"] = {"kernel_0": weights(f"{name}density_fn.layer0.weight") * scale}
    return layer


def _bessel_scale(weights: RecordedWeights) -> np.float64:
    """Return the stored factor of the Bessel functions over the exact one; it may be rounded."""
    name = "radial_embedding.bessel_fn.prefactor"
    exact = np.sqrt(2.0 / number_of(weights, "r_max"))
    return np.float64(number_of(weights, name) / exact if name in weights else 1.0)
