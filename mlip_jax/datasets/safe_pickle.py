"""Pickles from strangers: loading one without running what it asks for.

A pickle is a small program, and may name any function of any module to be called with any arguments. Here it gets
plain Python values (dict, list, tuple, str, bytes, numbers, sets) and what the caller admits by name, nothing else:

- a name that is not admitted is refused before it is imported, and what is admitted is the CALLER'S function for it,
  which need not be the one that the name stands for. The pickle can call it, but not change or look into it;
- the code is read through before it runs: numbers that stand for registered types, persistent ids, memo entries
  far beyond the data and lengths beyond the end are refused there, since they cost memory before they fail.

NUMPY admits arrays and scalars of numbers. Data types with fields or objects are refused: their stored flags decide
whether bytes are taken for pointers.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from mlip_jax.datasets.reader import DatasetError

Allowed = Mapping[tuple[str, str], Callable]

# The C unpickler hashes nested tuples without a limit on the depth, and the process dies when the stack is full.
_MAX_TUPLES = 50_000


def load(file: BinaryIO, *, allowed: Allowed, source: str) -> Any:
    """`loads` of all that a file, opened for reading in binary, holds from here on."""
    return loads(file.read(), allowed=allowed, source=source)


def loads(data: bytes, *, allowed: Allowed, source: str) -> Any:
    """The value of a pickle.

    Args:
      data: One pickle of any protocol up to 5, whole.
      allowed: What it may call: {(module, name): function that is called instead}. Empty: plain values only.
      source: File and record, for messages.

    Raises:
      DatasetError: It asks for something that is not allowed, or it is truncated, damaged or not a pickle.
    """
    check(data, source)
    try:
        return _Unpickler(data, allowed, source).load()
    except DatasetError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way, MemoryError and RecursionError among them
        raise DatasetError(f"{source}: cannot be read as a pickle ({type(error).__name__}: {error}). It is damaged or "
                           "malicious; download or make it again.") from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, data, allowed, source):
        super().__init__(io.BytesIO(data))
        self._allowed, self._source = allowed, source

    def find_class(self, module, name):
        if (module, name) not in self._allowed:
            raise DatasetError(
                f"{self._source}: the pickle asks for '{module}.{name}', which this format does not need. This file "
                "may be malicious; it was not executed. Get it from its original source.")
        return _Admitted(self._allowed[module, name])


class _Admitted:
    """Something that can be called, and nothing else: a pickle could otherwise set attributes of what it is given."""

    __slots__ = ("_function",)

    def __init__(self, function):
        object.__setattr__(self, "_function", function)

    def __call__(self, *args):
        return self._function(*args)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError(f"changes {name!r} of a function")

    def __setstate__(self, state):
        raise pickle.UnpicklingError("changes a function")


# --- The opcodes, read through without running them ---

_REFUSED = {
    "EXT1": "a registered extension type", "EXT2": "a registered extension type",
    "EXT4": "a registered extension type", "PERSID": "a persistent id", "BINPERSID": "a persistent id",
    "NEXT_BUFFER": "a buffer outside of the file"}
_TUPLES = (b"t", b"\x85", b"\x86", b"\x87")
_BY_CODE = {op.code.encode("latin-1"): op for op in pickletools.opcodes}
_COUNT_WIDTH = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4,
                pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8}
_COUNTED = {code: _COUNT_WIDTH[op.arg.n] for code, op in _BY_CODE.items()
            if op.arg is not None and op.arg.n in _COUNT_WIDTH}


def _plain_opcodes() -> re.Pattern:
    """Any run of the opcodes that need no closer look, with their arguments."""
    special = {b".", b"r", b"p", b"c", b"i", *_TUPLES, *_COUNTED}
    by_size: dict[int, list[bytes]] = {}
    for code, op in _BY_CODE.items():
        if code not in special and op.name not in _REFUSED:
            by_size.setdefault(op.arg.n if op.arg else 0, []).append(re.escape(code))
    terms = [b"[" + b"".join(codes) + b"]" + (b"[^\n]*+\n" if size == pickletools.UP_TO_NEWLINE else b".{%d}" % size)
             for size, codes in by_size.items()]
    # Memo entries up to 2**24; two lines for a global.
    terms += [rb"r...\x00", rb"p[0-9]{1,7}\n", rb"[ci][^\n]*+\n[^\n]*+\n"]
    return re.compile(b"(?:" + b"|".join(terms) + b")*+", re.DOTALL)


_PLAIN = _plain_opcodes()


def check(data: bytes, source: str) -> None:
    """Read a pickle's opcodes without running them.

    Raises:
      DatasetError: They do not make one whole pickle, or are of a kind that no data file needs.
    """
    position, tuples = 0, 0
    while True:
        position = _PLAIN.match(data, position).end()
        code = data[position:position + 1]
        if code == b".":
            break
        if code in _COUNTED:
            start = position + 1 + _COUNTED[code]
            position = start + int.from_bytes(data[position + 1:start], "little")
            if position < len(data):
                continue
        elif code in _TUPLES and tuples < _MAX_TUPLES:
            position, tuples = position + 1, tuples + 1
            continue
        raise DatasetError(f"{source}: {_what_is_wrong(code, data, position)}")
    if position + 1 != len(data):
        raise DatasetError(f"{source}: {len(data) - position - 1} bytes follow the end of the pickle; expected one "
                           "pickle and nothing else. The file is damaged; download or make it again.")


def _what_is_wrong(code: bytes, data: bytes, position: int) -> str:
    op = _BY_CODE.get(code)
    if op is not None and op.name in _REFUSED:
        return (f"the pickle asks for {_REFUSED[op.name]} (opcode {op.name}), which no data file needs. This file may "
                "be malicious; it was not executed.")
    if code in _TUPLES:
        return (f"the pickle makes more than {_MAX_TUPLES} tuples, which no data file needs. This file may be "
                "malicious; it was not executed.")
    if code in (b"r", b"p") and len(data) - position > 8:
        return ("the pickle asks for a memo of more than 16 million entries. This file may be malicious; it was not "
                "executed.")
    if not code or op is not None:
        return (f"the pickle is truncated ({len(data)} bytes; its end is missing). Download or make the file again.")
    return (f"not a pickle, or a damaged one: byte {position} is {code!r}, where an opcode is expected. Download or "
            "make the file again.")


# --- Arrays and scalars of numbers ---

class _DType:
    """What a pickle makes of numpy.dtype: the character and size, then byte order by its state."""

    def __init__(self, code, align=False, copy=True):
        if not isinstance(code, str) or not re.fullmatch(r"[biufc](1|2|4|8|16)", code):
            raise pickle.UnpicklingError(f"array type {code!r}, where only numbers and logical values are allowed")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        if not isinstance(state, tuple) or len(state) < 8 or state[1] not in ("<", ">", "|", "=") or state[2:8] != (
                None, None, None, -1, -1, 0):
            raise pickle.UnpicklingError(f"array type with the state {state!r}, where only a byte order is allowed")
        self.dtype = self.dtype.newbyteorder(state[1])


class Array(np.ndarray):
    """numpy.ndarray with a checked state; `numpy.asarray` gives the plain one."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, content = state
        values = _from_buffer(content, dtype, shape, "F" if fortran else "C")
        super().__setstate__((1, values.shape, values.dtype, bool(fortran), bytes(content)))


