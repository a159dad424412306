"""Coverage of prediction intervals on labeled structures: metrics and a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlip_jax.datasets.property_data import Target
from mlip_jax.reports import html_page as page

KEY = "intervals"  # in metrics.json
_CONFIDENCE = 0.95  # of the interval of the empirical coverage


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
    covered = int((absolute[known] <= width[known]).sum())
    low, high = _proportion_interval(covered, count)
    return {
        "requested": outcome.coverage,
        "coverage": covered / count if count else float("nan"),
        "coverage_low": low,
        "coverage_high": high,
        "mean_width": float(2 * width[known].mean()) if count else float("nan"),
        "count": count,
    }


def _proportion_interval(successes: int, count: int) -> tuple[float, float]:
    """Return the Wilson interval of a probability; NaN without trials.

    Unlike the standard error, it has a width above zero if all or no trials are successes.
    """
    if not count:
        return float("nan"), float("nan")
    from scipy.stats import binomtest  # slow to import

    interval = binomtest(successes, count).proportion_ci(_CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


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
            _percentages(m) if m["count"] else "unknown",
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
        "is expected for structures that are drawn like those of validation. In parentheses: 95 % "
        "confidence interval of the measured coverage (Wilson), without the variation of the "
        "calibration."
    )
    yield page.table(
        ["", "property", "requested", "label in the interval", "mean width", "structures"], rows
    )


def _percentages(m: Mapping[str, float]) -> str:
    """Return the measured coverage with its confidence interval."""
    low, high = 100 * m["coverage_low"], 100 * m["coverage_high"]
    return f"{100 * m['coverage']:.1f} % ({low:.1f} to {high:.1f} %)"
