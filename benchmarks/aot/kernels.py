"""Kernels of an optimized HLO module: what each reads, writes and computes.

A kernel reads each operand once. A gather reads the rows that it fetches; of an array that fits into
a quarter of the last cache, memory delivers it at most once (`Kernel.from_memory`). A scatter reads and
writes the rows that it adds. The body of a loop counts as often as the loop runs, if that is known.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

from benchmarks.aot.hlo import Operation, SourceLines, arrays, parse

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "domain",
}  # fmt: skip
_CONTROL = {"while", "conditional", "call", "async-start", "async-done", "async-update"}
_MOVES = {
    "copy", "copy-start", "copy-done", "transpose", "reshape", "broadcast", "slice", "concatenate",
    "pad", "iota", "gather", "dynamic-slice", "dynamic-update-slice", "reverse", "bitcast-convert",
    "convert", "compare", "select", "and", "or", "not", "fusion", "custom-call", *_FREE, *_CONTROL,
}  # fmt: skip
_CACHED = 0.25  # fraction of the last cache for one array
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')  # in the configuration of a loop
_SUMS = ("read", "written", "cached", "matrix", "vector", "atomics", "gathers", "repeats")


@dataclasses.dataclass
class Kernel:
    """One launch, or call of a library.

    Attributes:
      name: Name of the operation.
      kind: Kind of the operation.
      where: Computation that contains it: the entry, the body of a loop or a branch.
      read, written: Bytes.
      cached: Bytes of `read` that the last cache delivers.
      matrix: Operations of matrix products.
      vector: Other operations.
      atomics: Number of scatter operations that add with atomic operations.
      gathers: Number of gather operations.
      source: Line of code of the package.
      repeats: Number of launches; the other numbers are sums over them.
    """

    name: str
    kind: str
    where: str
    read: float = 0.0
    written: float = 0.0
    cached: float = 0.0
    matrix: float = 0.0
    vector: float = 0.0
    atomics: int = 0
    gathers: int = 0
    source: str = ""
    repeats: int = 1

    @property
    def bytes(self) -> float:
        """Bytes that are read and written."""
        return self.read + self.written

    @property
    def from_memory(self) -> float:
        """Bytes without those that the last cache delivers."""
        return self.bytes - self.cached


def _times(kernel: Kernel, count: int) -> Kernel:
    """Return the sums over several launches of a kernel."""
    return dataclasses.replace(kernel, **{name: count * getattr(kernel, name) for name in _SUMS})


class Module:
    """Kernels of an optimized HLO module.

    Attributes:
      text: Text of the module.
      kernels: Kernels in the order of the text.
      loops: Name and body of each loop.
      conditionals: Number of conditionals.
    """

    def __init__(self, text: str, cache: float = 0.0):
        """Read a module.

        Args:
          text: Text of the module.
          cache: Size of the last cache of the device (B).
        """
        self.text, self._cache = text, cache
        self._computations, self._entry = parse(text)
        self._sources = SourceLines(text)
        self.kernels: list[Kernel] = []
        self.loops: list[tuple[str, str]] = []
        self.conditionals = 0
        self._seen: set[str] = set()
        self._walk(self._entry)

    def count(self, pattern: str) -> int:
        """Return the number of matches of a pattern in the text."""
        return len(re.findall(pattern, self.text))

    def within(self, computation: str) -> list[Kernel]:
        """Return the kernels of a computation and of those that it calls, each once."""
        repeats = self._repeats(computation)
        return [k for k in self.kernels if k.where in repeats]

    def repeated(self, computation: str | None = None) -> list[Kernel]:
        """Return the same kernels, with the sums over the iterations of loops of known length.

        Args:
          computation: Name of a computation; None for the whole program.
        """
        repeats = self._repeats(computation or self._entry)
        return [_times(k, repeats[k.where]) for k in self.kernels if k.where in repeats]

    def _repeats(self, computation: str) -> dict[str, int]:
        """Return how often a computation and those that it calls are evaluated per call."""
        counts: dict[str, int] = collections.defaultdict(int)
        left = [(computation, 1)]
        while left:
            name, times = left.pop()
            if name not in self._computations:
                continue
            counts[name] += times
            for operation in self._computations[name].values():
                known = _TRIPS.search(operation.rest) if operation.kind == "while" else None
                factor = int(known.group(1)) if known else 1
                left += [(callee, times * factor) for callee in self._callees(operation)]
        return dict(counts)

    @staticmethod
    def _callees(operation: Operation) -> list[str]:
        if operation.kind == "while":
            return operation.called("condition") + operation.called("body")
        if operation.kind == "conditional":
            return [
                *operation.called("branch_computations"),
                *operation.called("true_computation"),
                *operation.called("false_computation"),
            ]
        if operation.kind in ("call", "async-start"):
            return operation.called("to_apply") + operation.called("calls")
        return []

    def _walk(self, name: str) -> None:
        if name in self._seen or name not in self._computations:
            return
        self._seen.add(name)
        operations = self._computations[name]
        for operation in operations.values():
            if operation.kind == "while":
                self.loops.append((operation.name, operation.called("body")[0]))
            self.conditionals += operation.kind == "conditional"
            for callee in self._callees(operation):
                self._walk(callee)
            if operation.kind not in _FREE and operation.kind not in _CONTROL:
                self.kernels.append(self._kernel(operation, operations, name))

    def _kernel(self, operation: Operation, operations, where: str) -> Kernel:
        kernel = Kernel(operation.name, _kind(operation), where)
        kernel.source = self._sources.find(operation)
        if operation.kind == "fusion":
            self._add_fused(kernel, operation)
            return kernel
        _count(kernel, operation, operations)
        sizes = [operations[x].bytes if x in operations else 0 for x in operation.operands]
        kernel.written, kernel.read = operation.bytes, sum(sizes)
        if operation.kind in ("gather", "dynamic-slice"):
            self._add_fetched(kernel, operation.bytes, sizes[0])
            kernel.read += sum(sizes[1:]) - sum(sizes)
        elif fused := re.search(
            r'custom_call_target="__gpu\$xla.gpu.triton".*slots_(\w+)', operation.rest
        ):
            self._add_slots(kernel, fused.group(1), operation, operations)
        elif operation.kind == "dynamic-update-slice":
            kernel.read = kernel.written = sizes[1]
        elif operation.kind == "scatter":
            kernel.read = kernel.written = sum(sizes[2:])
        return kernel

    def _add_fetched(self, kernel: Kernel, fetched: float, array: float) -> None:
        """Add the bytes of a gather from an array."""
        kernel.read += fetched
        if array <= _CACHED * self._cache:
            kernel.cached += max(fetched - array, 0)

    @staticmethod
    def _add_slots(kernel: Kernel, face: str, operation: Operation, operations) -> None:
        """Add the gathered rows and the products of a kernel of layers/fused_kernels.py.

        Its programs read the atoms in their order, and neighbors are in the same molecule, so the
        first cache delivers rows after the first time.
        """
        gathered, index = operations[operation.operands[0]], operations[operation.operands[-1]]
        fetched = index.elements * gathered.bytes / gathered.dimensions[0]
        kernel.read += fetched - gathered.bytes
        kernel.cached += fetched - gathered.bytes
        basis = operations[operation.operands[-2]].dimensions[-1]
        scalars = {"send": operation, "back": gathered}.get(face)
        scalars = scalars or operations[operation.operands[1]]  # one of the arrays y
        width = scalars.dimensions[-1] / 4
        kernel.matrix += 5 * 2.0 * index.elements * basis * width

    def _add_fused(self, kernel: Kernel, operation: Operation) -> None:
        inner = self._computations[operation.called("calls")[0]]
        users = collections.defaultdict(list)
        for x in inner.values():
            for place, operand in enumerate(x.operands):
                users[operand].append((x, place))
        kernel.written = operation.bytes
        for x in inner.values():
            _count(kernel, x, inner)
            if x.kind == "parameter":
                self._add_parameter(kernel, x, users)
            elif x.kind == "scatter":
                updates = inner[x.operands[2]].bytes if x.operands[2] in inner else 0
                kernel.written += updates - (x.bytes if x.is_root else 0)
                kernel.read += updates
            elif x.kind == "dynamic-update-slice" and _is_result(x, users):
                kernel.written += inner[x.operands[1]].bytes - x.bytes
            if x.kind in ("fusion", "call") and x.called("calls"):
                nested = self._computations.get(x.called("calls")[0], {})
                for y in nested.values():
                    _count(kernel, y, nested)
        kernel.written = max(kernel.written, 0.0)

    def _add_parameter(self, kernel: Kernel, parameter: Operation, users) -> None:
        """Add the bytes that a fused kernel reads of a parameter."""
        fetched = list(_fetched(parameter, users))
        if None in fetched:  # some operation reads all of it
            kernel.read += parameter.bytes
        else:
            self._add_fetched(kernel, sum(fetched), parameter.bytes)


def _fetched(x: Operation, users) -> Iterator[float | None]:
    """Yield the bytes that each user fetches of an array, None for all of it."""
    for user, place in users[x.name]:
        if user.kind in ("gather", "dynamic-slice") and place == 0 or user.kind == "slice":
            yield user.bytes
        elif user.kind == "bitcast":
            yield from _fetched(user, users)
        elif user.kind in ("scatter", "dynamic-update-slice") and place == 0:
            yield 0
        else:
            yield None


def _is_result(x: Operation, users) -> bool:
    return x.is_root or any(u.is_root and u.kind in ("tuple", "bitcast") for u, _ in users[x.name])


def _kind(operation: Operation) -> str:
    patterns = {
        "custom-call": (r'custom_call_target="([^"]+)"',),
        "fusion": (r'"kind":"(__\w+)"', r"kind=k(\w+)"),
    }
    for pattern in patterns.get(operation.kind, ()):
        if found := re.search(pattern, operation.rest):
            return f"{operation.kind} {found.group(1)}"
    return operation.kind


def _count(kernel: Kernel, operation: Operation, operations) -> None:
    """Add the operations, gathers and atomic scatters of an operation."""
    first = operations.get(operation.operands[0]) if operation.operands else None
    if operation.kind == "dot" and first is not None:
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", operation.rest).group(1)
        terms = math.prod(first.dimensions[int(d)] for d in contracted.split(",") if d)
        kernel.matrix += 2.0 * operation.elements * terms
    elif operation.kind == "custom-call" and re.search(
        r'custom_call_target="[^"]*(gemm|matmul)', operation.rest
    ):
        kernel.matrix += _library_product(operation, operations)
    elif operation.kind == "scatter":
        kernel.atomics += "unique_indices=true" not in operation.rest
        kernel.vector += sum(operations[x].elements for x in operation.operands[2:3])
    elif operation.kind == "gather":
        kernel.gathers += 1
    elif operation.kind in ("reduce", "reduce-window"):
        kernel.vector += first.elements if first is not None else 0
    elif operation.kind not in _MOVES:
        kernel.vector += operation.elements


def _library_product(operation: Operation, operations) -> float:
    """Return the operations of a product of matrices in a library."""
    sizes = [math.prod(operations[x].dimensions) for x in operation.operands[:2]]
    out = math.prod(arrays(operation.shape)[0][1])
    batch = re.search(r'"lhs_batch_dimensions":\[([^\]]*)\]', operation.rest)
    left = operations[operation.operands[0]].dimensions
    indices = batch.group(1).split(",") if batch else []
    count = math.prod(left[int(d.strip('"'))] for d in indices if d)
    return 2.0 * count * math.sqrt(sizes[0] / count * (sizes[1] / count) * (out / count))
