"""Structures with their labels in one npz file, exact to the last bit."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from mlip_jax.checkpoint import CheckpointError
from mlip_jax.datasets.columns import Columns
from mlip_jax.files import NUMPY_ERRORS, atomic_open
from mlip_jax.foreign_files.archives import open_npz

_TEXTS = ("molecule", "smiles", "subset", "source")
_NUMBERS = ("numbers", "positions", "forces", "offsets", "energy", "charge", "conformer", "record")
_OPTIONAL = ("cell", "pbc", "spin")


def save_columns(path: Path, columns: Columns) -> None:
    """Write structures atomically. Properties are not stored."""
    arrays = {name: getattr(columns, name) for name in (*_NUMBERS, *_OPTIONAL)}
    arrays = {name: values for name, values in arrays.items() if values is not None}
    arrays |= {name: np.array(getattr(columns, name), str) for name in _TEXTS}
    with atomic_open(path) as file:
        np.savez_compressed(file, **arrays)


def load_columns(path: Path) -> Columns:
    """Read structures that `save_columns` has written.

    Raises:
      CheckpointError: The file is corrupted.
    """
    try:
        with open_npz(path) as stored:
            return Columns(
                **{name: stored[name] for name in _NUMBERS},
                **{name: stored[name].astype(object) for name in _TEXTS},
                **{name: stored[name] for name in _OPTIONAL if name in stored},
            )
    except (*NUMPY_ERRORS, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path}: corrupted ({error}). Remove it; the next run creates it again."
        ) from error
