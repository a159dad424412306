"""FAENet with simple messages (checked against vict0rsch/faenet), from saved weights.

The state dict determines the architecture, its widths, depth and cutoff. Features of elements are
computed once for each element, from the tables of physical properties in the state dict.

The published behavior is kept: messages do not vanish at the cutoff, and forces are derivatives at
fixed frames (models/faenet.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax import models
from mlip_jax.importers.formats.state_files import read
from mlip_jax.importers.formats.torch_weights import TorchWeights, element_numbers
from mlip_jax.importers.formats.weights import WeightsError, check_shapes
from mlip_jax.models.layers.basic import STEP
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.potential import Potential

_EMBED = "embed_block"


def load(
    path: str | Path,
    *,
    frames: str = "all",
    skip: str | None = None,
    tag: int = 0,
    energy_unit: float = 1.0,
    elements: Sequence[int | str] | None = None,
) -> Potential:
    """Load a force field from a file with the state dict of a FAENet.

    Args:
      path: .npz, .safetensors or .pt file, see importers/formats/state_files.py.
      frames: Option of models/faenet.py. FAENet's "stochastic", one random frame, has no
        counterpart.
      skip: "add" or "none" for FAENet's skip_co "add" or False. None for "concat", which is
        recognized by its weights.
      tag: Tag of all atoms, if the model has an embedding of tags: 0 for molecules.
      energy_unit: Energy per unit of the network's energies (eV).
      elements: Symbols or atomic numbers that the model was trained on; others are rejected later.
        None for all elements in its table.

    Raises:
      FileNotFoundError, WeightsError: See `state_files.read` and `convert`.
      ValueError: An argument is missing or invalid.
    """
    weights = read(path)
    try:
        options, params, rows = convert(weights, skip, tag)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    options["frames"] = frames
    model = models.create("faenet", **options)
    check_shapes(model, params)
    known = element_numbers(elements, rows, path)
    metadata = {
        "source": "FAENet",
        "file": Path(path).name,
        "config": {"model": {"name": "faenet", "options": options}},
        "statistics": {"cutoff": options["cutoff"], "elements": list(known)},
    }
    reference = np.zeros(MAX_ATOMIC_NUMBER + 1)
    return Potential(model, params, options["cutoff"], reference, energy_unit, known, metadata)


def convert(
    weights: Mapping[str, np.ndarray], skip: str | None = None, tag: int = 0
) -> tuple[dict[str, Any], dict[str, Any], Sequence[int]]:
    """Convert a state dict; for arguments see `load`.

    Returns:
      Options and parameters of the model, and the atomic numbers that have weights.

    Raises:
      WeightsError: Weights are missing, have an unexpected shape, or have no counterpart; the
        message lists them.
      ValueError: `skip` is missing or does not fit the weights.
    """
    state = TorchWeights(weights, f"{_EMBED}.emb.weight", "FAENet with simple messages")
    centers = state.take("distance_expansion.offset", None)
    cutoff = float(centers[-1])
    if not np.allclose(centers, np.linspace(0.0, cutoff, len(centers)), atol=1e-6 * cutoff):
        raise WeightsError("the Gaussians are not on an even grid from 0 to the cutoff")
    num_layers = state.count("interaction_blocks")
    options = {
        "num_layers": num_layers,
        "num_radial": len(centers),
        "cutoff": cutoff,
        "cutoff_fn": STEP,
        "element_features": "table",
        "two_layers": f"{_EMBED}.lin_e2.weight" in state,
        "two_layer_updates": "interaction_blocks.0.other_mlp.weight" in state,
        "graph_norm": "interaction_blocks.0.graph_norm.weight" in state,
        "weighted": "output_block.w_lin.weight" in state,
        "skip": _skip(state, skip),
        "learned_shift": False,
    }
    options["graph_bias"] = options["skip"] == "concat"
    table, rows = _element_features(state, options["two_layers"], tag)
    embedding = np.zeros((MAX_ATOMIC_NUMBER + 1, table.shape[1]), table.dtype)
    embedding[: len(table)] = table
    options["num_features"] = table.shape[1]
    params = {"embedding": embedding, **_network(state, options)}
    state.check_all_taken()
    return options, {"params": params}, rows


def _skip(state, skip) -> str:
    """Return the option `skip`, after checking it against the weights."""
    if "mlp_skip_co.weight" in state:
        if skip not in (None, "concat"):
            raise ValueError(f'the weights are those of skip="concat", received {skip!r}')
        return "concat"
    if skip not in ("add", "none"):
        raise ValueError(
            "the weights do not tell whether energies before each interaction are added: give "
            f'skip="add" or "none" (FAENet\'s skip_co), received {skip!r}'
        )
    return skip


def _element_features(state, two_layers, tag) -> tuple[np.ndarray, list[int]]:
    """Return the initial features of each element, (rows, F), and the numbers that have some."""
    learned = state.take(f"{_EMBED}.emb.weight", None, None)
    numbers, parts = np.arange(len(learned)), [learned]
    valid = numbers > 0
    if f"{_EMBED}.tag_embedding.weight" in state:
        tags = state.take(f"{_EMBED}.tag_embedding.weight", None, None)
        parts.append(np.repeat(tags[[tag]], len(learned), axis=0))
    if f"{_EMBED}.phys_emb.properties" in state:
        parts.append(state.take(f"{_EMBED}.phys_emb.properties", None, None)[numbers])
    if f"{_EMBED}.phys_emb.period" in state:
        for name in ("period", "group"):
            rows = state.take(f"{_EMBED}.{name}_embedding.weight", None, None)
            index = state.take(f"{_EMBED}.phys_emb.{name}", None)[numbers]
            # lanthanides are in group 19, which is beyond the end of FAENet's table
            valid &= index < len(rows)
            parts.append(rows[np.minimum(index, len(rows) - 1)])
    features = np.concatenate(parts, axis=1)
    for name in ("lin", "lin_2")[: 1 + two_layers]:
        layer = state.dense(f"{_EMBED}.{name}")
        features = features @ layer["kernel"] + layer["bias"]
        features = features / (1.0 + np.exp(-features))  # SiLU
    return features, np.flatnonzero(valid).tolist()


def _network(state, options) -> dict[str, Any]:
    """Return the parameters of edges, interactions and the energy."""
    params: dict[str, Any] = {
        "edge_vectors": state.dense(f"{_EMBED}.lin_e1"),
        "edge_distances": state.dense(f"{_EMBED}.lin_e12"),
    }
    if options["two_layers"]:
        params["edge_layer_2"] = state.dense(f"{_EMBED}.lin_e2")
    for n in range(options["num_layers"]):
        block = f"interaction_blocks.{n}"
        if options["graph_norm"]:
            params[f"norm_{n}"] = state.norm(f"{block}.graph_norm") | {
                "mean_scale": state.take(f"{block}.graph_norm.mean_scale", None)
            }
        params[f"update_{n}_layer_1"] = state.dense(f"{block}.lin_h")
        if options["two_layer_updates"]:
            params[f"update_{n}_layer_2"] = state.dense(f"{block}.other_mlp")
    head = {"hidden": state.dense("output_block.lin1"), "final": state.dense("output_block.lin2")}
    if options["weighted"]:
        head["weight"] = state.dense("output_block.w_lin")
    params["energy"] = head
    if options["skip"] == "concat":
        params["skip_weights"] = state.take("mlp_skip_co.weight", 1, options["num_layers"] + 1)[0]
        params["graph_bias"] = state.take("mlp_skip_co.bias", 1)[0]
    return params
