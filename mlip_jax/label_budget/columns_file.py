"""Structures with their labels in one npz file, exact to the last bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from mlip_jax.checkpoint import CheckpointError
from mlip_jax.datasets.columns import Columns
from mlip_jax.files import NUMPY_ERRORS, atomic_open
from mlip_jax.foreign_files.archives import open_npz, read_array

_TEXTS = ("molecule", "smiles", "subset", "source")
# Kind and shape of a row of each column; columns of atoms have offsets[-1] rows.
_OF_ATOMS = {"numbers": ("iu", ()), "positions": ("f", (3,)), "forces": ("f", (3,))}
_OF_STRUCTURES = {
    **{name: ("f", ()) for name in ("energy", "charge")},
    **{name: ("iu", ()) for name in ("conformer", "record")},
}
_OPTIONAL = {"cell": ("f", (3, 3)), "pbc": ("b", (3,)), "spin": ("f", ())}


def save_columns(path: Path, columns: Columns) -> None:
    """Write structures atomically. Properties are not stored.

    Texts are stored as bytes: NumPy pads each text of an array to the length of the longest one.
    The file is not compressed, because `open_npz` rejects what expands too much.
    """
    names = ("offsets", *_OF_ATOMS, *_OF_STRUCTURES, *_OPTIONAL)
    arrays = {name: getattr(columns, name) for name in names}
    arrays = {name: values for name, values in arrays.items() if values is not None}
    for name in _TEXTS:
        texts, arrays[f"{name}_code"] = np.unique(getattr(columns, name), return_inverse=True)
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        arrays[f"{name}_ends"] = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        arrays[f"{name}_bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
    with atomic_open(path) as file:
        np.savez(file, **arrays)


def load_columns(path: Path) -> Columns:
    """Read structures that `save_columns` has written.

    Raises:
      CheckpointError: The file is corrupted.
    """
    try:
        with open_npz(path) as stored:
            return _columns(stored)
    except NUMPY_ERRORS as error:
        raise CheckpointError(
            f"{path}: corrupted ({error}). Remove it; the next run creates it again."
        ) from error


def _columns(stored: np.lib.npyio.NpzFile) -> Columns:
    """Return the structures of a file. Raise ValueError or KeyError if they are not complete."""
    offsets = read_array(stored, "offsets", "iu", None)
    if not len(offsets) or offsets[0] or (np.diff(offsets) < 0).any():
        raise ValueError("offsets must be increasing numbers from 0")
    atoms, structures = int(offsets[-1]), len(offsets) - 1
    kinds = _OF_STRUCTURES | {name: kind for name, kind in _OPTIONAL.items() if name in stored}
    return Columns(
        offsets=offsets,
        **{name: read_array(stored, name, k, atoms, *row) for name, (k, row) in _OF_ATOMS.items()},
        **{name: read_array(stored, name, k, structures, *row) for name, (k, row) in kinds.items()},
        **{name: _texts(stored, name, structures) for name in _TEXTS},
    )


def _texts(stored: np.lib.npyio.NpzFile, name: str, structures: int) -> np.ndarray:
    """Return a column of texts, (S,) object."""
    if name in stored:  # of earlier versions
        return read_array(stored, name, "U", structures).astype(object)
    content = read_array(stored, f"{name}_bytes", "u", None).tobytes()
    ends = read_array(stored, f"{name}_ends", "i", None).tolist()
    texts = [
        content[start:end].decode("utf-8", "surrogatepass")
        for start, end in itertools.pairwise([0, *ends])
    ]
    codes = read_array(stored, f"{name}_code", "i", structures)
    if len(codes) and not 0 <= codes.min() <= codes.max() < len(texts):
        raise ValueError(f"{name}: numbers of texts from {codes.min()} to {codes.max()}")
    return np.array(texts, object)[codes]
