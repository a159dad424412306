"""Intervals of valid values of config fields."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Interval of real numbers: "[" and "]" include the end, "(" and ")" exclude it.

    >>> 1.0 in Bounds("[0, 1)"), math.inf in Bounds("(0, inf]"), math.nan in Bounds("(-inf, inf)")
    (False, True, False)
    >>> str(Bounds("[0, 1)")), str(Bounds("(0, inf)"))
    ('at least 0 and below 1', 'positive')
    """

    interval: str

    @property
    def _ends(self) -> tuple[float, float]:
        low, high = self.interval[1:-1].split(",")
        return float(low), float(high)

    def __contains__(self, value: Any) -> bool:
        if not isinstance(value, numbers.Real):
            return False
        low, high = self._ends
        above = low <= value if self.interval.startswith("[") else low < value
        return above and (value <= high if self.interval.endswith("]") else value < high)

    def __str__(self) -> str:
        low, high = self._ends
        lower = "at least" if self.interval.startswith("[") else "above"
        upper = "at most" if self.interval.endswith("]") else "below"
        if math.isinf(low):
            return "finite" if math.isinf(high) else f"{upper} {high:g}"
        if math.isinf(high):
            return "positive" if (lower, low) == ("above", 0) else f"{lower} {low:g}"
        if self.interval[0] + self.interval[-1] == "[]":
            return f"from {low:g} to {high:g}"
        return f"{lower} {low:g} and {upper} {high:g}"


AT_LEAST_ONE = Bounds("[1, inf)")
NOT_NEGATIVE = Bounds("[0, inf)")
POSITIVE = Bounds("(0, inf)")
POSITIVE_OR_INFINITE = Bounds("(0, inf]")
FINITE = Bounds("(-inf, inf)")
FRACTION = Bounds("[0, 1]")
BELOW_ONE = Bounds("[0, 1)")
PROBABILITY = Bounds("(0, 1)")
