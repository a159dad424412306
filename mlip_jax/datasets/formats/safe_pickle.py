"""Restricted unpickler: loads an untrusted pickle without running the code that it requests.

A pickle is a small program. It may name any function of any module and call it with any arguments.
This module allows only plain Python values (dict, list, tuple, str, bytes, numbers, sets) and the
functions that the caller allows by name:

- A name that is not allowed is rejected before it is imported. An allowed name refers to the
  CALLER'S function for it, which may differ from the original one. The pickle can call that
  function, but cannot change or inspect it.
- The code is checked before it runs. Extension codes, persistent ids, memo entries far
  beyond the data and lengths beyond the end are rejected, because they cost memory before they
  fail. Code with more opcodes, sets, long integers or tuple cells than data files have is rejected
  as well, because each of them takes more memory or time than bytes in the file.
- All functions together may copy at most twice the size of the pickle.

A list can contain itself, and others can contain it many times: a few bytes then represent an
endless structure. Code that walks through a value must check the type of each item, and messages
must format values with `short_repr`.

pickle_opcodes.py has the check of the code, and pickle_arrays.py the functions that create arrays
and scalars of numbers (NUMPY).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

from mlip_jax.datasets.formats.pickle_arrays import NUMPY, Allowed, limit_copies
from mlip_jax.datasets.formats.pickle_messages import short_repr
from mlip_jax.datasets.formats.pickle_opcodes import check
from mlip_jax.datasets.reader import DatasetError

__all__ = ["NUMPY", "Allowed", "load", "loads", "short_repr"]


def load(file: BinaryIO, *, allowed: Allowed, source: str) -> Any:
    """Apply `loads` to the rest of a file that is open for reading in binary mode."""
    return loads(file.read(), allowed=allowed, source=source)


def loads(
    data: bytes,
    *,
    allowed: Allowed,
    source: str,
    persistent: Callable[[Any], Any] | None = None,
    foreign: Callable[[str, str], Any] | None = None,
) -> Any:
    """Return the value of a pickle.

    Args:
      data: One complete pickle of any protocol up to 5.
      allowed: Functions that the pickle may call: {(module, name): function to call instead}. If
        empty, only plain values are allowed.
      source: File and record, for messages.
      persistent: Function that checks and replaces a persistent id; None rejects these ids.
      foreign: Function that returns an inert replacement for a name that is not allowed, given
        module and name; None rejects these names. Nothing is imported.

    Raises:
      DatasetError: The pickle requests something that is not allowed, or is truncated, corrupted or
        not a pickle.
    """
    check(data, source, allow_persistent=persistent is not None)
    limit_copies(2 * len(data) + 4096)
    try:
        if foreign is None:
            return _Unpickler(data, allowed, source, persistent).load()
        unpickler = _InertUnpickler(data, allowed, source, persistent)
        unpickler.foreign = foreign
        return unpickler.load()
    except DatasetError:
        raise
    except Exception as error:  # corrupted pickles raise errors of any type, even MemoryError
        raise DatasetError(
            f"{source}: cannot be read as a pickle ({type(error).__name__}: {error}). It is "
            "corrupted or malicious; download it again or recreate it."
        ) from error


class _Unpickler(pickle.Unpickler):
    """Unpickler that replaces every name in a pickle by the caller's function for it."""

    def __init__(self, data, allowed, source, persistent):
        super().__init__(io.BytesIO(data))
        self._allowed, self._source = allowed, source
        if persistent is not None:  # otherwise `check` has rejected persistent ids
            self.persistent_load = persistent

    def find_class(self, module, name):
        if (module, name) not in self._allowed:
            requested = f"{module}.{name}"[:200]
            raise DatasetError(
                f"{self._source}: the pickle requests '{requested}', which this format does not "
                "need. This file may be malicious; it was not executed. Get it from its original "
                "source."
            )
        return _AllowedFunction(self._allowed[module, name])


class _InertUnpickler(_Unpickler):
    """Unpickler that replaces every other name by an inert class of the caller."""

    foreign: Callable[[str, str], Any]

    def find_class(self, module, name):
        if (module, name) in self._allowed:
            return super().find_class(module, name)
        return self.foreign(module, name)


class _AllowedFunction:
    """Callable without any other use: otherwise a pickle could set attributes of the function."""

    __slots__ = ("_function",)

    def __init__(self, function):
        object.__setattr__(self, "_function", function)

    def __call__(self, *args):
        return self._function(*args)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError(f"changes {short_repr(name)} of a function")

    def __setstate__(self, state):
        raise pickle.UnpicklingError("changes a function")
