"""DimeNet++ of PyTorch Geometric 2.8.1 and of DIG, from saved weights.

The state dict determines the implementation, the widths and the depth; it does not contain the
cutoff. Both implementations sum the outputs of all atoms, so a model that was trained on energies
is a force field (`energy_unit`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax import models
from mlip_jax.importers.formats import state_files
from mlip_jax.importers.formats.torch_weights import TorchWeights, element_numbers
from mlip_jax.importers.formats.weights import WeightsError, check_shapes
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER
from mlip_jax.potential import Potential

_ARCHITECTURE = "DimeNet++ of PyTorch Geometric or DIG"


def load(
    path: str | Path,
    *,
    cutoff: float = 5.0,
    envelope_exponent: int = 5,
    energy_unit: float = 1.0,
    elements: Sequence[int | str] | None = None,
) -> Potential:
    """Load a force field from a file with the state dict of a DimeNet++.

    Args:
      path: File with the state dict, see importers/formats/state_files.py.
      cutoff: Cutoff radius of the training (Å); the default is that of both implementations.
      envelope_exponent: Exponent of the envelope of the training; the default is that of both.
      energy_unit: Energy per unit of the network's output (eV).
      elements: Symbols or atomic numbers that the model was trained on; others are rejected later.
        None for all elements in its table.

    Raises:
      FileNotFoundError, WeightsError: See `state_files.read` and `convert`.
      ValueError: An element has no weights.
    """
    weights = state_files.read(path)
    try:
        options, params, rows = convert(weights)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    options |= {"cutoff": float(cutoff), "envelope_exponent": int(envelope_exponent)}
    model = models.create("dimenetpp", **options)
    check_shapes(model, params)
    known = element_numbers(elements, rows, path)
    metadata = {
        "source": "DimeNet++",
        "file": Path(path).name,
        "config": {"model": {"name": "dimenetpp", "options": options}},
        "statistics": {"cutoff": options["cutoff"], "elements": list(known)},
    }
    reference = np.zeros(MAX_ATOMIC_NUMBER + 1)
    return Potential(model, params, options["cutoff"], reference, energy_unit, known, metadata)


def convert(
    weights: Mapping[str, np.ndarray],
) -> tuple[dict[str, Any], dict[str, Any], Sequence[int]]:
    """Convert a state dict.

    Returns:
      Options and parameters of the model, and the atomic numbers that have weights.

    Raises:
      WeightsError: Weights are missing, have an unexpected shape, or have no counterpart; the
        message lists them.
    """
    is_dig = any(name.endswith("init_e.emb.weight") for name in weights)
    state = TorchWeights(
        weights, "init_e.emb.weight" if is_dig else "emb.emb.weight", _ARCHITECTURE
    )
    first, blocks = ("init_e", "update_es") if is_dig else ("emb", "interaction_blocks")
    learned = state.take(f"{first}.emb.weight", None, None)
    frequencies = state.take("emb.dist_emb.freq" if is_dig else "rbf.freq", None)
    num_layers = state.count(blocks)
    params: dict[str, Any] = {
        "embedding": np.zeros((MAX_ATOMIC_NUMBER + 1, learned.shape[1]), learned.dtype),
        "frequencies": frequencies,
        "embedding_rbf": state.dense(f"{first}.lin_rbf_0" if is_dig else f"{first}.lin_rbf"),
        "embedding_edges": state.dense(f"{first}.lin"),
    }
    params["embedding"][: len(learned)] = learned
    counts = {
        "num_before_skip": state.count(f"{blocks}.0.layers_before_skip"),
        "num_after_skip": state.count(f"{blocks}.0.layers_after_skip"),
        "num_energy_layers": state.count("init_v.lins" if is_dig else "output_blocks.0.lins"),
    }
    for n in range(num_layers):
        params |= _interaction(state, f"{blocks}.{n}", n)
    for n in range(num_layers + 1):
        params |= _energies(state, n, is_dig)
    state.check_all_taken()
    options = counts | {
        "num_features": learned.shape[1],
        "num_layers": num_layers,
        "num_radial": len(frequencies),
        "max_degree": len(params["sbf_1_0"]) // len(frequencies) - 1,
        "num_triplet_features": params["up_0"]["kernel"].shape[0],
        "num_basis_features": params["sbf_1_0"].shape[1],
        "energy_width": params["energy_0_up"]["kernel"].shape[1],
        "angle": "bond" if is_dig else "turning",
        "energy_bias": is_dig,
        "rounded_bessel": True,
        "learned_shift": False,
    }
    return options, {"params": params}, list(range(1, len(learned)))


def _interaction(state: TorchWeights, block: str, n: int) -> dict[str, Any]:
    """Return the parameters of an interaction block."""
    params: dict[str, Any] = {"sbf_1": state.take(f"{block}.lin_sbf1.weight", None, None).T}
    for name, theirs, use_bias in (
        ("own", "lin_ji", True),
        ("neighbors", "lin_kj", True),
        ("rbf_1", "lin_rbf1", False),
        ("rbf_2", "lin_rbf2", False),
        ("sbf_2", "lin_sbf2", False),
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
    return {f"{name}_{n}": value for name, value in params.items()}


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
