"""PACE models of the published program (OpenMol/PACE of AIRS): state dict and arguments.

The program does not prescribe a version of e3nn, on which signs of the products depend; add the
version to the arguments, as "e3nn", if it is older than 0.5.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import gammaln

from mlip_jax import models
from mlip_jax.importers.formats import state_files
from mlip_jax.importers.formats import weights as weight_files
from mlip_jax.importers.formats.mace.blocks import contraction_params, uniform_irreps
from mlip_jax.importers.formats.recorded import RecordedWeights, table_of
from mlip_jax.importers.formats.weights import WeightsError, check_shapes
from mlip_jax.models.layers.tensor_products.irreps import SCALAR, natural
from mlip_jax.potential import Potential

_REQUIRED = ("atomic_numbers", "r_max", "hidden_irreps", "avg_num_neighbors", "average_energy")
_BASES = {"radial": "bessel", "expbern": "bernstein"}


def load(
    path: str | Path, config: Mapping[str, Any] | str | Path, energy_unit: float = 1.0
) -> Potential:
    """Load a force field from saved weights.

    Args:
      path: .npz, .safetensors or .pt file with the state dict of the model.
      config: Arguments of the constructor, or the path of a YAML file with them.
      energy_unit: Energy per unit of the network's energies (eV).

    Raises:
      FileNotFoundError: No such file.
      ValueError: The weights are not those of PACE, or they do not match the arguments.
    """
    path = Path(path)
    config = weight_files.read_arguments(config)
    return potential(state_files.read(path), config, energy_unit, {"file": path.name})


def potential(
    state: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    energy_unit: float = 1.0,
    metadata: Mapping[str, Any] | None = None,
) -> Potential:
    """Convert a state dict to a force field; for arguments and errors see `load`."""
    weights = RecordedWeights(state, "PACE", "node_embedding.linear.weight")
    options = model_options(weights, config)
    model = models.create("pace", **options)
    params = {"params": model_params(weights, model)}
    elements = options["elements"]
    scale, shift = (
        weights(f"scale_shift.{k}", len(elements)).reshape(-1) for k in ("scale", "shift")
    )
    if model.learned_scale:
        params["params"]["scale"], scale = scale, np.ones(1)
    # arrays without effect: weights of messages in the first layer, constants
    weights.drop(r"abases\.0\.conv_tp_weights.*|radial_embedding\..*|.*\.U_matrix_\w+")
    weights.drop(r".*\._compiled_main\w*\..*|.*\.output_mask")
    if options["correlation"] == 2:
        weights.drop(r"pmbs\.\d+\.lin2\.weight")
    weights.check_all_taken()
    check_shapes(model, params)
    known = tuple(sorted(elements))
    metadata = {"source": "PACE", "statistics": {"elements": list(known)}} | dict(metadata or {})
    return Potential(
        model,
        params,
        options["cutoff"],
        table_of(elements, shift * energy_unit),
        float(scale[0]) * energy_unit,
        known,
        metadata,
    )


def model_options(weights: RecordedWeights, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of models/pace.py.

    Raises:
      ValueError: An argument is missing or not supported, or conflicts with the weights.
    """
    missing = [name for name in _REQUIRED if config.get(name) is None]
    if missing:
        raise ValueError(f"the arguments lack {', '.join(missing)}, which the weights do not show")
    if float(config["average_energy"]) != 0:
        raise WeightsError(
            f"average_energy={config['average_energy']} is added to the energy of each structure, "
            "whatever its size; energies here are sums over atoms. Set it to 0 to go without it: "
            "forces, and differences of energies, stay the same"
        )
    basis = config.get("edge_emb", "radial")
    if basis not in _BASES:
        raise ValueError(f"argument edge_emb must be one of {tuple(_BASES)}, received {basis!r}")
    elements = tuple(int(z) for z in config["atomic_numbers"])
    width = weights("node_embedding.linear.weight").size // len(elements)
    hidden = uniform_irreps(config, width)
    layers = weights.series(r"readouts\.(\d+)\.linear_2\.weight")
    network = weights.series(r"edge_booster\.weight\.layer(\d+)\.weight")
    orders = weights.series(r"pmbs\.0\.symmetric_contractions\.contractions\.0\.weights\.(\d+)")
    scale = weights("scale_shift.scale", len(elements))
    return {
        "num_features": width,
        "num_layers": len(layers),
        "max_degree": int(config.get("max_ell", 3)),
        "feature_degree": len(hidden) - 1,
        "correlation": len(orders) + 1,
        "cutoff": float(config["r_max"]),
        "cutoff_power": int(config.get("num_polynomial_cutoff", 5)),
        "radial_basis": _BASES[basis],
        "num_radial": len(network[0]),
        "radial_centers": _wave_numbers(weights) if basis == "radial" else None,
        "radial_network": tuple(kernel.shape[1] for kernel in network[:-1]),
        "avg_num_neighbors": float(config["avg_num_neighbors"]),
        "readout_width": layers[0].size,
        "elements": elements,
        "learned_scale": not bool(np.all(scale == scale.flat[0])),
        "old_signs": _version(config.get("e3nn", "0.6.0")) < (0, 5, 1),
    }


