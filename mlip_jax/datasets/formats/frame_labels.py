"""Labels of frames by name: search, conversion to numbers, and labels that are not read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from mlip_jax.datasets.formats.ase_frames import Frame
from mlip_jax.datasets.reader import DatasetError

# Entries of ASE that are not labels.
_NOT_LABELS = {"tags", "move_mask", "pbc", "unique_id", "spacegroup_kinds"}


def label_names(frames: Iterable[Frame]) -> str:
    """Format the names of all labels for a message."""
    names = {k: None for f in frames for part in (f.labels, f.arrays, f.results) for k in part}
    return ", ".join(names) or "no labels"


def unread_labels(frame: Frame, read: set[str]) -> Iterator[str]:
    """Yield the names of numeric labels of a frame that are not in `read`."""
    for part in (frame.labels, frame.arrays, frame.results):
        for name, value in part.items():
            if name in read or name in _NOT_LABELS or not _is_numeric(value):
                continue
            # ASE's calculators repeat the energy under this name.
            if name == "free_energy" and value == frame.results.get("energy"):
                continue
            yield name


def similar_to_forces(frame: Frame) -> list[str]:
    """Return the names of labels with three numbers per atom whose name indicates forces."""
    return [
        name
        for part in (frame.labels, frame.arrays, frame.results)
        for name, value in part.items()
        if ("force" in name.lower() or "grad" in name.lower())
        and np.shape(value) == (len(frame.numbers), 3)
    ]


def value_of(
    frame: Frame, key: str, source: str, equal: Callable[[Any, Any], bool] = np.array_equal
) -> Any:
    """Return the label with this name, or None. Values stored in two places must be equal."""
    values = [
        part[key]
        for part in (frame.labels, frame.arrays, frame.results)
        if part.get(key) is not None
    ]
    if len(values) > 1 and not all(equal(values[0], v) for v in values[1:]):
        raise DatasetError(
            f"{source}: {key!r} occurs twice with different values, as a label of the file and as "
            "a calculator's result. Write the correct one under another name."
        )
    return values[0] if values else None


def label_of(frame: Frame, key: str, shape: tuple[int, ...], atoms: bool, source: str):
    """Return a label as float64 of the given shape, all NaN if the frame lacks it."""
    value = value_of(frame, key, source) if key else None
    if value is None:
        return np.full(shape, np.nan)
    value = numbers_of(value, key, source)
    if not shape and value.size == 1:
        value = value.reshape(())
    if value.shape != shape:
        raise DatasetError(
            f"{source}: {key!r} has shape {value.shape}, expected {shape}"
            + (f" for {len(frame.numbers)} atoms" if atoms else "")
        )
    return value


def numbers_of(value: Any, key: str, source: str) -> np.ndarray:
    """Convert a label to float64. Raise DatasetError if it is not numeric."""
    try:
        return np.array(value, np.float64)
    except (TypeError, ValueError) as error:
        raise DatasetError(f"{source}: {key!r} is not numeric ({error})") from error


def plain(value: np.ndarray) -> float | np.ndarray:
    """Return a scalar as float and other arrays unchanged."""
    return value if value.shape else float(value)


def text_of(frame: Frame, key: str) -> str:
    """Return a label as text, "" if the frame lacks it or it is not a text or number."""
    value = frame.labels.get(key, frame.arrays.get(key)) if key else None
    return "" if value is None or isinstance(value, (bool, dict, list, np.ndarray)) else str(value)


def _is_numeric(value: Any) -> bool:
    """Return whether a label is a number or an array of numbers."""
    try:
        return np.asarray(value).dtype.kind in "iuf" and np.size(value) > 0
    except ValueError:  # a list of lists of different lengths
        return False
