"""Histogram with given edges for the figures of a data set, filled from a stream of values.

`Distribution` is for statistics stored with the data. It needs no edges in advance, because the
width of its bins is relative to the value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(eq=False)
class Histogram:
    """Counts of values between edges; the outermost edges belong to their bins.

    Values outside the edges and NaN are counted separately, so no value is lost silently.

    Attributes:
      edges: Ascending bin edges, shape (B + 1,).
      counts: Number of values per bin, int64, shape (B,).
      below: Number of values below the first edge, including -inf.
      above: Number of values above the last edge, including inf.
      missing: Number of NaN.
      minimum: Smallest finite value; NaN without finite values.
      maximum: Largest finite value; NaN without finite values.
      total: Sum of the finite values.
      finite: Number of finite values.
    """

    edges: np.ndarray
    counts: np.ndarray | None = None
    below: int = 0
    above: int = 0
    missing: int = 0
    minimum: float = math.nan
    maximum: float = math.nan
    total: float = 0.0
    finite: int = 0

    def __post_init__(self):
        self.edges = np.asarray(self.edges, np.float64)
        if (
            self.edges.ndim != 1
            or len(self.edges) < 2
            or not np.isfinite(self.edges).all()
            or (np.diff(self.edges) <= 0).any()
        ):
            raise ValueError(
                "a histogram requires at least two edges, finite and ascending; received "
                f"{np.array2string(self.edges, threshold=6)}"
            )
        counts = (
            np.zeros(len(self.edges) - 1, np.int64)
            if self.counts is None
            else np.array(self.counts, np.int64)
        )
        if counts.shape != (len(self.edges) - 1,) or (counts < 0).any():
            raise ValueError(
                f"{len(self.edges)} edges require {len(self.edges) - 1} nonnegative counts; "
                f"received shape {counts.shape}"
            )
        self.counts = counts

    @classmethod
    def linear(cls, low: float, high: float, bins: int) -> Histogram:
        """Create a histogram with bins of equal width."""
        return cls(np.linspace(low, high, bins + 1))

    @classmethod
    def logarithmic(cls, low: float, high: float, bins: int) -> Histogram:
        """Create a histogram with bins of equal width on a log axis, for positive values."""
        return cls(np.geomspace(low, high, bins + 1))

    @classmethod
    def integers(cls, low: int, high: int) -> Histogram:
        """Create a histogram with one bin per integer from `low` to `high`."""
        return cls(np.arange(low, high + 2) - 0.5)

    @classmethod
    def from_counts(
        cls, edges: Sequence[float] | np.ndarray, counts: Sequence[int] | np.ndarray
    ) -> Histogram:
        """Create a histogram from existing counts.

        The mean is computed from the centers of the bins. The extremes are the edges of the
        outermost filled bins, or the integers in them if `has_integer_bins`.
        """
        result = cls(np.asarray(edges), np.asarray(counts))
        filled = np.flatnonzero(result.counts)
        if len(filled):
            inside = 0.5 if result.has_integer_bins else 0.0
            result.minimum = float(result.edges[filled[0]]) + inside
            result.maximum = float(result.edges[filled[-1] + 1]) - inside
            result.total = float(result.counts @ (0.5 * (result.edges[1:] + result.edges[:-1])))
            result.finite = int(result.counts.sum())
        return result

    def add(self, values: np.ndarray | Sequence[float] | float) -> None:
        """Count all values of an array of any shape."""
        values = np.asarray(values, np.float64).ravel()
        known = values[~np.isnan(values)]
        self.missing += len(values) - len(known)
        self.below += int((known < self.edges[0]).sum())
        self.above += int((known > self.edges[-1]).sum())
        self.counts += np.histogram(
            known[(known >= self.edges[0]) & (known <= self.edges[-1])], self.edges
        )[0]
        finite = known[np.isfinite(known)]
        if len(finite):
            self._extremes(float(finite.min()), float(finite.max()))
            self.total += float(finite.sum())
            self.finite += len(finite)

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram with the same edges.

        Raises:
          ValueError: The edges differ.
        """
        if not np.array_equal(self.edges, other.edges):
            raise ValueError(
                f"cannot merge histograms with different edges: {len(self.edges)} from "
                f"{self.edges[0]:g} to {self.edges[-1]:g}, and {len(other.edges)} from "
                f"{other.edges[0]:g} to {other.edges[-1]:g}"
            )
        self.counts += other.counts
        for name in ("below", "above", "missing", "total", "finite"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._extremes(other.minimum, other.maximum)

    def _extremes(self, low: float, high: float) -> None:
        """Include `low` and `high` in minimum and maximum; NaN is ignored."""
        self.minimum, self.maximum = (
            float(np.fmin(self.minimum, low)),
            float(np.fmax(self.maximum, high)),
        )

    @property
    def known(self) -> int:
        """Number of values that are not NaN."""
        return int(self.counts.sum()) + self.below + self.above

    @property
    def has_integer_bins(self) -> bool:
        """Whether each bin contains exactly one integer."""
        return bool((np.diff(self.edges) == 1).all() and (self.edges % 1 == 0.5).all())

    @property
    def mean(self) -> float:
        """Mean of the finite values; NaN without any."""
        return self.total / self.finite if self.finite else math.nan

    def quantile(self, q: float) -> float:
        """Return the value below which a fraction `q` of the known values is found.

        The result is accurate to the width of its bin; NaN without known values. Values are assumed
        to be evenly distributed within a bin, and between the outermost edges and the extremes. If
        the bins are integers, the result inside the edges is an integer.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q must be between 0 and 1, received {q}")
        if not self.known:
            return math.nan
        # Treat the ranges below and above the edges as two more bins.
        weights = np.concatenate([[self.below], self.counts, [self.above]])
        low, high = np.fmin(self.minimum, self.edges[0]), np.fmax(self.maximum, self.edges[-1])
        bounds = np.concatenate([[low], self.edges, [high]])
        reached = np.concatenate([[0], np.cumsum(weights)])
        target = q * reached[-1]
        b = (
            int(np.searchsorted(reached, target, side="left")) - 1
            if target > 0
            else int(np.flatnonzero(weights)[0])
        )
        if self.has_integer_bins and 0 < b <= len(self.counts):
            return float(bounds[b] + 0.5)
        value = bounds[b] + (bounds[b + 1] - bounds[b]) * (target - reached[b]) / weights[b]
        return float(np.clip(value, self.minimum, self.maximum)) if self.finite else float(value)

    def to_json(self) -> dict[str, object]:
        """Return plain numbers and lists; None for unknown numbers."""
        plain = {
            name: None if math.isnan(value) else value
            for name, value in (
                ("minimum", self.minimum),
                ("maximum", self.maximum),
                ("mean", self.mean),
            )
        }
        return {
            "edges": self.edges.tolist(),
            "counts": self.counts.tolist(),
            "below": self.below,
            "above": self.above,
            "missing": self.missing,
            **plain,
        }
