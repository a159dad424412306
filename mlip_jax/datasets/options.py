"""Validation of reader options. Values of the wrong type are rejected, not converted.

Options are parsed from a string, `config.data.reader_options`, so a typo ("stride=abc",
"stride=2.5") results in a value of another type. Each function returns the value, or raises a
ConfigError with the name of the option, the expected type and the received value.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlip_jax.config import ConfigError, unknown_name


def as_flag(name: str, value: str) -> str:
    """Format an option as on the command line, for error messages.

    >>> as_flag("split_files", "''")
    '--config.data.reader_options="split_files=\\'\\'"'
    """
    return f'--config.data.reader_options="{name}={value}"'


def positive_integer(name: str, value: Any, allow_none: bool = False) -> int | None:
    """Validate an integer of at least 1. None is valid if `allow_none`."""
    if value is None and allow_none:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise _option_error(
            name, "an integer of 1 or more" + (", or None" if allow_none else ""), value
        )
    return int(value)


def flag(name: str, value: Any) -> bool:
    """Validate a Boolean."""
    if not isinstance(value, bool | np.bool_):
        raise _option_error(name, "True or False", value)
    return bool(value)


def text(name: str, value: Any) -> str:
    """Validate a string."""
    if not isinstance(value, str):
        raise _option_error(name, "a text", value)
    return value


def path(name: str, value: Any, allow_none: bool = False) -> str | None:
    """Validate a path and return it as a string. None is valid if `allow_none`."""
    if value is None and allow_none:
        return None
    if not isinstance(value, str | os.PathLike):
        raise _option_error(name, "a path" + (", or None" if allow_none else ""), value)
    return os.fspath(value)


def one_of(name: str, value: Any, known: Sequence[str]) -> str:
    """Validate a string that must be one of `known`."""
    if not isinstance(value, str):
        raise _option_error(name, f"one of {', '.join(map(repr, known))}", value)
    if value not in known:
        raise ConfigError(unknown_name(f"value of reader option {name}", value, list(known)))
    return value


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Validate a string or a sequence of strings and return a tuple; "" becomes the empty tuple."""
    if isinstance(value, str):
        return (value,) if value else ()
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
        raise _option_error(name, "a text or several, ('A', 'B')", value)
    return tuple(value)


def keys(**given: Any) -> dict[str, str]:
    """Validate names of labels, which are given as options like energy_key; return them by label."""
    return {label: text(f"{label}_key", name) for label, name in given.items()}


def _option_error(name: str, expected: str, value: Any) -> ConfigError:
    """Return the error for an option of the wrong type."""
    return ConfigError(
        f"reader option {name} must be {expected}; received {reprlib.repr(value)} "
        f"({type(value).__name__})"
    )