def _reconstruct(_kind, _shape, _code) -> Array:
    """An array that gets its content by __setstate__."""
    return np.ndarray.__new__(Array, (0,), np.int8)


def _from_buffer(content, dtype, shape, order) -> np.ndarray:
    if not isinstance(dtype, _DType) or not isinstance(content, bytes | bytearray) or order not in ("C", "F"):
        raise pickle.UnpicklingError(f"an array of {type(dtype).__name__} from {type(content).__name__}")
    shape = tuple(int(n) for n in shape)
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.dtype.itemsize != len(content):
        raise pickle.UnpicklingError(f"an array of shape {shape} of {dtype.dtype} from {len(content)} bytes")
    return np.frombuffer(content, dtype.dtype).reshape(shape, order=order)


def _scalar(dtype, content) -> np.generic:
    return _from_buffer(content, dtype, (), "C")[()]


def _encode(text, encoding) -> bytes:
    """How protocols before 3 write bytes."""
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError(f"an encoding {encoding!r} of {type(text).__name__}")
    return text.encode("latin-1")


def _empty_bytes() -> bytes:
    """The same of no bytes."""
    return b""


def _only_a_name(*_):
    raise pickle.UnpicklingError("an array that is made by its class")


NUMPY: Allowed = {
    ("numpy", "dtype"): _DType, ("numpy", "ndarray"): _only_a_name,
    ("_codecs", "encode"): _encode, ("__builtin__", "bytes"): _empty_bytes} | {
    (f"numpy.{core}.{module}", name): function for core in ("core", "_core") for module, name, function in (
        ("multiarray", "_reconstruct", _reconstruct), ("multiarray", "scalar", _scalar),
        ("numeric", "_frombuffer", _from_buffer))}
