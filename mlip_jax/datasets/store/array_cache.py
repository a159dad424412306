"""Cache of arrays that are computed from a store and saved in its folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlip_jax.files import NUMPY_ERRORS, make_subfolder
from mlip_jax.workdir import atomic_open

log = logging.getLogger(__name__)


def load_or_compute(
    path: Path, dtype: type, rows: int, compute: Callable[[], np.ndarray], content: str
) -> np.ndarray:
    """Load the array at `path` as a memory map, or compute it with `compute` and save it there.

    If the array cannot be saved, log a warning and return it from memory. A corrupted file is
    recomputed and replaced.

    Args:
      path: File in the folder of a store. Its name must identify everything the array depends on.
      dtype: Data type of the array.
      rows: Length of the first axis of the array, (rows, ...).
      compute: Function that computes the array.
      content: Plural name of the content for log messages, such as "edge counts".
    """
    stored = _read(path, dtype, rows, content)
    if stored is not None:
        return stored
    values = compute()
    try:
        make_subfolder(path.parent)
        with atomic_open(path, shared=True) as file:
            np.save(file, values)
    except OSError as error:
        log.warning(
            "%s: cannot save the %s (%s); every run recomputes them",
            path.parents[1],
            content,
            error,
        )
    return values


def _read(path: Path, dtype: type, rows: int, content: str) -> np.ndarray | None:
    """Return the array in a file, or None if the file is missing or corrupted."""
    if not path.is_file():
        return None
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        if len(values.shape) == 0 or values.shape[0] != rows or values.dtype != dtype:
            raise ValueError(
                f"{values.dtype} of shape {values.shape}, expected {np.dtype(dtype)} of {rows} rows"
            )
        return values
    except NUMPY_ERRORS as error:
        log.warning("%s is corrupted (%s); recomputing the %s", path, error, content)
        return None
