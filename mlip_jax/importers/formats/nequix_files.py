"""Files of Nequix (.nqx): a line of JSON with the settings, and the weights as a series of arrays.

Nequix writes them with equinox.tree_serialise_leaves, that is, each array in the format of
numpy.save, in the order of the fields of its classes. The file has no names of the arrays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from mlip_jax.files import NUMPY_ERRORS
from mlip_jax.importers.formats.weights import WeightsError

_MAX_LINE = 1 << 20
_SETTINGS = {"atomic_numbers", "hidden_irreps", "radial_basis_size"}


def is_nequix(path: str | Path) -> bool:
    """Return whether a file is one of Nequix, by its content."""
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return file.read(1) == b"{" and _settings(b"{" + file.readline(_MAX_LINE)) is not None


def read(path: str | Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Return the settings and the arrays of a file.

    Raises:
      FileNotFoundError: No such file.
      WeightsError: The file is not one of Nequix, or it is corrupted.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a file of Nequix (.nqx) is expected")
    with path.open("rb") as file:
        settings = _settings(file.readline(_MAX_LINE))
        if settings is None:
            raise WeightsError(f"{path}: not a file of Nequix, whose first line has its settings")
        start = file.tell()
        if file.read(4) == b"PK\x03\x04":
            raise WeightsError(
                f"{path}: a file of the PyTorch form of Nequix. Convert it in the environment of nequix: "
                f"nequix.calculator.from_pretrained({path.stem!r}, {str(path)!r}, 'jax', False) writes "
                f"{path.stem}.nqx"
            )
        file.seek(start)
        try:
            return settings, list(_arrays(file, path))
        except NUMPY_ERRORS as error:
            if isinstance(error, WeightsError):
                raise
            raise WeightsError(f"{path}: corrupted or truncated file of Nequix: {error}") from error


def _settings(line: bytes) -> dict[str, Any] | None:
    """Return the settings of the first line; None if it has none."""
    try:
        settings = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_nequix = isinstance(settings, dict) and settings.keys() >= _SETTINGS
    return settings if is_nequix else None


def _arrays(file: IO[bytes], path: Path) -> Iterator[np.ndarray]:
    """Yield arrays up to the end of the file. An array has at most the bytes that are left."""
    size = path.stat().st_size
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    while file.tell() < size:
        version = npy.read_magic(file)
        if version not in readers:
            raise WeightsError(f"{path}: an array in version {version} of the format of NumPy")
        shape, is_fortran, dtype = readers[version](file)
        left = size - file.tell()
        if dtype.kind != "f" or is_fortran or min(shape, default=0) < 0:
            raise WeightsError(f"{path}: expected arrays of real numbers, received {dtype}")
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > left:
            raise WeightsError(f"{path}: truncated: an array of {num_bytes:,} bytes, {left:,} left")
        yield np.frombuffer(file.read(num_bytes), dtype).reshape(shape)
