"""Cache of arrays that are computed from a store and saved in its folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlip_jax.workdir import atomic_open

log = logging.getLogger(__name__)


def load_or_compute(
    path: Path, dtype: type, rows: int, make: Callable[[], np.ndarray], what: str
) -> np.ndarray:
    """Load the array at `path` as a memory map, or compute it with `make` and save it there.

    If the array cannot be saved, log a warning and return it from memory. A corrupted file is
    recomputed and replaced.

    Args:
      path: File in the folder of a store. Its name must identify everything the array depends on.
      dtype: Data type of the array.
      rows: Length of the first axis of the array, (rows, ...).
      make: Function that computes the array.
      what: Plural name of the content for log messages, such as "edge counts".
    """
    kept = _read(path, dtype, rows, what)
    if kept is not None:
        return kept
    made = make()
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_open(path, shared=True) as file:
            np.save(file, made)
    except OSError as error:
        log.warning(
            "%s: the %s cannot be kept (%s) and are made anew by every run",
            path.parents[1],
            what,
            error,
        )
    return made


def _read(path: Path, dtype: type, rows: int, what: str) -> np.ndarray | None:
    """Return the array in a file, or None if the file is missing or corrupted."""
    if not path.is_file():
        return None
    try:
        kept = np.load(path, mmap_mode="r", allow_pickle=False)
        if len(kept.shape) == 0 or kept.shape[0] != rows or kept.dtype != dtype:
            raise ValueError(
                f"{kept.dtype} of shape {kept.shape}, expected {np.dtype(dtype)} of {rows} rows"
            )
        return kept
    except (OSError, ValueError, EOFError) as error:
        log.warning("%s is damaged (%s): the %s are made anew", path, error, what)
        return None
