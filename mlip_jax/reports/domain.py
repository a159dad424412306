"""Report section on the distance from the training set as a predictor of errors.

It shows the errors against the distance, and the true and false positive rates of an alarm that is
based on the distance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from mlip_jax.reports import figures
from mlip_jax.reports import html_page as page
from mlip_jax.wording import count_of

LARGE = 0.1  # fraction of the errors that count as large, which the distance should identify


def roc(
    distance: np.ndarray, absolute: np.ndarray, share: float = LARGE
) -> tuple[np.ndarray, np.ndarray, float]:
    """Compute the ROC curve of the distance as a predictor of large errors.

    Args:
      distance: Distances from the training set, (S,).
      absolute: Absolute errors, (S,). Structures with NaN are ignored.
      share: Fraction of the errors that count as large.

    Returns:
      False positive rates and true positive rates, both ascending, and the area under the curve.
      The area is NaN if all errors or none are large.
    """
    known = np.isfinite(absolute) & np.isfinite(distance)
    distance, absolute = distance[known], absolute[known]
    large = absolute >= np.quantile(absolute, 1 - share) if len(absolute) else absolute > 0
    if large.all() or not large.any():
        return np.array([0.0, 1.0]), np.array([0.0, 1.0]), float("nan")
    order = np.argsort(-distance, kind="stable")
    # Structures with equal distances raise the alarm together, so keep the last of each group.
    last = np.append(np.flatnonzero(np.diff(distance[order])), len(order) - 1)
    true, false = (np.append(0.0, np.cumsum(x[order])[last] / x.sum()) for x in (large, ~large))
    return false, true, float(np.trapezoid(true, false))


def section(
    title: str, distance: np.ndarray, errors: Mapping[str, tuple[np.ndarray, str]]
) -> Iterator[str]:
    """Yield a heading and one figure per kind of error.

    Args:
      title: Text of the heading.
      distance: Distances in units of the border of the domain, (S,).
      errors: Absolute errors (S,) and their unit by name; the unit may be "".
    """
    yield page.heading(title)
    for name, (absolute, unit) in errors.items():
        if not np.isfinite(absolute).any():
            continue
        false, true, area = roc(distance, absolute)
        fig, axes = figures.figure(
            "Error against distance", f"Largest {100 * LARGE:.0f} % of the errors", size=(9.2, 3.8)
        )
        axes[0].scatter(distance, absolute, s=9, alpha=0.45, color=figures.BLUE, linewidths=0)
        axes[0].axvline(1, color=figures.GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes[0].set(
            xlabel="distance (1: boundary of the domain)",
            ylabel=f"|error| of {name} ({unit})" if unit else f"|error| of {name}",
        )
        axes[1].plot(false, true, color=figures.BLUE)
        axes[1].plot([0, 1], [0, 1], color=figures.GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes[1].set(
            xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1)
        )
        beyond = distance > 1
        inside, outside = (
            f"{np.nanmean(absolute[b]):.3g} {unit}" if np.isfinite(absolute[b]).any() else "none"
            for b in (~beyond, beyond)
        )
        yield page.figure(
            fig,
            f"{name}: mean |error| {inside} inside the domain, {outside} for the "
            f"{count_of(int(beyond.sum()), 'structure')} outside. "
            f"Area under the ROC curve {area:.2f} (chance: 0.5).",
            wide=True,
        )
