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

from mlip_jax.importers.formats.directional import ConvertedNetwork, convert_network, load_potential
from mlip_jax.importers.formats.torch_weights import TorchWeights
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
    further = {"cutoff": float(cutoff), "envelope_exponent": int(envelope_exponent)}
    return load_potential(path, "dimenetpp", "DimeNet++", convert, further, energy_unit, elements)


def convert(weights: Mapping[str, np.ndarray]) -> ConvertedNetwork:
    """Convert a state dict.

    Raises:
      WeightsError: Weights are missing, have an unexpected shape, or have no counterpart; the
        message lists them.
    """
    is_dig = any(name.endswith("init_e.emb.weight") for name in weights)
    marker = "init_e.emb.weight" if is_dig else "emb.emb.weight"
    state = TorchWeights(weights, marker, _ARCHITECTURE)
    options, params, rows = convert_network(state, is_dig, _triplets)
    return ConvertedNetwork({**options, "angle": "bond" if is_dig else "turning"}, params, rows)


def _triplets(state: TorchWeights, block: str) -> dict[str, Any]:
    return {
        "sbf_1": state.take(f"{block}.lin_sbf1.weight", None, None).T,
        "sbf_2": state.dense(f"{block}.lin_sbf2", use_bias=False),
    }
