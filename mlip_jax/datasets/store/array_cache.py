"""Arrays that are computed once of a store and kept in its folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlip_jax.workdir import atomic_open

log = logging.getLogger(__name__)


def array_beside(path: Path, dtype: type, rows: int, make: Callable[[], np.ndarray], what: str) -> np.ndarray:
    """The array that is kept at `path`, memory-mapped, or what `make` gives, which is kept there then.

    Where it cannot be written it is held in memory, with a warning; a file that is damaged is made anew.

    Args:
      path: In the folder of a store; the name must tell all that the array depends on.
      dtype, rows: Of the array, (rows, ...).
      what: That is kept, for messages: "edge counts".
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
        log.warning("%s: the %s cannot be kept (%s) and are made anew by every run", path.parents[1], what, error)
    return made


def _read(path: Path, dtype: type, rows: int, what: str) -> np.ndarray | None:
    """What a file holds; None where there is none, or a damaged one."""
    if not path.is_file():
        return None
    try:
        kept = np.load(path, mmap_mode="r", allow_pickle=False)
        if len(kept.shape) == 0 or kept.shape[0] != rows or kept.dtype != dtype:
            raise ValueError(f"{kept.dtype} of shape {kept.shape}, expected {np.dtype(dtype)} of {rows} rows")
        return kept
    except (OSError, ValueError, EOFError) as error:
        log.warning("%s is damaged (%s): the %s are made anew", path, error, what)
        return None
