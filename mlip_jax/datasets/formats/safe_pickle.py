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
must format values with `shown`.

NUMPY allows arrays and scalars of numbers. Data types with fields or objects are rejected: their
stored flags decide whether bytes are interpreted as pointers.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import reprlib
import threading
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from mlip_jax.datasets.reader import DatasetError

Allowed = Mapping[tuple[str, str], Callable]

# Each opcode creates at most one object of about 100 bytes. The longest of 3,000 trajectories of
# PubChemQCR has 80,000 opcodes, an ensemble of 200 conformers of GEOM 40,000.
_MAX_OPCODES = 4_000_000
# Tuples as keys are hashed cell by cell, again for each reference, to any depth. 45 nested tuples
# with two references each take hours; about 10,000 with one reference each exceed the stack of the
# process. The count includes the cells of each tuple and of the tuples in it, for each reference.
# The ensemble above has 1,000.
_MAX_CELLS = 100_000
_MAX_SETS = 10_000  # 216 bytes each; no data file has any
_MAX_LONG_INTEGERS = 10_000  # integers with equal hashes take quadratic time


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2


def shown(value: Any) -> str:
    """Format a value of a pickle for messages, cut at about 200 characters and two levels."""
    return _SHORT.repr(value)


def load(file: BinaryIO, *, allowed: Allowed, source: str) -> Any:
    """Apply `loads` to the rest of a file that is open for reading in binary mode."""
    return loads(file.read(), allowed=allowed, source=source)


