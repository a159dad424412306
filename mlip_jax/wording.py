"""Numbers of things in messages and reports."""

from __future__ import annotations

_IRREGULAR = {"minimum": "minima", "geometry": "geometries", "process": "processes"}


def count_of(number: int, noun: str, form: str = "") -> str:
    """Return a number with its noun in the singular or the plural.

    >>> count_of(1, "molecule"), count_of(2, "minimum"), count_of(1200, "step", ",")
    ('1 molecule', '2 minima', '1,200 steps')

    Args:
      number: Number of things.
      noun: Noun in the singular.
      form: Format of the number, such as ",".
    """
    words = noun if number == 1 else _IRREGULAR.get(noun, f"{noun}s")
    return f"{number:{form}} {words}"