def _wave_numbers(weights: RecordedWeights) -> tuple[float, ...]:
    waves = weights("radial_embedding.bessel_fn.bessel_weights").reshape(-1)
    return tuple(waves.astype(np.float64).tolist())


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in str(text).split(".")[:3])


def model_params(weights: RecordedWeights, model) -> dict[str, Any]:
    """Convert weights to parameters of models/pace.py.

    The root of the number of elements, by which the program divides, is in the tables.
    """
    width, num = model.num_features, len(model.elements)
    embedding = weights("node_embedding.linear.weight", num * width).reshape(num, width)
    params: dict[str, Any] = {
        "embedding": embedding / np.sqrt(num),
        "edges": _edges(weights, model),
    }
    if model.radial_basis == "bernstein":
        params["exponent"] = weights("radial_embedding._alpha").reshape(())
    for n in range(model.num_layers):
        params[f"layer_{n}"] = _layer(weights, model, n)
        hidden = weights(f"readouts.{n}.linear_1.weight", width * model.readout_width)
        params[f"readout_{n}"] = {
            "hidden": hidden.reshape(width, model.readout_width),
            "final": weights(f"readouts.{n}.linear_2.weight").reshape(-1),
        }
    return params


def _edges(weights: RecordedWeights, model) -> dict[str, Any]:
    """Return the parameters of the features of edges."""
    name, num = "edge_booster.x_init.", len(model.elements)
    first = weights(f"{name}lin1.weight", model.num_features * num)
    return {
        "embedding": {
            "sender": first[:, :num].T,
            "receiver": first[:, num:].T,
            "scale": weights(f"{name}normalization.weight"),
            "bias": weights(f"{name}normalization.bias"),
            "kernel": weights(f"{name}lin2.weight").T,
        },
        "filter": _radial_network(weights, model, r"edge_booster\.weight"),
        "radial": _radial_network(weights, model, r"edge_booster\.edge_boost_tps_weights\.0"),
        "elements": _pair_network(weights, r"edge_booster\.edge_boost_tps_weights_2\.0"),
    }


def _radial_network(weights: RecordedWeights, model, pattern: str) -> dict[str, np.ndarray]:
    """Return the kernels of a network of the distance."""
    kernels = weights.series(pattern + r"\.layer(\d+)\.weight")
    if model.radial_basis == "bernstein":
        # the program has binomial coefficients in single precision, the model exact ones
        k = np.arange(model.num_radial)
        exact = gammaln(model.num_radial) - gammaln(k + 1) - gammaln(model.num_radial - k)
        stored = weights("radial_embedding.logc").astype(np.float64)
        kernels[0] = kernels[0] * np.exp(stored - exact)[:, None]
    return {f"kernel_{n}": kernel for n, kernel in enumerate(kernels)}


def _pair_network(weights: RecordedWeights, pattern: str) -> dict[str, Any]:
    """Return the parameters of a network of the elements of both atoms."""
    first, *others = weights.series(pattern + r"\.layer(\d+)\.weight")
    sender, receiver = np.split(first / np.sqrt(len(first)), 2)
    network = {f"kernel_{n}": kernel for n, kernel in enumerate(others)}
    return {"sender": sender, "receiver": receiver, "network": network}


def _layer(weights: RecordedWeights, model, n: int) -> dict[str, Any]:
    width, num, last = model.num_features, len(model.elements), n == model.num_layers - 1
    blocks = tuple((width, irrep) for irrep in natural(model.max_degree))
    inputs = blocks[: model.feature_degree + 1] if n else ((width, SCALAR),)
    out = blocks[: 1 if last else model.feature_degree + 1]
    skip = weights.products(f"abases.{n}.skip_tp.weight", inputs, num, out)
    name = f"pmbs.{n}."
    layer = {
        "skip": {irrep: kernel / np.sqrt(num) for irrep, kernel in skip.items()},
        "contraction": contraction_params(
            weights, f"{name}symmetric_contractions.contractions.", out, model.correlation
        ),
        "product": weights.linear(f"{name}linear.weight", out, out),
    }
    for k in (1, 2, 3) if model.correlation == 3 else (1, 3):
        layer[f"linear_{k}"] = weights.linear(f"{name}lin{k}.weight", blocks, blocks)
    if n:
        layer["radial"] = _radial_network(weights, model, rf"abases\.{n}\.conv_tp_weights")
        layer["elements"] = _pair_network(weights, rf"abases\.{n}\.conv_tp_weights_2")
    return layer
