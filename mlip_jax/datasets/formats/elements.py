"""Validation of atomic numbers in data files."""

from __future__ import annotations

import numpy as np

from mlip_jax.datasets.reader import DatasetError

HEAVIEST = 118


def validate_numbers(values: np.ndarray, source: str) -> np.ndarray:
    """Return atomic numbers as int32, shape (n,), after checking them.

    Raises:
      DatasetError: The values are not a list of integers from 1 to 118. The message contains
        `source`.
    """
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype.kind not in "iuf":
        raise DatasetError(
            f"{source}: atomic numbers have shape {values.shape} and type {values.dtype}, expected "
            "a list of numbers, (n,)"
        )
    if len(values) and not (values.min() >= 1 and values.max() <= HEAVIEST):  # also false for NaN
        wrong = values[~((values >= 1) & (values <= HEAVIEST))]
        raise DatasetError(
            f"{source}: {wrong[0]:g} is not an atomic number; expected 1 to {HEAVIEST}. Remove "
            "dummy atoms from the file."
        )
    numbers = values.astype(np.int32)
    if values.dtype.kind == "f" and not np.array_equal(numbers, values):
        raise DatasetError(
            f"{source}: {values[numbers != values][0]:g} is not an atomic number; expected integers"
        )
    return numbers
