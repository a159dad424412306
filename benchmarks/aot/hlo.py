"""Text of an optimized HLO module as computations of operations.

XLA gives no cost analysis of a program for a device that is absent, so its text is read.
"""

from __future__ import annotations

import dataclasses
import math
import re

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16,
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16|c64|c128|f8e\w+)\[([\d,]*)\]")
_OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*)?\{\s*$")


@dataclasses.dataclass
class Operation:
    """Operation of a computation.

    Attributes:
      name: Name of the result.
      kind: Operation, such as "fusion" or "dot".
      shape: Text of the type of the result.
      operands: Names of the operands.
      rest: Text of operands and attributes.
      is_root: Whether it is the result of the computation.
    """

    name: str
    kind: str
    shape: str
    operands: list[str]
    rest: str
    is_root: bool = False

    @property
    def bytes(self) -> int:
        """Size of the result in bytes."""
        return sum(math.prod(d) * _BITS.get(kind, 8) // 8 for kind, d in arrays(self.shape))

    @property
    def elements(self) -> int:
        """Number of elements of the result."""
        return sum(math.prod(d) for _, d in arrays(self.shape))

    @property
    def dimensions(self) -> list[int]:
        """Dimensions of the first array of the result."""
        return arrays(self.shape)[0][1]

    def called(self, attribute: str) -> list[str]:
        """Return the names of the computations of an attribute such as "calls" or "body"."""
        found = re.search(attribute + r"=\{?%?([\w.\-]+(?:, ?%?[\w.\-]+)*)", self.rest)
        return [x.strip().lstrip("%") for x in found.group(1).split(",")] if found else []


def arrays(shape: str) -> list[tuple[str, list[int]]]:
    """Return the dtypes and dimensions of the arrays of a type."""
    return [(kind, [int(x) for x in d.split(",") if x]) for kind, d in _SHAPE.findall(shape)]


def parse(text: str) -> tuple[dict[str, dict[str, Operation]], str]:
    """Return the operations of each computation by name, and the name of the entry."""
    computations: dict[str, dict[str, Operation]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            head = _COMPUTATION.match(line) if line.endswith("{") else None
            if head and not line.startswith("HloModule"):
                current = computations.setdefault(head.group(2), {})
                entry = head.group(2) if head.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif (operation := _parse_operation(line)) is not None:
            current[operation.name] = operation
    return computations, entry


def _parse_operation(line: str) -> Operation | None:
    found = _OPERATION.match(line)
    if not found:
        return None
    root, name, right = found.groups()
    shape, right = _split_type(right)
    call = re.match(r"([\w\-]+)\(", right)
    if not call:
        return None
    inside, rest = _split_at_parenthesis(right[call.end() :])
    operands = re.findall(r"%([\w.\-]+)", inside)
    operands = operands or [x.strip() for x in inside.split(",") if x.strip()]
    return Operation(name, call.group(1), shape, operands, f"({inside}) {rest}", bool(root))


def _split_type(right: str) -> tuple[str, str]:
    """Split "(f32[2], s32[]) tuple(...)" after the type."""
    if right.startswith("("):
        inside, rest = _split_at_parenthesis(right[1:])
        return f"({inside})", rest.strip()
    shape, _, rest = right.partition(" ")
    return shape, rest


def _split_at_parenthesis(text: str) -> tuple[str, str]:
    """Split a text at the parenthesis that closes one that was opened before it."""
    depth = 1
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


class SourceLines:
    """Lines of code that operations come from, by the tables at the beginning of a module."""

    def __init__(self, text: str, inside: str = "mlip_jax/"):
        """Read the tables.

        Args:
          text: Text of the module.
          inside: Part of the path of files that count; calls inside of others are skipped.
        """
        head = text[: text.find("\n%") + 1 or len(text)]
        self._inside = inside
        files = self._section(head, "FileNames", "FunctionNames")
        self._files = {int(n): name for n, name in re.findall(r'(\d+) "(.*)"', files)}
        self._places = {
            int(n): (int(file), int(line))
            for n, file, line in re.findall(
                r"^(\d+) \{file_name_id=(\d+).*?\bline=(\d+)",
                self._section(head, "FileLocations", "StackFrames"),
                re.MULTILINE,
            )
        }
        self._frames = {
            int(n): (int(place), int(parent or 1) - 1)  # 1 for none
            for n, place, parent in re.findall(
                r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?",
                self._section(head, "StackFrames", "\n\n"),
                re.MULTILINE,
            )
        }

    @staticmethod
    def _section(head: str, begin: str, end: str) -> str:
        start = head.find(begin)
        stop = head.find(end, start + len(begin))
        return head[start + len(begin) : stop if stop >= 0 else len(head)] if start >= 0 else ""

    def find(self, operation: Operation) -> str:
        """Return "file.py:line" of the innermost call inside of the package, or ""."""
        found = re.search(r"stack_frame_id=(\d+)", operation.rest)
        frame, seen = int(found.group(1)) if found else 0, set()
        while frame in self._frames and frame not in seen:
            seen.add(frame)
            place, parent = self._frames[frame]
            file, line = self._places.get(place, (0, 0))
            name = self._files.get(file, "")
            if self._inside in name:
                return f"{name.rpartition(self._inside)[2]}:{line}"
            frame = parent
        return ""
