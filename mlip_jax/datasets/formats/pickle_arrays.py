"""NumPy arrays and scalars of numbers in an untrusted pickle, for safe_pickle.py.

NUMPY maps the names in the pickle to functions that create them. Data types with fields or objects
are rejected: their stored flags decide whether bytes are interpreted as pointers.
"""

from __future__ import annotations

import math
import pickle
import re
import threading
from collections.abc import Callable, Mapping

import numpy as np

from mlip_jax.datasets.formats.pickle_messages import short_repr

Allowed = Mapping[tuple[str, str], Callable]
_copies = threading.local()  # .left: bytes that the functions of this pickle may still copy


def limit_copies(size: int) -> None:
    """Set the number of bytes that the functions of the next pickle may copy in this thread."""
    _copies.left = size


def _count_copy(size: int) -> None:
    """Count the bytes of a copy. Raise UnpicklingError if none are left."""
    _copies.left -= size
    if _copies.left < 0:
        raise pickle.UnpicklingError("copies of the same bytes over and over")


class _DType:
    """Replacement for numpy.dtype in a pickle.

    It is created with character and size, e.g. "f8". Its state sets the byte order.
    """

    def __init__(self, code, align=False, copy=True):
        if not isinstance(code, str) or not re.fullmatch(r"[biufc](1|2|4|8|16)", code):
            raise pickle.UnpicklingError(
                f"array type {short_repr(code)}, where only numbers and logical values are allowed"
            )
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        if (
            not isinstance(state, tuple)
            or len(state) < 8
            or state[1] not in ("<", ">", "|", "=")
            or state[2:8] != (None, None, None, -1, -1, 0)
        ):
            raise pickle.UnpicklingError(
                f"array type with the state {short_repr(state)}, where only a byte order is allowed"
            )
        self.dtype = self.dtype.newbyteorder(state[1])


class Array(np.ndarray):
    """numpy.ndarray that checks its state; `numpy.asarray` returns the plain array."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, content = state
        values = _from_buffer(content, dtype, shape, "F" if fortran else "C")
        _count_copy(len(content))
        super().__setstate__((1, values.shape, values.dtype, bool(fortran), bytes(content)))

    def __setitem__(self, key, value):
        raise pickle.UnpicklingError("changes an array")  # the key could be an endless nested list


def _reconstruct(_kind, _shape, _code) -> Array:
    """Return an empty array, whose content __setstate__ sets."""
    return np.ndarray.__new__(Array, (0,), np.int8)


def _from_buffer(content, dtype, shape, order) -> np.ndarray:
    """Return a read-only view of the content. Raise UnpicklingError if shape or type do not fit."""
    if (
        not isinstance(dtype, _DType)
        or not isinstance(content, bytes | bytearray)
        or order not in ("C", "F")
    ):
        raise pickle.UnpicklingError(
            f"an array of {type(dtype).__name__} from {type(content).__name__}"
        )
    if (
        not isinstance(shape, tuple)
        or len(shape) > 32
        or not all(isinstance(n, int) and n < 2**48 for n in shape)
    ):
        raise pickle.UnpicklingError(f"an array of shape {short_repr(shape)}")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.dtype.itemsize != len(content):
        raise pickle.UnpicklingError(
            f"an array of shape {shape} of {dtype.dtype} from {len(content)} bytes"
        )
    values = np.frombuffer(content, dtype.dtype).reshape(shape, order=order)
    values.flags.writeable = False
    return values


def _scalar(dtype, content) -> np.generic:
    """Return a NumPy scalar."""
    return _from_buffer(content, dtype, (), "C")[()]


def _encode(text, encoding) -> bytes:
    """Return bytes as written by protocols before 3."""
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError(f"an encoding {short_repr(encoding)} of {type(text).__name__}")
    _count_copy(len(text))
    return text.encode("latin-1")


def _empty_bytes() -> bytes:
    """Return empty bytes as written by protocols before 3."""
    return b""


def _reject_construction(*_):
    """Raise UnpicklingError: numpy.ndarray is allowed only as an argument of _reconstruct."""
    raise pickle.UnpicklingError("an array created by its class")


NUMPY: Allowed = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _reject_construction,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _empty_bytes,
} | {
    (f"numpy.{core}.{module}", name): function
    for core in ("core", "_core")
    for module, name, function in (
        ("multiarray", "_reconstruct", _reconstruct),
        ("multiarray", "scalar", _scalar),
        ("numeric", "_frombuffer", _from_buffer),
    )
}
