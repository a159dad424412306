"""Coverage of prediction intervals on labeled structures: metrics and a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlip_jax.datasets.property_data import Target
from mlip_jax.reports import html_page as page

KEY = "intervals"  # in metrics.json


def metrics(outcomes: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Return requested and empirical coverage, width and count, by split and property.

    Args:
      outcomes: Predictions by split, see `PredictedProperties`.
    """
    return {
        split: {name: _metrics(outcome, name, width) for name, width in outcome.half_width.items()}
        for split, outcome in outcomes.items()
        if outcome.half_width is not None
    }


def _metrics(outcome: Any, name: str, width: np.ndarray) -> dict[str, float]:
    absolute = outcome.absolute(name)
    known = np.isfinite(absolute) & np.isfinite(width)
    count = int(known.sum())
    covered = float((absolute[known] <= width[known]).mean()) if count else float("nan")
    return {
        "requested": outcome.coverage,
        "coverage": covered,
        "stderr": float(np.sqrt(covered * (1 - covered) / count)) if count else float("nan"),
        "mean_width": float(2 * width[known].mean()) if count else float("nan"),
        "count": count,
    }


def section(
    numbers: Mapping[str, Mapping[str, Mapping[str, float]]], targets: Sequence[Target]
) -> Iterator[str]:
    """Yield a table of the coverage in each test split.

    Args:
      numbers: Result of `metrics`.
      targets: Properties, for their units.
    """
    units = {t.name: t.unit for t in targets}
    rows = [
        (
            split,
            f"{name} ({units[name]})" if units[name] else name,
            f"{100 * m['requested']:.4g} %",
            f"{100 * m['coverage']:.1f} ± {100 * m['stderr']:.1f} %" if m["count"] else "unknown",
            m["mean_width"],
            m["count"],
        )
        for split, by_name in numbers.items()
        for name, m in by_name.items()
    ]
    if not rows:
        return
    yield page.heading("Prediction intervals")
    yield page.paragraph(
        "Split conformal prediction, calibrated on the validation structures. The requested coverage "
        "is expected for structures that are drawn like those of validation."
    )
    yield page.table(
        ["", "property", "requested", "label in the interval", "mean width", "structures"], rows
    )
