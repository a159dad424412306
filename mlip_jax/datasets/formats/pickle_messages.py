"""Short representations of values in an untrusted pickle, for messages."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Iterable
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2


def short_keys(mapping: Iterable[Any]) -> str:
    """Format the first keys of a mapping of a pickle for messages."""
    return f"[{', '.join(short_repr(key) for key in itertools.islice(mapping, 20))}]"


def short_repr(value: Any) -> str:
    """Format a value of a pickle for messages, cut at about 200 characters and two levels."""
    return _SHORT.repr(value)
