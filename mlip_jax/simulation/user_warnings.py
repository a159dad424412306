"""Warnings for the user, which point to the user's line."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator

# Packages whose lines a warning does not point to: this one, ASE, and modules that call for others.
_PASSED = frozenset({"mlip_jax", "ase", "contextlib", "functools", "threading"})


class OutsideDomainWarning(UserWarning):
    """Warning that molecules are unlike the training data of a force field."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that points to the innermost line outside of this package and of ASE."""
    level, frame = 1, inspect.currentframe()  # of this function
    while frame.f_back is not None and _package(frame) in _PASSED:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _package(frame) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]


@contextlib.contextmanager
def domain_in_log() -> Iterator[None]:
    """Hide `OutsideDomainWarning` in the body, for tasks that log which molecules are outside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutsideDomainWarning)
        yield
