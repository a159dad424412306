"""Pickles from strangers: loading one without running what it asks for.

A pickle is a small program, and may name any function of any module to be called with any arguments. Here it gets
plain Python values (dict, list, tuple, str, bytes, numbers, sets) and what the caller admits by name, nothing else:

- a name that is not admitted is refused before it is imported, and what is admitted is the CALLER'S function for it,
  which need not be the one that the name stands for. The pickle can call it, but not change or look into it;
- the code is read through before it runs: numbers that stand for registered types, persistent ids, memo entries
  far beyond the data and lengths beyond the end are refused there, since they cost memory before they fail. So is
  code of more opcodes, sets, long integers or cells of tuples than data have, each of which takes more memory or time
  than it takes bytes;
- what functions make by copying is together no more than twice the pickle.

A list can stand in itself and in others many times: a few bytes then stand for a structure without end. Code that
walks through a value must look at the type of what it meets, and messages must show it by `shown`.

NUMPY admits arrays and scalars of numbers. Data types with fields or objects are refused: their stored flags decide
whether bytes are taken for pointers.
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

# Each opcode makes one object at most, of about 100 bytes. The longest of 3,000 trajectories of PubChemQCR has 80,000,
# an ensemble of 200 conformers of GEOM 40,000.
_MAX_OPCODES = 4_000_000
# Tuples as keys are hashed cell by cell, again for each mention, without a limit on the depth: 45 tuples in one another
# with two mentions each take hours, some 10,000 with one the stack of the process. Counted are the cells of each tuple
# and of the tuples in it, for each mention. That ensemble has 1,000.
_MAX_CELLS = 100_000
_MAX_SETS = 10_000  # 216 bytes each; no data have any
_MAX_LONG_INTEGERS = 10_000  # can be made to have the same hash, which takes the square of their number


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2


def shown(value: Any) -> str:
    """A value of a pickle for messages, cut at some 200 characters and two levels of nesting."""
    return _SHORT.repr(value)


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
    _copies.left = 2 * len(data) + 4096
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
            asked = f"{module}.{name}"[:200]
            raise DatasetError(
                f"{self._source}: the pickle asks for '{asked}', which this format does not need. This file may be "
                "malicious; it was not executed. Get it from its original source.")
        return _Admitted(self._allowed[module, name])


class _Admitted:
    """Something that can be called, and nothing else: a pickle could otherwise set attributes of what it is given."""

    __slots__ = ("_function",)

    def __init__(self, function):
        object.__setattr__(self, "_function", function)

    def __call__(self, *args):
        return self._function(*args)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError(f"changes {shown(name)} of a function")

    def __setstate__(self, state):
        raise pickle.UnpicklingError("changes a function")


# --- The opcodes, read through without running them ---

_REFUSED = {
    "EXT1": "a registered extension type", "EXT2": "a registered extension type",
    "EXT4": "a registered extension type", "PERSID": "a persistent id", "BINPERSID": "a persistent id",
    "NEXT_BUFFER": "a buffer outside of the file"}
_TUPLES = (b"t", b"\x85", b"\x86", b"\x87")
_SETS = (b"\x8f", b"\x91")
_LONG = (b"L", b"\x8a", b"\x8b")
_BY_CODE = {op.code.encode("latin-1"): op for op in pickletools.opcodes}
_COUNT_WIDTH = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4,
                pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8}
_COUNTED = {code: _COUNT_WIDTH[op.arg.n] for code, op in _BY_CODE.items()
            if op.arg is not None and op.arg.n in _COUNT_WIDTH}


def _plain_opcodes() -> re.Pattern:
    """A run of the opcodes that need no closer look, with their arguments; at most _RUN of them."""
    special = {b".", b"r", b"p", b"c", b"i", b"I", *_LONG, *_TUPLES, *_SETS, *_COUNTED}
    by_size: dict[int, list[bytes]] = {}
    for code, op in _BY_CODE.items():
        if code not in special and op.name not in _REFUSED:
            by_size.setdefault(op.arg.n if op.arg else 0, []).append(re.escape(code))
    terms = [b"[" + b"".join(codes) + b"]" + (b"[^\n]*+\n" if size == pickletools.UP_TO_NEWLINE else b".{%d}" % size)
             for size, codes in by_size.items()]
    # Memo entries up to 2**24; integers of 64 bits; two lines for a global.
    terms += [rb"r...\x00", rb"p[0-9]{1,7}\n", rb"I[^\n]{0,20}\n", rb"[ci][^\n]*+\n[^\n]*+\n"]
    return re.compile(b"(?:" + b"|".join(terms) + b"){0,%d}+" % _RUN, re.DOTALL)


_RUN = 1000
_PLAIN = _plain_opcodes()


def check(data: bytes, source: str) -> None:
    """Read a pickle's opcodes without running them.

    Raises:
      DatasetError: They do not make one whole pickle, or are of a kind or number that no data file needs.
    """
    position, opcodes, tuples, sets, long = 0, 0, 0, 0, 0
    while opcodes <= _MAX_OPCODES:
        start = position
        position = _PLAIN.match(data, position).end()
        opcodes += min(position - start, _RUN) + 1  # not more than these
        code = data[position:position + 1]
        if code == b".":
            break
        if code in _TUPLES:
            position, tuples = position + 1, tuples + 1
            continue
        if code in _SETS and sets < _MAX_SETS:
            position, sets = position + 1, sets + 1
            continue
        if code in _LONG:
            long += 1
            if long > _MAX_LONG_INTEGERS:
                raise DatasetError(_malicious(source, f"more than {_MAX_LONG_INTEGERS} long integers"))
        if code == b"L":
            position = data.find(b"\n", position) + 1 or len(data)
            continue
        if code in _COUNTED:
            start = position + 1 + _COUNTED[code]
            position = start + int.from_bytes(data[position + 1:start], "little")
            if position < len(data):
                continue
        elif position - start:
            continue  # the run was cut by its length
        raise DatasetError(f"{source}: {_what_is_wrong(code, data, position)}")
    else:
        raise DatasetError(_malicious(source, f"more than {_MAX_OPCODES} values"))
    if position + 1 != len(data):
        raise DatasetError(f"{source}: {len(data) - position - 1} bytes follow the end of the pickle; expected one "
                           "pickle and nothing else. The file is damaged; download or make it again.")
    if tuples and _cells(data, source) > _MAX_CELLS:
        raise DatasetError(_malicious(source, f"tuples of tuples with more than {_MAX_CELLS} cells"))


def _malicious(source: str, what: str) -> str:
    return (f"{source}: the pickle makes {what}, which no data file needs. This file may be malicious; it was not "
            "executed.")


def _cells(data: bytes, source: str) -> int:
    """Cells of all tuples that the code puts on its stack, those in other tuples included; no more than counts.

    The stack is followed with the number of cells in the place of each value.
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
            elif name == "POP" and not stack:  # takes the mark
                stack = below.pop()
                continue
            elif name in _UP_TO_MARK:
                values, stack = stack, below.pop()
                if name in _INTO_BELOW:
                    stack[-1]  # must be there
                    continue
                if name == "POP_MARK":
                    continue
                if name == "TUPLE":
                    pushed = 1 + sum(values)
            else:
                taken = _TAKEN.get(name, 0)
                values = stack[len(stack) - taken:]
                if len(stack) < taken:
                    raise IndexError
                del stack[len(stack) - taken:]
                if name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                    pushed = 1 + sum(values)
                elif name == "BUILD":  # with the state None it leaves anything as it is
                    pushed = values[0]
                elif name == "POP":
                    continue
            stack.append(pushed)
            if pushed > 1:
                total += pushed
                if total > _MAX_CELLS:
                    break
    except (IndexError, KeyError, ValueError) as error:
        raise DatasetError(f"{source}: the pickle takes a value that is not there. It is damaged or malicious; "
                           "download or make it again.") from error
    return total


