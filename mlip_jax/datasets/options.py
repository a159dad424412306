"""Checks of the options of readers: what is of the wrong type is refused, not converted.

Options come from a text, `config.data.reader_options`, so that a slip ("stride=abc", "stride=2.5") gives a value of
another type. Each function gives the value back, or raises ConfigError with the option, what was expected and what was
received.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlip_jax.config import ConfigError, unknown_name


def how(name: str, value: str) -> str:
    """How an option is given on the command line, for messages.

    >>> how("split_files", "''")
    '--config.data.reader_options="split_files=\\'\\'"'
    """
    return f'--config.data.reader_options="{name}={value}"'


def positive_integer(name: str, value: Any, allow_none: bool = False) -> int | None:
    """An integer of 1 or more; with `allow_none` also None."""
    if value is None and allow_none:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise _wrong(name, "an integer of 1 or more" + (", or None" if allow_none else ""), value)
    return int(value)


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise _wrong(name, "True or False", value)
    return bool(value)


def text(name: str, value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise _wrong(name, "a text", value)
    return value


def path(name: str, value: Any, allow_none: bool = False) -> str | None:
    """A path, as a text; with `allow_none` also None."""
    if value is None and allow_none:
        return None
    if not isinstance(value, str | os.PathLike):
        raise _wrong(name, "a path" + (", or None" if allow_none else ""), value)
    return os.fspath(value)


def one_of(name: str, value: Any, known: Sequence[str]) -> str:
    """One of some texts."""
    if not isinstance(value, str):
        raise _wrong(name, f"one of {', '.join(map(repr, known))}", value)
    if value not in known:
        raise ConfigError(unknown_name(f"value of reader option {name}", value, list(known)))
    return value


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Several texts, or one; "" is none."""
    if isinstance(value, str):
        return (value,) if value else ()
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
        raise _wrong(name, "a text or several, ('A', 'B')", value)
    return tuple(value)


def _wrong(name: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"reader option {name} must be {expected}; received {reprlib.repr(value)} "
                       f"({type(value).__name__})")
