"""Short representations of values in an untrusted pickle, for messages."""

from __future__ import annotations

import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2


def short_repr(value: Any) -> str:
    """Format a value of a pickle for messages, cut at about 200 characters and two levels."""
    return _SHORT.repr(value)
