"""State dicts of DimeNet++ and of models that share its network, such as SphereNet.

A state dict determines the implementation, the widths and the depth. It does not contain the
cutoff.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlip_jax import models
from mlip_jax.importers.formats import state_files
from mlip_jax.importers.formats.torch_weights import TorchWeights, element_numbers
from mlip_jax.importers.formats.weights import WeightsError, check_shapes
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.potential import Potential


class ConvertedNetwork(NamedTuple):
    """ConvertedNetwork state dict.

    Attributes:
      options: Options of the model.
      params: Parameters of the model.
      rows: Atomic numbers that have weights.
    """

    options: dict[str, Any]
    params: dict[str, Any]
    rows: Sequence[int]


def load_potential(
    path: str | Path,
    name: str,
    source: str,
    convert: Callable[[Mapping[str, np.ndarray]], ConvertedNetwork],
    further: Mapping[str, Any],
    energy_unit: float,
    elements: Sequence[int | str] | None,
) -> Potential:
    """Load a force field whose outputs are summed over the atoms.

    Args:
      path: File with the state dict, see importers/formats/state_files.py.
      name: Name of the model.
      source: Name of the architecture.
      convert: Conversion of the state dict.
      further: Options of the model that the state dict does not contain.
      energy_unit: Energy per unit of the network's output (eV).
      elements: Symbols or atomic numbers that the model was trained on, or None for all with
        weights.

    Raises:
      FileNotFoundError, WeightsError: See `state_files.read` and `convert`.
      ValueError: An element has no weights.
    """
    weights = state_files.read(path)
    try:
        options, params, rows = convert(weights)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    options = {**options, **further}
    model = models.create(name, **options)
    check_shapes(model, params)
    known = element_numbers(elements, rows, path)
    metadata = {
        "source": source,
        "file": Path(path).name,
        "config": {"model": {"name": name, "options": options}},
        "statistics": {"cutoff": options["cutoff"], "elements": list(known)},
    }
    reference = np.zeros(MAX_ATOMIC_NUMBER + 1)
    return Potential(model, params, options["cutoff"], reference, energy_unit, known, metadata)


def embedding_table(learned: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Return a table with a row for each element, and the atomic numbers that have weights.

    Args:
      learned: Rows by atomic number, from 0.
    """
    table = np.zeros((MAX_ATOMIC_NUMBER + 1, learned.shape[1]), learned.dtype)
    table[: len(learned)] = learned
    return table, list(range(1, len(learned)))


def convert_network(
    state: TorchWeights, is_dig: bool, triplets: Callable[[TorchWeights, str], dict[str, Any]]
) -> ConvertedNetwork:
    """Convert the weights of all blocks.

    Args:
      state: State dict.
      is_dig: Whether the names are those of DIG, else of PyTorch Geometric.
      triplets: Function that converts the weights of the sums over triplets of a block, by the name
        of the block.

    Raises:
      WeightsError: Weights are missing, have an unexpected shape, or have no counterpart; the
        message lists them.
    """
    first, blocks = ("init_e", "update_es") if is_dig else ("emb", "interaction_blocks")
    table, rows = embedding_table(state.take(f"{first}.emb.weight", None, None))
    frequencies = state.take("emb.dist_emb.freq" if is_dig else "rbf.freq", None)
    num_layers = state.count(blocks)
    params: dict[str, Any] = {
        "embedding": table,
        "frequencies": frequencies,
        "embedding_rbf": state.dense(f"{first}.lin_rbf_0" if is_dig else f"{first}.lin_rbf"),
        "embedding_edges": state.dense(f"{first}.lin"),
    }
    counts = {
        "num_before_skip": state.count(f"{blocks}.0.layers_before_skip"),
        "num_after_skip": state.count(f"{blocks}.0.layers_after_skip"),
        "num_energy_layers": state.count("init_v.lins" if is_dig else "output_blocks.0.lins"),
    }
    for n in range(num_layers):
        block = f"{blocks}.{n}"
        converted = triplets(state, block) | _interaction(state, block)
        params |= {f"{name}_{n}": value for name, value in converted.items()}
    for n in range(num_layers + 1):
        params |= _energies(state, n, is_dig)
    state.check_all_taken()
    options = counts | {
        "num_features": table.shape[1],
        "num_layers": num_layers,
        "num_radial": len(frequencies),
        "max_degree": len(params["sbf_1_0"]) // len(frequencies) - 1,
        "num_triplet_features": params["up_0"]["kernel"].shape[0],
        "num_basis_features": params["sbf_1_0"].shape[1],
        "energy_width": params["energy_0_up"]["kernel"].shape[1],
        "energy_bias": is_dig,
        "rounded_bessel": True,
        "learned_shift": False,
    }
    return ConvertedNetwork(options, {"params": params}, rows)


def _interaction(state: TorchWeights, block: str) -> dict[str, Any]:
    """Return the parameters of an interaction block, except those of the sums over triplets."""
    params: dict[str, Any] = {}
    for name, theirs, use_bias in (
        ("own", "lin_ji", True),
        ("neighbors", "lin_kj", True),
        ("rbf_1", "lin_rbf1", False),
        ("rbf_2", "lin_rbf2", False),
        ("down", "lin_down", False),
        ("up", "lin_up", False),
        ("skip", "lin", True),
    ):
        params[name] = state.dense(f"{block}.{theirs}", use_bias)
    for side in ("before", "after"):
        for k in range(state.count(f"{block}.layers_{side}_skip")):
            for layer in (1, 2):
                weights = state.dense(f"{block}.layers_{side}_skip.{k}.lin{layer}")
                params[f"{side}_{k}_layer_{layer}"] = weights
    return params


def _energies(state: TorchWeights, n: int, is_dig: bool) -> dict[str, Any]:
    """Return the parameters of an energy block."""
    if not is_dig:
        block = f"output_blocks.{n}"
        rbf = f"{block}.lin_rbf"
    else:
        block = "init_v" if n == 0 else f"update_vs.{n - 1}"
        rbf = "init_e.lin_rbf_1" if n == 0 else f"update_es.{n - 1}.lin_rbf"
    params = {
        "rbf": state.dense(rbf, use_bias=False),
        "up": state.dense(f"{block}.lin_up", use_bias=is_dig),
        "final": state.dense(f"{block}.lin", use_bias=False),
    }
    for k in range(state.count(f"{block}.lins")):
        params[f"layer_{k}"] = state.dense(f"{block}.lins.{k}")
    return {f"energy_{n}_{name}": value for name, value in params.items()}
