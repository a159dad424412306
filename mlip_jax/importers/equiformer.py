"""Equiformer (checked against the code of its authors, commit 64cb786): the graph attention
transformers for the Open Catalyst and MD17 data sets.

Lengths are in Å. The unit of energies is not stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax import models
from mlip_jax.importers.formats import state_files
from mlip_jax.importers.formats.torch_weights import TorchWeights
from mlip_jax.importers.formats.weights import (
    WeightsError,
    check_arguments,
    check_shapes,
    read_arguments,
)
from mlip_jax.models.layers.graph_attention import Coupling, couplings, gate_inputs
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.models.layers.tensor_products.linear import NORMALIZATION
from mlip_jax.potential import Potential

_REQUIRED = (
    "irreps_node_embedding",
    "irreps_sh",
    "irreps_feature",
    "irreps_head",
    "irreps_mlp_mid",
)
_REQUIRED += ("num_layers", "num_heads", "max_radius", "avg_num_nodes", "avg_degree")
_REQUIRED += ("number_of_basis", "fc_neurons")
_OPTIONAL = ("irreps_pre_attn", "rescale_degree")
_ALLOWED = {
    "nonlinear_message": (True,),
    "norm_layer": ("layer",),
    "use_node_attr": (False,),
    "use_atom_edge_attr": (False,),
    "use_attn_head": (False,),
    "irreps_node_attr": ("1x0e",),
    "basis_type": ("gaussian", "exp"),
    "mean": (None,),
    "std": (None,),
    "scale": (None,),
    "atomref": (None,),
}
# arguments that only affect training, or whose effect the weights show
_IGNORED = {
    "irreps_in",
    "irreps_atom_edge_attr",
    "alpha_drop",
    "proj_drop",
    "out_drop",
    "drop_path_rate",
    "use_auxiliary_task",
    "otf_graph",
    "use_pbc",
    "max_neighbors",
    "max_atom_type",
}


def load(
    path: str | Path, config: Mapping[str, Any] | str | Path, energy_unit: float = 1.0
) -> Potential:
    """Load a force field from saved weights.

    Args:
      path: .npz, .safetensors or .pt file with the state dict of the model.
      config: Arguments of the constructor, with the averages `avg_num_nodes` and `avg_degree` that
        are constants of its file; or the path of a YAML file with them.
      energy_unit: Energy per unit of the network's energies (eV).

    Raises:
      FileNotFoundError: No such file.
      ValueError: The weights are not those of Equiformer, or they do not match the arguments.
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
    check_arguments(config, _REQUIRED, _ALLOWED, {*_IGNORED, *_OPTIONAL})
    weights = TorchWeights(state, "edge_deg_embed.exp.tp.weight", "Equiformer")
    options = model_options(weights, config)
    embeddings, elements = _embeddings(weights, options)
    params = embeddings | _layers(weights, options, float(config["avg_num_nodes"]))
    weights.check_all_taken()
    model = models.create("equiformer", **options)
    check_shapes(model, {"params": params})
    metadata = {"source": "Equiformer", "statistics": {"elements": list(elements)}} | dict(
        metadata or {}
    )
    reference = np.zeros(MAX_ATOMIC_NUMBER + 1)
    return Potential(
        model, {"params": params}, options["cutoff"], reference, energy_unit, elements, metadata
    )


