"""State dicts in files of any format: .npz, .safetensors, or of torch.save (.pt, .pth, .ckpt)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.importers.formats import torch_file
from mlip_jax.importers.formats import weights as weight_files
from mlip_jax.importers.formats.torch_records import entries_of, is_module, state_dict
from mlip_jax.importers.formats.weights import WeightsError

_ENTRIES = ("state_dict", "model_state_dict", "model", "params", "net")


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Return the state dict in a file.

    In a file of torch.save it is the content, the entry "state_dict", "model_state_dict", "model",
    "params" or "net" of a checkpoint, or that of a pickled module. No code in the file is run.

    Raises:
      FileNotFoundError, WeightsError: No such file, or no state dict in it.
    """
    if Path(path).suffix in (".npz", ".safetensors"):
        return weight_files.read(path)
    content = torch_file.read(path)
    state = find(content)
    if not state:
        raise WeightsError(
            f"{path}: no state dict in this file of PyTorch, {torch_file.describe(content)}"
        )
    return state


def find(content: Any) -> dict[str, np.ndarray]:
    """Return the state dict in the content of a file of torch.save; empty if there is none."""
    entries = entries_of(content)
    candidates = [content, *(entries[name] for name in _ENTRIES if name in entries)]
    for candidate in candidates:
        if is_module(candidate):
            return state_dict(candidate)
        arrays = _arrays(entries_of(candidate))
        if arrays:
            return arrays
    return {}


def _arrays(entries: Mapping) -> dict[str, np.ndarray]:
    """Return the arrays of real numbers with names."""
    return {
        name: value
        for name, value in entries.items()
        if isinstance(name, str) and isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    }