_NOTHING = {"PROTO", "FRAME", "STOP", "READONLY_BUFFER"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_UP_TO_MARK = {"TUPLE", "LIST", "DICT", "FROZENSET", "APPENDS", "SETITEMS", "ADDITEMS", "POP_MARK", "INST", "OBJ"}
_INTO_BELOW = {"APPENDS", "SETITEMS", "ADDITEMS"}
# Values that an opcode takes from the stack before it pushes one; POP pushes none.
_TAKEN = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 2, "SETITEM": 3, "BUILD": 2, "REDUCE": 2, "NEWOBJ": 2,
          "NEWOBJ_EX": 3, "STACK_GLOBAL": 2, "POP": 1}


def _what_is_wrong(code: bytes, data: bytes, position: int) -> str:
    op = _BY_CODE.get(code)
    if op is not None and op.name in _REFUSED:
        return (f"the pickle asks for {_REFUSED[op.name]} (opcode {op.name}), which no data file needs. This file may "
                "be malicious; it was not executed.")
    if code in _SETS:
        return (f"the pickle makes more than {_MAX_SETS} sets, which no data file needs. This file may be malicious; "
                "it was not executed.")
    if code == b"I" and b"\n" in data[position:]:
        return ("the pickle has an integer of more than 20 digits, which no data file needs. This file may be "
                "malicious; it was not executed.")
    if code in (b"r", b"p") and len(data) - position > 8:
        return ("the pickle asks for a memo of more than 16 million entries. This file may be malicious; it was not "
                "executed.")
    if not code or op is not None:
        return (f"the pickle is truncated ({len(data)} bytes; its end is missing). Download or make the file again.")
    return (f"not a pickle, or a damaged one: byte {position} is {code!r}, where an opcode is expected. Download or "
            "make the file again.")


