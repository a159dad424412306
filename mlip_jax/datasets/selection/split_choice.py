"""Choice of the method of a split by the data: by molecule, or by structure."""

from __future__ import annotations

import logging

import numpy as np

from mlip_jax.datasets.identity import group
from mlip_jax.wording import count_of

log = logging.getLogger(__name__)

MIN_MOLECULES = 10  # of a split by molecule that "auto" chooses
MAX_SHARE = 0.5  # of the structures that belong to one molecule of such a split


def choose(molecule: np.ndarray) -> str:
    """Return the method that "auto" stands for, "molecule" or "random", and log it.

    Args:
      molecule: Molecule of each structure, (S,).
    """
    unit_of, num_units = group(np.asarray(molecule))
    largest = np.bincount(unit_of).max(initial=0) / max(len(unit_of), 1)
    if num_units >= MIN_MOLECULES and largest <= MAX_SHARE:
        log.info(
            "split by molecule: %s, none of them in two splits", count_of(num_units, "molecule")
        )
        return "molecule"
    log.warning(
        "split by structure: %s of %s are too few molecules for a split by "
        "molecule (data.split=molecule), so the test error is that of new geometries of known "
        "molecules. Neighboring frames of a trajectory are nearly equal, so their test error is "
        "too low.",
        count_of(len(unit_of), "structure"),
        count_of(num_units, "molecule"),
    )
    return "random"
