"""Errors of structures with elements that the training split lacks, separate from all others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from mlip_jax.datasets.unseen_elements import UnseenElements
from mlip_jax.reports import errors
from mlip_jax.reports import html_page as page
from mlip_jax.reports.predictions import Predictions

KEY = "unseen_elements"  # in metrics.json
_ERRORS = ("energy_mae_mev_per_atom", "force_mae_mev_per_ang")


@dataclasses.dataclass(frozen=True)
class UnseenStructures:
    """Structures of a split with elements that the training split lacks.

    Attributes:
      numbers: Numbers of structures.
      predictions: Labels and predictions of the structures, or of a sample. None if the model
        rejects their elements.
    """

    numbers: UnseenElements
    predictions: Predictions | None = None


def metrics(unseen: Mapping[str, UnseenStructures]) -> dict[str, Any]:
    """Return the numbers of structures and their errors by split, for metrics.json."""
    result = {}
    for name, structures in unseen.items():
        result[name] = structures.numbers.to_json()
        if structures.predictions is not None:
            summary = errors.summary(structures.predictions)
            result[name] |= {key: summary[key] for key in _ERRORS}
            result[name]["num_structures_predicted"] = summary["num_structures"]
    return result


def section(values: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield a note and a table of these structures; nothing if there are none.

    Args:
      values: Result of `metrics`.
    """
    if not values:
        return
    yield page.heading("Elements that the training split lacks")
    yield page.callout(
        "Some structures contain elements that the training split lacks, so the model cannot "
        "describe them. They are excluded from the validation loss, which selects the best "
        "checkpoint, and from all other errors on this page. Calculators and predictors reject "
        "these elements. Use another split, or add training structures with these elements."
    )
    header = ("split", "structures", "structures of the split", "elements (structures)")
    has_errors = any(_ERRORS[0] in v for v in values.values())
    if has_errors:
        header += ("energy MAE (meV/atom)", "force MAE (meV/Å)")
    rows = [
        (
            name,
            v["num_structures"],
            v["num_structures_of_split"],
            ", ".join(f"{symbol}: {n:,}" for symbol, n in v["elements"].items()),
            *((v.get(key) for key in _ERRORS) if has_errors else ()),
        )
        for name, v in values.items()
    ]
    yield page.table(header, rows)
