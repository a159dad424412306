"""Arrays in npz files of other people, whose zeros can expand by a factor of 1000."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
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
