"""Warnings about structures that the filters of a run exclude."""

from __future__ import annotations

import logging
from collections.abc import Collection

import numpy as np
from ase.data import chemical_symbols

from mlip_jax.datasets.quality.filters import CODES, count_reasons
from mlip_jax.datasets.store.store import Store

log = logging.getLogger(__name__)

# Config field of the filter that excludes structures for a reason.
_FIELD_OF_REASON = {
    "charge": "data.charge",
    "elements": "data.elements",
    "too few atoms": "data.min_atoms",
    "too many atoms": "data.max_atoms",
    "force too large": "data.max_force",
    "atoms too close": "data.min_distance",
}


def warn_of_filters(store: Store, reasons: np.ndarray, elements: Collection[str] = ()) -> None:
    """Warn of each filter that excludes structures: their share, and how to keep them.

    Args:
      store: Store with the structures.
      reasons: Result of `select`.
      elements: Symbols of the elements that are kept; empty if all are.
    """
    for reason, count in count_reasons(reasons).items():
        field = _FIELD_OF_REASON.get(reason)
        if field is None:
            continue
        excluded = np.flatnonzero(reasons == CODES[reason])
        log.warning(
            "%.3g %% of the structures (%d) are not used because of %s%s. To keep them: "
            "--config.%s=None",
            100 * count / len(store),
            count,
            field,
            _values_of(store, excluded, reason, elements),
            field,
        )


def _values_of(store: Store, excluded: np.ndarray, reason: str, elements: Collection[str]) -> str:
    """Return the charges of excluded structures, or their elements that are not kept, as text."""
    if reason not in ("charge", "elements"):
        return ""
    values: set[float] = set()
    for _, columns in store.chunks(excluded, labels_only=True):
        values.update(np.unique(columns.charge if reason == "charge" else columns.numbers).tolist())
    if reason == "charge":
        return f" (charges {', '.join(f'{q:+g}' for q in sorted(values)[:6])})"
    symbols = (chemical_symbols[int(z)] for z in sorted(values))
    return f" (with {', '.join(symbol for symbol in symbols if symbol not in elements)})"
