"""Compiled programs that objects with equal configurations share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)

# MAX_KEPT: number of configurations whose programs are kept.
MAX_KEPT = 16


def kept_for_equal_arguments(function: F) -> F:
    """Decorate a function that returns jitted functions: equal arguments return the same ones.

    Otherwise, each calculator and each relaxation would compile its own. A configuration without a
    hash, such as a model with an array among its options, has jitted functions of its own.
    """
    kept = functools.lru_cache(maxsize=MAX_KEPT)(function)

    @functools.wraps(function)
    def find(*args):
        try:
            hash(args)
        except TypeError:
            return function(*args)
        return kept(*args)

    return find
