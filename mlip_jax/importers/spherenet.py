"""SphereNet of DIG, from saved weights.

The state dict determines the widths and the depth; it does not contain the cutoff. The outputs of
all atoms are summed, so a model that was trained on energies is a force field (`energy_unit`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.importers.formats.directional import ConvertedNetwork, convert_network, load_potential
from mlip_jax.importers.formats.torch_weights import TorchWeights
from mlip_jax.potential import Potential


def load(
    path: str | Path,
    *,
    cutoff: float = 5.0,
    envelope_exponent: int = 5,
    energy_unit: float = 1.0,
    elements: Sequence[int | str] | None = None,
) -> Potential:
    """Load a force field from a file with the state dict of a SphereNet.

    Args:
      path: File with the state dict, see importers/formats/state_files.py.
      cutoff: Cutoff radius of the training (Å); the default is that of DIG.
      envelope_exponent: Exponent of the envelope of the training; the default is that of DIG.
      energy_unit: Energy per unit of the network's output (eV).
      elements: Symbols or atomic numbers that the model was trained on; others are rejected later.
        None for all elements in its table.

    Raises:
      FileNotFoundError, WeightsError: See `state_files.read` and `convert`.
      ValueError: An element has no weights.
    """
    further = {"cutoff": float(cutoff), "envelope_exponent": int(envelope_exponent)}
    return load_potential(path, "spherenet", "SphereNet", convert, further, energy_unit, elements)


def convert(weights: Mapping[str, np.ndarray]) -> ConvertedNetwork:
    """Convert a state dict.

    Raises:
      WeightsError: Weights are missing, have an unexpected shape, or have no counterpart; the
        message lists them.
    """
    state = TorchWeights(weights, "init_e.emb.weight", "SphereNet of DIG")
    return convert_network(state, True, _triplets)


def _triplets(state: TorchWeights, block: str) -> dict[str, Any]:
    """Return the parameters of the sums over triplets of a block."""
    theirs = {
        "sbf_1": "lin_sbf1",
        "sbf_2": "lin_sbf2",
        "torsion_1": "lin_t1",
        "torsion_2": "lin_t2",
    }
    return {
        name: state.take(f"{block}.{weight}.weight", None, None).T
        for name, weight in theirs.items()
    }
