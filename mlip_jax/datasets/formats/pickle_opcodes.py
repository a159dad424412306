"""Check of the opcodes of an untrusted pickle without running them, for safe_pickle.py."""

from __future__ import annotations

import pickletools
import re
import warnings
from collections.abc import Iterator
from typing import Any

from mlip_jax.datasets.reader import DatasetError

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
_REJECTED = {
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
        if code not in special and op.name not in _REJECTED:
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
        raise DatasetError(f"{source}: {_describe_error(code, data, position)}")
    else:
        raise DatasetError(_malicious(source, f"more than {_MAX_OPCODES} values"))
    if position + 1 != len(data):
        raise DatasetError(
            f"{source}: {len(data) - position - 1} bytes follow the end of the pickle; expected "
            "one pickle and nothing else. The file is corrupted; download it again or recreate it."
        )
    if (tuples or sets) and count_cells(data, source) > _MAX_CELLS:
        raise DatasetError(
            _malicious(source, f"tuples of tuples with more than {_MAX_CELLS} cells")
        )


def read_opcodes(data: Any) -> Iterator[tuple]:
    """Yield (opcode, argument, position) of a pickle, given as bytes or as an open file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escape sequences in names
        yield from pickletools.genops(data)


def _malicious(source: str, content: str) -> str:
    """Return the message for a pickle that exceeds a limit."""
    return (
        f"{source}: the pickle creates {content}, which no data file needs. This file may be "
        "malicious; it was not executed."
    )


def count_cells(data: bytes, source: str) -> int:
    """Return the number of cells of all tuples that the code pushes, including nested tuples.

    The stack is simulated with the number of cells instead of each value. Counting stops above
    _MAX_CELLS.
    """
    stack: list[int] = []
    below: list[list[int]] = []
    memo: dict[int, int] = {}
    total = 0
    try:
        for op, argument, _ in read_opcodes(data):
            name, pushed = op.name, 1
            if name in _NO_EFFECT:
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
            elif name in _TO_MARK:
                values, stack = stack, below.pop()
                if name in _EXTENDS:
                    stack[-1]  # raises IndexError if the stack is empty
                    continue
                if name == "POP_MARK":
                    continue
                if name in ("TUPLE", "FROZENSET"):
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
            f"{source}: the pickle uses a value that does not exist. It is corrupted or malicious; "
            "download it again or recreate it."
        ) from error
    return total


_NO_EFFECT = {"PROTO", "FRAME", "STOP", "READONLY_BUFFER"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_TO_MARK = {
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
_EXTENDS = {"APPENDS", "SETITEMS", "ADDITEMS"}
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


def _describe_error(code: bytes, data: bytes, position: int) -> str:
    """Return the message for the opcode at which the check failed."""
    op = _BY_CODE.get(code)
    if op is not None and op.name in _REJECTED:
        return (
            f"the pickle requests {_REJECTED[op.name]} (opcode {op.name}), which no data file "
            "needs. This file may be malicious; it was not executed."
        )
    if code in _SETS:
        return (
            f"the pickle creates more than {_MAX_SETS} sets, which no data file needs. This file "
            "may be malicious; it was not executed."
        )
    if code == b"I" and b"\n" in data[position:]:
        return (
            "the pickle contains an integer of more than 20 digits, which no data file needs. This "
            "file may be malicious; it was not executed."
        )
    if code in (b"r", b"p") and len(data) - position > 8:
        return (
            "the pickle requests a memo of more than 16 million entries. This file may be "
            "malicious; it was not executed."
        )
    if not code or op is not None:
        return (
            f"the pickle is truncated ({len(data)} bytes; its end is missing). Download the file "
            "again or recreate it."
        )
    return (
        f"not a pickle, or a corrupted one: byte {position} is {code!r}, expected an opcode. "
        "Download the file again or recreate it."
    )