def loads(data: bytes, *, allowed: Allowed, source: str, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Return the value of a pickle.

    Args:
      data: One complete pickle of any protocol up to 5.
      allowed: Functions that the pickle may call: {(module, name): function to call instead}. If
        empty, only plain values are allowed.
      source: File and record, for messages.
      persistent: Function that checks and replaces a persistent id; None rejects these ids.

    Raises:
      DatasetError: The pickle requests something that is not allowed, or is truncated, corrupted or
        not a pickle.
    """
    check(data, source, allow_persistent=persistent is not None)
    _copies.left = 2 * len(data) + 4096
    try:
        return _Unpickler(data, allowed, source, persistent).load()
    except DatasetError:
        raise
    except Exception as error:  # corrupted pickles raise errors of any type, even MemoryError
        raise DatasetError(
            f"{source}: cannot be read as a pickle ({type(error).__name__}: {error}). It is damaged or "
            "malicious; download or make it again."
        ) from error


class _Unpickler(pickle.Unpickler):
    """Unpickler that replaces every name in a pickle by the caller's function for it."""

    def __init__(self, data, allowed, source, persistent):
        super().__init__(io.BytesIO(data))
        self._allowed, self._source, self.persistent_load = allowed, source, persistent

    def find_class(self, module, name):
        if (module, name) not in self._allowed:
            asked = f"{module}.{name}"[:200]
            raise DatasetError(
                f"{self._source}: the pickle asks for '{asked}', which this format does not need. This file may be "
                "malicious; it was not executed. Get it from its original source."
            )
        return _Admitted(self._allowed[module, name])


class _Admitted:
    """Callable without any other use: otherwise a pickle could set attributes of the function."""

    __slots__ = ("_function",)

    def __init__(self, function):
        object.__setattr__(self, "_function", function)

    def __call__(self, *args):
        return self._function(*args)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError(f"changes {shown(name)} of a function")

    def __setstate__(self, state):
        raise pickle.UnpicklingError("changes a function")


# --- Check of the opcodes without running them ---

_REFUSED = {
    "EXT1": "a registered extension type",
    "EXT2": "a registered extension type",
    "EXT4": "a registered extension type",
    "PERSID": "a persistent id",
    "BINPERSID": "a persistent id",
    "NEXT_BUFFER": "a buffer outside of the file",
}
_TUPLES = (b"t", b"\x85", b"\x86", b"\x87")
_SETS = (b"\x8f", b"\x91")
_LONG = (b"L", b"\x8a", b"\x8b")
_BY_CODE = {op.code.encode("latin-1"): op for op in pickletools.opcodes}
_COUNT_WIDTH = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_COUNTED = {
    code: _COUNT_WIDTH[op.arg.n]
    for code, op in _BY_CODE.items()
    if op.arg is not None and op.arg.n in _COUNT_WIDTH
}


def _plain_opcodes() -> re.Pattern:
    """Return a pattern for at most _RUN opcodes, with arguments, that need no further check."""
    special = {b".", b"r", b"p", b"c", b"i", b"I", *_LONG, *_TUPLES, *_SETS, *_COUNTED}
    by_size: dict[int, list[bytes]] = {}
    for code, op in _BY_CODE.items():
        if code not in special and op.name not in _REFUSED:
            by_size.setdefault(op.arg.n if op.arg else 0, []).append(re.escape(code))
    terms = [
        b"["
        + b"".join(codes)
        + b"]"
        + (b"[^\n]*+\n" if size == pickletools.UP_TO_NEWLINE else b".{%d}" % size)
        for size, codes in by_size.items()
    ]
    # Memo entries up to 2**24, integers of 64 bits, and two lines for a global.
    terms += [rb"r...\x00", rb"p[0-9]{1,7}\n", rb"I[^\n]{0,20}\n", rb"[ci][^\n]*+\n[^\n]*+\n"]
    return re.compile(b"(?:" + b"|".join(terms) + b"){0,%d}+" % _RUN, re.DOTALL)


_RUN = 1000
_PLAIN = _plain_opcodes()


def check(data: bytes, source: str, allow_persistent: bool = False) -> None:
    """Check the opcodes of a pickle without running them.

    Raises:
      DatasetError: The opcodes do not form one complete pickle, or their kind or number is not
        needed by any data file.
    """
    position, opcodes, tuples, sets, long = 0, 0, 0, 0, 0
    while opcodes <= _MAX_OPCODES:
        start = position
        position = _PLAIN.match(data, position).end()
        opcodes += min(position - start, _RUN) + 1  # upper bound: at least one byte each
        code = data[position : position + 1]
        if code == b".":
            break
        if code in _TUPLES:
            position, tuples = position + 1, tuples + 1
            continue
        if code == b"Q" and allow_persistent:
            position += 1
            continue
        if code in _SETS and sets < _MAX_SETS:
            position, sets = position + 1, sets + 1
            continue
        if code in _LONG:
            long += 1
            if long > _MAX_LONG_INTEGERS:
                raise DatasetError(
                    _malicious(source, f"more than {_MAX_LONG_INTEGERS} long integers")
                )
        if code == b"L":
            position = data.find(b"\n", position) + 1 or len(data)
            continue
        if code in _COUNTED:
            start = position + 1 + _COUNTED[code]
            position = start + int.from_bytes(data[position + 1 : start], "little")
            if position < len(data):
                continue
        elif position - start:
            continue  # the run ended at its maximum length
        raise DatasetError(f"{source}: {_what_is_wrong(code, data, position)}")
    else:
        raise DatasetError(_malicious(source, f"more than {_MAX_OPCODES} values"))
    if position + 1 != len(data):
        raise DatasetError(
            f"{source}: {len(data) - position - 1} bytes follow the end of the pickle; expected one "
            "pickle and nothing else. The file is damaged; download or make it again."
        )
    if tuples and _cells(data, source) > _MAX_CELLS:
        raise DatasetError(
            _malicious(source, f"tuples of tuples with more than {_MAX_CELLS} cells")
        )


def _malicious(source: str, what: str) -> str:
    """Return the message for a pickle that exceeds a limit."""
    return (
        f"{source}: the pickle makes {what}, which no data file needs. This file may be malicious; it was not "
        "executed."
    )


def _cells(data: bytes, source: str) -> int:
    """Return the number of cells of all tuples that the code pushes, including nested tuples.

    The stack is simulated with the number of cells instead of each value. Counting stops above
    _MAX_CELLS.
    """
    stack: list[int] = []
    below: list[list[int]] = []
    memo: dict[int, int] = {}
    total = 0
    try:
        for op, argument, _ in pickletools.genops(data):
            name, pushed = op.name, 1
            if name in _NOTHING:
                continue
            if name in _PUTS:
                memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
                continue
            if name == "MARK":
                below.append(stack)
                stack = []
                continue
            if name in _GETS:
                pushed = memo[argument]
            elif name == "DUP":
                pushed = stack[-1]
            elif name == "POP" and not stack:  # removes the mark
                stack = below.pop()
                continue
            elif name in _UP_TO_MARK:
                values, stack = stack, below.pop()
                if name in _INTO_BELOW:
                    stack[-1]  # raises IndexError if the stack is empty
                    continue
                if name == "POP_MARK":
                    continue
                if name == "TUPLE":
                    pushed = 1 + sum(values)
            else:
                taken = _TAKEN.get(name, 0)
                values = stack[len(stack) - taken :]
                if len(stack) < taken:
                    raise IndexError
                del stack[len(stack) - taken :]
                if name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                    pushed = 1 + sum(values)
                elif name == "BUILD":  # with the state None it does not change the value
                    pushed = values[0]
                elif name == "POP":
                    continue
            stack.append(pushed)
            if pushed > 1:
                total += pushed
                if total > _MAX_CELLS:
                    break
    except (IndexError, KeyError, ValueError) as error:
        raise DatasetError(
            f"{source}: the pickle takes a value that is not there. It is damaged or malicious; "
            "download or make it again."
        ) from error
    return total


_NOTHING = {"PROTO", "FRAME", "STOP", "READONLY_BUFFER"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_UP_TO_MARK = {
    "TUPLE",
    "LIST",
    "DICT",
    "FROZENSET",
    "APPENDS",
    "SETITEMS",
    "ADDITEMS",
    "POP_MARK",
    "INST",
    "OBJ",
}
_INTO_BELOW = {"APPENDS", "SETITEMS", "ADDITEMS"}
# Number of values that an opcode takes from the stack before it pushes one; POP pushes none.
_TAKEN = {
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "APPEND": 2,
    "SETITEM": 3,
    "BUILD": 2,
    "REDUCE": 2,
    "NEWOBJ": 2,
    "NEWOBJ_EX": 3,
    "STACK_GLOBAL": 2,
    "POP": 1,
    "BINPERSID": 1,
}


def _what_is_wrong(code: bytes, data: bytes, position: int) -> str:
    """Return the message for the opcode at which the check failed."""
    op = _BY_CODE.get(code)
    if op is not None and op.name in _REFUSED:
        return (
            f"the pickle asks for {_REFUSED[op.name]} (opcode {op.name}), which no data file needs. This file may "
            "be malicious; it was not executed."
        )
    if code in _SETS:
        return (
            f"the pickle makes more than {_MAX_SETS} sets, which no data file needs. This file may be malicious; "
            "it was not executed."
        )
    if code == b"I" and b"\n" in data[position:]:
        return (
            "the pickle has an integer of more than 20 digits, which no data file needs. This file may be "
            "malicious; it was not executed."
        )
    if code in (b"r", b"p") and len(data) - position > 8:
        return (
            "the pickle asks for a memo of more than 16 million entries. This file may be malicious; it was not "
            "executed."
        )
    if not code or op is not None:
        return f"the pickle is truncated ({len(data)} bytes; its end is missing). Download or make the file again."
    return (
        f"not a pickle, or a damaged one: byte {position} is {code!r}, where an opcode is expected. Download or "
        "make the file again."
    )


# --- Arrays and scalars of numbers ---

_copies = threading.local()  # .left: bytes that the functions of this pickle may still copy


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
                f"array type {shown(code)}, where only numbers and logical values are allowed"
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
                f"array type with the state {shown(state)}, where only a byte order is allowed"
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
        raise pickle.UnpicklingError(f"an array of shape {shown(shape)}")
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
        raise pickle.UnpicklingError(f"an encoding {shown(encoding)} of {type(text).__name__}")
    _count_copy(len(text))
    return text.encode("latin-1")


def _empty_bytes() -> bytes:
    """Return empty bytes as written by protocols before 3."""
    return b""


def _only_a_name(*_):
    """Raise UnpicklingError: numpy.ndarray is allowed only as an argument of _reconstruct."""
    raise pickle.UnpicklingError("an array that is made by its class")


NUMPY: Allowed = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _only_a_name,
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