def model_options(weights: TorchWeights, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of models/equiformer.py.

    Raises:
      ValueError: An argument is missing or not supported.
    """
    widths = _even_widths(config, "irreps_node_embedding")
    before = config.get("irreps_pre_attn")
    if before is not None and _even_widths(config, "irreps_pre_attn") != widths:
        raise ValueError(f"irreps_pre_attn must be irreps_node_embedding, received {before!r}")
    if set(_even_widths(config, "irreps_sh")) != {1}:
        raise ValueError(f"irreps_sh must be '1x0e+1x1e+...', received {config['irreps_sh']!r}")
    return {
        "num_features": widths,
        "num_layers": int(config["num_layers"]),
        "max_degree": len(_even_widths(config, "irreps_sh")) - 1,
        "num_heads": int(config["num_heads"]),
        "head_features": _even_widths(config, "irreps_head"),
        "hidden_features": _even_widths(config, "irreps_mlp_mid"),
        "final_features": _even_widths(config, "irreps_feature"),
        "cutoff": float(config["max_radius"]),
        "cutoff_fn": "step",
        "radial_basis": "gaussian" if "rbf.mean" in weights else "expnorm",
        "num_radial": int(config["number_of_basis"]),
        "radial_widths": tuple(config["fc_neurons"]),
        "avg_num_neighbors": float(config["avg_degree"]),
        "rescale_degree": bool(config.get("rescale_degree", False)),
        "num_tags": 3 if "tag_embed.atom_type_lin.tp.weight" in weights else 0,
        "learned_shift": False,
        "direct_forces": "auxiliary_head.alpha_dot" in weights,
    }


def _even_widths(config, name) -> tuple[int, ...]:
    """Return the numbers of channels of irreps "16x0e+8x1e+...", one for each degree."""
    blocks = [re.fullmatch(r"(\d+)x(\d+)e", block.strip()) for block in config[name].split("+")]
    if not all(blocks) or [int(b[2]) for b in blocks] != list(range(len(blocks))):
        raise ValueError(
            f"{name} must be even irreps of the degrees 0, 1, ..., as '16x0e+8x1e', received "
            f"{config[name]!r}"
        )
    return tuple(int(block[1]) for block in blocks)


def _layers(
    weights: TorchWeights, options: Mapping[str, Any], avg_num_atoms: float
) -> dict[str, Any]:
    """Return the parameters of everything except the embeddings of elements and tags."""
    widths, final, num_layers = (
        options["num_features"],
        options["final_features"],
        options["num_layers"],
    )
    hidden = options["hidden_features"]
    params: dict[str, Any] = {"degree": _degree_embedding(weights, options)}
    if options["radial_basis"] == "gaussian":
        params["radial_basis"] = {
            "mean": weights.take("rbf.mean").reshape(-1),
            "width": weights.take("rbf.std").reshape(-1),
            "weight": weights.take("rbf.weight").reshape(()),
            "bias": weights.take("rbf.bias").reshape(()),
        }
    else:
        _check_expnorm(weights, options["cutoff"])
    for n in range(num_layers):
        name, out = f"blocks.{n}", final if n == num_layers - 1 else widths
        block = {
            "norm_1": _norm(weights, f"{name}.norm_1", widths),
            "attention": _attention(weights, f"{name}.ga", options, widths, widths),
            "norm_2": _norm(weights, f"{name}.norm_2", widths),
            "feed_forward_1": _linear(weights, f"{name}.ffn.fctp_1", widths, gate_inputs(hidden)),
            "feed_forward_2": _linear(weights, f"{name}.ffn.fctp_2", hidden, out),
        }
        if out != widths:
            block["shortcut"] = _linear(weights, f"{name}.ffn_shortcut", widths, out)
        params[f"block_{n}"] = block
    params["norm"] = _norm(weights, "norm", final)
    params["energy"] = _energy(weights, final[0], avg_num_atoms)
    if options["direct_forces"]:
        params["forces"] = _attention(weights, "auxiliary_head", options, final, (0, 1))
    return params


def _embeddings(weights: TorchWeights, options):
    """Return the embeddings of elements and of tags, and the elements that have one.

    The first includes the biases of both.
    """
    width = options["num_features"][0]
    rows = weights.take("atom_embed.atom_type_lin.tp.weight").reshape(-1, width)
    rows = rows[: MAX_ATOMIC_NUMBER + 1]
    table = np.zeros((MAX_ATOMIC_NUMBER + 1, width), rows.dtype)
    table[: len(rows)] = rows
    params = {"embedding": table + weights.take("atom_embed.atom_type_lin.bias.0", width)}
    if options["num_tags"]:
        name = "tag_embed.atom_type_lin"
        params["tags"] = weights.take(f"{name}.tp.weight", 3 * width).reshape(3, width)
        params["embedding"] += weights.take(f"{name}.bias.0", width)
    return params, tuple(range(1, len(rows)))


def _degree_embedding(weights: TorchWeights, options) -> dict[str, Any]:
    """Return the parameters of the first features.

    The published network multiplies constant scalars, and vectors that are zero, with harmonics.
    Weights of the vectors have no effect.
    """
    name, widths = "edge_deg_embed", options["num_features"]
    num = min(options["max_degree"] + 1, len(widths))
    found = couplings(len(widths), options["max_degree"], range(len(widths)))
    inputs = [_num_channels(found, widths, l) for l in range(len(widths))]
    project = _linear(weights, f"{name}.proj", inputs, widths)
    radial = _radial(weights, f"{name}.rad", _order(found, widths))
    # the products of scalars are the first ones of each degree, both here and there
    kept = [k for c, part in _split(found, widths) if c.source == 0 for k in part]
    return {
        "constant": weights.take(f"{name}.exp.tp.weight") + weights.take(f"{name}.exp.bias.0"),
        "radial": radial | {"kernel": radial["kernel"][:, kept], "bias": radial["bias"][kept]},
        "project": {f"kernel_{l}": project[f"kernel_{l}"][: widths[0]] for l in range(num)},
        "bias": project["bias"],
    }


def _num_channels(found: Sequence[Coupling], widths: Sequence[int], target: int) -> int:
    """Return the number of channels of all products of one degree."""
    return sum(len(c.harmonics) * widths[c.source] for c in found if c.target == target)


def _split(found: Sequence[Coupling], widths: Sequence[int]) -> list[tuple[Coupling, range]]:
    """Return the places of the weights of each product."""
    stops = np.cumsum([len(c.harmonics) * widths[c.source] for c in found]).tolist()
    return [(c, range(start, stop)) for c, start, stop in zip(found, [0, *stops], stops)]


def _order(found: Sequence[Coupling], widths: Sequence[int]) -> np.ndarray:
    """Return the places in e3nn of all weights of the products.

    In e3nn they are ordered by the degrees of source, harmonics and target.
    """
    paths = [(c.source, b, c.target) for c in found for b in c.harmonics]
    start, starts = 0, {}
    for path in sorted(paths):
        starts[path] = start
        start += widths[path[0]]
    return np.concatenate([starts[path] + np.arange(widths[path[0]]) for path in paths])


def _check_expnorm(weights: TorchWeights, cutoff: float) -> None:
    """Raise WeightsError if the stored basis is not that of the model."""
    means, low = weights.take("rbf.means"), np.exp(-cutoff)
    num = len(means)
    steepness = (2.0 / num * (1.0 - low)) ** -2
    same = np.allclose(means, np.linspace(low, 1.0, num), atol=1e-6)
    if not (same and np.allclose(weights.take("rbf.betas"), steepness, rtol=1e-5)):
        raise WeightsError(f"rbf.means and rbf.betas are not those of a cutoff of {cutoff} Å")


def _linear(weights: TorchWeights, name: str, inputs: Sequence[int], outputs: Sequence[int]):
    """Return the kernels of each degree, and the bias of the scalars if there is one."""
    shapes = {l: (a, b) for l, (a, b) in enumerate(zip(inputs, outputs)) if a and b}
    flat = weights.take(f"{name}.tp.weight", sum(a * b for a, b in shapes.values())).reshape(-1)
    params, start = {}, 0
    for l, shape in shapes.items():
        size = shape[0] * shape[1]
        params[f"kernel_{l}"] = flat[start : start + size].reshape(shape)
        start += size
    if f"{name}.bias.0" in weights:
        params["bias"] = weights.take(f"{name}.bias.0", outputs[0])
    return params


def _norm(weights: TorchWeights, name: str, widths: Sequence[int]) -> dict[str, np.ndarray]:
    """Return scales of each degree and the bias of the scalars."""
    scales = np.split(weights.take(f"{name}.affine_weight", sum(widths)), np.cumsum(widths)[:-1])
    params = {f"scale_{l}": values for l, values in enumerate(scales)}
    return params | {"bias": weights.take(f"{name}.affine_bias", widths[0])}


def _radial(weights: TorchWeights, name: str, order: np.ndarray) -> dict[str, Any]:
    """Return the parameters of a network of the radial functions."""
    params: dict[str, Any] = {}
    for n, layer in enumerate((0, 3)):
        params[f"layer_{n}"] = {
            "kernel": weights.take(f"{name}.net.{layer}.weight").T,
            "bias": weights.take(f"{name}.net.{layer}.bias"),
        }
        params[f"norm_{n}"] = {
            "scale": weights.take(f"{name}.net.{layer + 1}.weight"),
            "bias": weights.take(f"{name}.net.{layer + 1}.bias"),
        }
    kernel, bias = weights.take(f"{name}.net.6.weight"), weights.take(f"{name}.offset", len(order))
    return params | {"kernel": kernel[order].T, "bias": bias[order]}


def _attention(weights: TorchWeights, name: str, options, inputs, outputs) -> dict[str, Any]:
    """Return the parameters of an attention layer.

    The force head has no scalars in its output, so what leads only to them is left out.
    """
    widths, heads, max_degree = options["num_features"], options["num_heads"], options["max_degree"]
    head = options["head_features"]
    first = couplings(len(widths), max_degree, range(len(widths)))
    channels = [_num_channels(first, widths, l) for l in range(len(widths))]
    # the published network multiplies values to all degrees of the heads
    second = couplings(len(widths), max_degree, range(len(head)))
    value_channels = [_num_channels(second, widths, l) for l in range(len(head))]
    value_widths = [heads * width for width in head]
    values = _linear(weights, f"{name}.sep_value.lin", value_channels, value_widths)
    wanted = [l for l in range(len(head)) if l < len(outputs) and outputs[l]]
    order = _order(second, widths)
    kept = [order[k] for c, part in _split(second, widths) if c.target in wanted for k in part]
    names = {f"kernel_{l}" for l in wanted} | ({"bias"} if 0 in wanted else set())
    return {
        "merge_source": _linear(weights, f"{name}.merge_src", inputs, widths),
        "merge_target": _linear(weights, f"{name}.merge_dst", inputs, widths),
        "radial": _radial(weights, f"{name}.sep_act.dtp_rad", _order(first, widths)),
        "attention": _linear(weights, f"{name}.sep_alpha", channels[:1], [heads * head[0]]),
        "attention_vector": weights.take(f"{name}.alpha_dot").reshape(heads, head[0]),
        "hidden": _linear(weights, f"{name}.sep_act.lin", channels, gate_inputs(widths)),
        "value_weights": weights.take(f"{name}.sep_value.dtp.tp.weight", len(order))[kept],
        "values": {name: kernel for name, kernel in values.items() if name in names},
        "project": _linear(weights, f"{name}.proj", value_widths, outputs),
    }


def _energy(weights: TorchWeights, width: int, avg_num_atoms: float) -> dict[str, Any]:
    """Return the energy head; its last layer includes the factors of activation and energy."""
    norm = 1.0 / sqrt(avg_num_atoms)
    kernel = weights.take("head.2.tp.weight").reshape(-1, 1).astype(np.float64)
    return {
        "hidden": {
            "kernel": weights.take("head.0.tp.weight").reshape(width, -1),
            "bias": weights.take("head.0.bias.0"),
        },
        "final": {
            "kernel": kernel * (NORMALIZATION["silu"] * norm),
            "bias": weights.take("head.2.bias.0").astype(np.float64) * norm,
        },
    }