# --- Arrays and scalars of numbers ---

_copies = threading.local()  # .left: bytes that this pickle's functions may still make


def _count_copy(size: int) -> None:
    _copies.left -= size
    if _copies.left < 0:
        raise pickle.UnpicklingError("copies of the same bytes over and over")


class _DType:
    """What a pickle makes of numpy.dtype: the character and size, then byte order by its state."""

    def __init__(self, code, align=False, copy=True):
        if not isinstance(code, str) or not re.fullmatch(r"[biufc](1|2|4|8|16)", code):
            raise pickle.UnpicklingError(f"array type {shown(code)}, where only numbers and logical values are "
                                         "allowed")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        if not isinstance(state, tuple) or len(state) < 8 or state[1] not in ("<", ">", "|", "=") or state[2:8] != (
                None, None, None, -1, -1, 0):
            raise pickle.UnpicklingError(f"array type with the state {shown(state)}, where only a byte order is "
                                         "allowed")
        self.dtype = self.dtype.newbyteorder(state[1])


class Array(np.ndarray):
    """numpy.ndarray with a checked state; `numpy.asarray` gives the plain one."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, content = state
        values = _from_buffer(content, dtype, shape, "F" if fortran else "C")
        _count_copy(len(content))
        super().__setstate__((1, values.shape, values.dtype, bool(fortran), bytes(content)))

    def __setitem__(self, key, value):
        raise pickle.UnpicklingError("changes an array")  # the key could be a list of lists without end


def _reconstruct(_kind, _shape, _code) -> Array:
    """An array that gets its content by __setstate__."""
    return np.ndarray.__new__(Array, (0,), np.int8)


def _from_buffer(content, dtype, shape, order) -> np.ndarray:
    if not isinstance(dtype, _DType) or not isinstance(content, bytes | bytearray) or order not in ("C", "F"):
        raise pickle.UnpicklingError(f"an array of {type(dtype).__name__} from {type(content).__name__}")
    if not isinstance(shape, tuple) or len(shape) > 32 or not all(isinstance(n, int) and n < 2**48 for n in shape):
        raise pickle.UnpicklingError(f"an array of shape {shown(shape)}")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.dtype.itemsize != len(content):
        raise pickle.UnpicklingError(f"an array of shape {shape} of {dtype.dtype} from {len(content)} bytes")
    values = np.frombuffer(content, dtype.dtype).reshape(shape, order=order)
    values.flags.writeable = False
    return values


def _scalar(dtype, content) -> np.generic:
    return _from_buffer(content, dtype, (), "C")[()]


def _encode(text, encoding) -> bytes:
    """How protocols before 3 write bytes."""
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError(f"an encoding {shown(encoding)} of {type(text).__name__}")
    _count_copy(len(text))
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
