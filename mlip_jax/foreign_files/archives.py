"""Arrays in npz files of other people, whose zeros can expand by a factor of 1000."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from mlip_jax import limits
from mlip_jax.foreign_files.texts import open_regular


@contextlib.contextmanager
def open_npz(path: str | Path) -> Iterator[np.lib.npyio.NpzFile]:
    """Open an npz file without Python objects.

    Raises:
      OSError: The file cannot be read, or is a pipe or a device.
      ValueError: It is another kind of file, or expands to far more bytes than it has.
      Exception: The other exceptions in `files.NUMPY_ERRORS`, if it is corrupted.
    """
    with open_regular(path) as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("expected an npz file, found one array")
        with archive:
            size = sum(member.file_size for member in archive.zip.infolist())
            limits.check_expansion(size, os.fstat(file.fileno()).st_size, path, ValueError)
            yield archive


def read_array(
    archive: Mapping[str, np.ndarray], name: str, kinds: str, *shape: int | None
) -> np.ndarray:
    """Return an array of an npz file.

    Args:
      archive: File.
      name: Name of the array.
      kinds: Allowed kinds of values, "f" for floating-point numbers and so on; see
        `numpy.dtype.kind`.
      *shape: Shape; None for any size.

    Raises:
      ValueError: The array has another type or shape.
      KeyError: There is no such array.
    """
    array = archive[name]
    fits = len(array.shape) == len(shape) and all(
        n in (None, m) for n, m in zip(shape, array.shape)
    )
    if array.dtype.kind not in kinds or not fits:
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(
            f"{name}: expected an array of shape ({expected}) and kind {kinds}, received "
            f"{array.dtype} of shape {array.shape}"
        )
    return array
