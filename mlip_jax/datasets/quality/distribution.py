"""Histogram of fixed size for any range of values; histograms can be added."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

# Values in a bin share sign, exponent and the first bits of the float32 mantissa: 64 bins per
# factor of two, found without a logarithm. Magnitudes below 2**-40 fall into the bin of zero, those
# from 2**40 into the last bin.
_BITS = 6
_SHIFT = 23 - _BITS
_LOWEST = (127 - 40) << _BITS
_TOP = 80 << _BITS
# Larger magnitudes are clipped to this value in the moments, so that these stay finite.
_HUGE = 1e100


@dataclasses.dataclass
class Distribution:
    """Counts of values in bins 1.1 to 1.6 % wide, with exact count, extremes and moments.

    Attributes:
      count: Number of values.
      smallest: Smallest value; NaN without values.
      largest: Largest value; NaN without values.
      total: Sum of the values.
      squares: Sum of the squared values.
      bins: Count per bin number. Negative numbers are bins of negative values.
    """

    count: int = 0
    smallest: float = float("nan")
    largest: float = float("nan")
    total: float = 0.0
    squares: float = 0.0
    bins: dict[int, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_values(cls, values: np.ndarray) -> Distribution:
        """Return the distribution of the finite values of an array of any shape."""
        values = np.asarray(values, np.float64).ravel()
        accumulator = Accumulator()
        accumulator.add(values[np.isfinite(values)])
        return accumulator.distribution()

    def add(self, other: Distribution) -> None:
        """Add the values of another distribution to this one."""
        self.count += other.count
        self.smallest = float(np.fmin(self.smallest, other.smallest))
        self.largest = float(np.fmax(self.largest, other.largest))
        self.total += other.total
        self.squares += other.squares
        for k, n in other.bins.items():
            self.bins[k] = self.bins.get(k, 0) + n

    @property
    def mean(self) -> float:
        """Mean of the values; NaN without values."""
        return self.total / self.count if self.count else float("nan")

    @property
    def rms(self) -> float:
        """Root mean square of the values; NaN without values."""
        return float(np.sqrt(self.squares / self.count)) if self.count else float("nan")

    @property
    def median(self) -> float:
        """Median of the values, to the width of a bin; NaN without values."""
        return self.quantile(0.5)

    def quantile(self, q: float) -> float:
        """Return the value below which a fraction q of the values is found.

        The result is accurate to the width of a bin; NaN without values.
        """
        if not self.count:
            return float("nan")
        keys = np.array(sorted(self.bins))
        counts = np.array([self.bins[k] for k in keys.tolist()])
        target = q * self.count
        k = min(int(np.searchsorted(np.cumsum(counts), target)), len(keys) - 1)
        low, high = _edges(keys[k : k + 1])
        within = (target - counts[:k].sum()) / counts[k]
        return float(np.clip(low[0] + within * (high[0] - low[0]), self.smallest, self.largest))

    def share(self, low: float, high: float) -> float:
        """Return the fraction of values in [low, high].

        The result is accurate to the width of a bin; NaN without values.
        """
        if not self.count:
            return float("nan")
        left, right = _edges(np.array(sorted(self.bins)))
        middle = (left + right) / 2
        counts = np.array([self.bins[k] for k in sorted(self.bins)])
        return float(counts[(middle >= low) & (middle <= high)].sum() / self.count)

    def to_json(self) -> dict[str, Any]:
        """Return plain, rounded values for `from_json`."""
        fields = {
            k: rounded(v) if isinstance(v, float) else v
            for k, v in dataclasses.asdict(self).items()
        }
        if not self.count:
            fields |= {"smallest": None, "largest": None}
        return fields | {"bins": {str(k): self.bins[k] for k in sorted(self.bins)}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Distribution:
        """Create a distribution from the output of `to_json`."""
        extremes = {
            k: float("nan") if values[k] is None else float(values[k])
            for k in ("smallest", "largest")
        }
        return cls(
            **{**values, **extremes, "bins": {int(k): int(n) for k, n in values["bins"].items()}}
        )


def rounded(value: float) -> float:
    """Round to nine significant digits. Rounding twice gives the same value.

    >>> rounded(1 / 3), rounded(rounded(1 / 3)) == rounded(1 / 3)
    (0.333333333, True)
    """
    return float(f"{value:.9g}")


class Accumulator:
    """Accumulator of arrays for one distribution, faster than adding many distributions."""

    def __init__(self):
        self._counts = np.zeros(2 * _TOP + 1, np.int64)
        self._smallest, self._largest, self._total, self._squares = np.inf, -np.inf, 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        """Add finite float64 values, shape (n,)."""
        if len(values):
            self._counts += _bin_counts(values)
            self._smallest = min(self._smallest, float(values.min()))
            self._largest = max(self._largest, float(values.max()))
            if self._largest > _HUGE or self._smallest < -_HUGE:
                values = values.clip(-_HUGE, _HUGE)
            self._total += float(values.sum())
            # einsum does not depend on the number of threads.
            self._squares += float(np.einsum("i,i->", values, values))

    def distribution(self) -> Distribution:
        """Return the distribution of all added values."""
        occupied = np.flatnonzero(self._counts)
        if not len(occupied):
            return Distribution()
        return Distribution(
            int(self._counts.sum()),
            self._smallest,
            self._largest,
            self._total,
            self._squares,
            dict(zip((occupied - _TOP).tolist(), self._counts[occupied].tolist())),
        )


def _bin_counts(values: np.ndarray) -> np.ndarray:
    """Return the number of finite values per bin, from the most negative bin upward."""
    with np.errstate(over="ignore"):
        bits = np.ascontiguousarray(values, np.float32).view(np.int32)
    # Sign, exponent and first bits of the mantissa number the bin of a float32.
    key = bits & 0x7FFFFFFF
    key >>= _SHIFT
    key -= _LOWEST
    np.clip(key, 0, _TOP, out=key)
    negative = bits >> 31  # -1 or 0: two's complement changes the sign
    key ^= negative
    key -= negative
    key += _TOP
    return np.bincount(key, minlength=2 * _TOP + 1)


def _edges(keys):
    """Return the lower and upper edges of bins."""
    size = np.abs(keys)

    def edge(k):
        value = ((k + _LOWEST) << _SHIFT).astype(np.int32).view(np.float32).astype(np.float64)
        return np.where(k <= 0, 0.0, value)

    near, far = edge(size), edge(size + 1)  # magnitudes, closer to and farther from zero
    far = np.where(size == 0, 2.0**-40, far)
    low, high = np.where(keys < 0, -far, near), np.where(keys < 0, -near, far)
    return np.where(keys == 0, -far, low), high
