"""Memory that compiled programs need, as the compiler reports it, and memory that devices have."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import jax

log = logging.getLogger(__name__)

# _USABLE: fraction of the free memory that a program may use.
_USABLE = 0.9
# _AIMED: fraction of the usable memory that a smaller batch is chosen for.
_AIMED = 0.9
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_GROUPS_OF_PROCESS = Path("/proc/self/cgroup")


class ProgramTooLarge(Exception):  # noqa: N818, a condition that callers handle
    """A program needs more memory than its device has.

    Attributes:
      needed: Memory that the program needs in addition to its arguments (bytes).
      available: Memory that it may use (bytes).
    """

    def __init__(self, needed: int, available: int):
        super().__init__(
            f"the program needs {needed / 2**30:.3g} GiB in addition to its arguments, but only "
            f"{available / 2**30:.3g} GiB may be used"
        )
        self.needed, self.available = needed, available


def available_bytes(device: jax.Device) -> int | None:
    """Return the memory that a program may use in addition to its arguments, or None if unknown.

    CPU devices of a process share the free memory of the computer.
    """
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(_USABLE * (statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)))
    if device.platform != "cpu":
        return None
    free = _free_host_bytes()
    return None if free is None else int(_USABLE * free / len(jax.local_devices(backend="cpu")))


def _free_host_bytes() -> int | None:
    """Return the free memory of the computer or of the container or job (Linux), None if unknown."""
    free = _read_table(_MEMINFO).get("MemAvailable:")
    left = [] if free is None else [1024 * free]
    for folder in _control_groups():
        names = ("memory.max", "memory.current")  # those of version 2, then those of version 1
        if not (folder / names[0]).exists():
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (_read_number(folder / name) for name in names)
        if limit is not None and used is not None:
            pages = _read_table(folder / "memory.stat")
            # cached files are freed if necessary
            cached = sum(
                pages.get(f"total_{name}", pages.get(name, 0))
                for name in ("active_file", "inactive_file")
            )
            left.append(max(limit - used + cached, 0))
    return min(left, default=None)


def _control_groups() -> list[Path]:
    """Return the folders of the control groups that may limit the memory of this process.

    A limit of a group, such as a job of Slurm, also applies to the groups below it. In a container,
    the group of the container is the outermost one, and others may be invisible.
    """
    folders = {_CGROUP: None, _CGROUP / "memory": None}
    try:
        lines = _GROUPS_OF_PROCESS.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = _CGROUP / "memory" if "memory" in controllers.split(",") else _CGROUP
        if root != _CGROUP or not controllers:
            inner = path.strip("/").split("/")
            folders |= {root.joinpath(*inner[:n]): None for n in range(1, len(inner) + 1)}
    return list(folders)


def _read_table(path: Path) -> dict[str, int]:
    """Return the lines "NAME NUMBER ..." of a file of the kernel; none if there is no such file."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    fields = [line.split() for line in lines]
    return {f[0]: int(f[1]) for f in fields if len(f) > 1 and f[1].isdecimal()}


def _read_number(path: Path) -> int | None:
    """Return the number in a file of the kernel, or None ("max" means no limit)."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def needed_bytes(program, *args) -> int | None:
    """Compile a jitted function, as a call with these arguments would, and return its memory.

    A later call uses this compiled program.

    Args:
      program: Function of `jax.jit`.
      args: Its arguments.

    Returns:
      Memory in addition to the arguments (bytes), or None if the compiler does not report it.
    """
    compiled = program.lower(*args).compile()
    try:
        analysis = compiled.memory_analysis()
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        return None
    if analysis is None:
        return None
    new_outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes + new_outputs


def check_fits(program, *args, device: jax.Device) -> int | None:
    """Return `needed_bytes`; raise ProgramTooLarge if the device has less memory."""
    needed, available = needed_bytes(program, *args), available_bytes(device)
    if needed is not None and available is not None and needed > available:
        raise ProgramTooLarge(needed, available)
    return needed


def predict_bytes(measured: Sequence[tuple[float, int]], size: float) -> float:
    """Return the memory of a program for batches of `size`, from sizes and memory of others.

    One program determines a proportionality, two or more a line through the last two.
    """
    (x, y), *others = reversed(measured)
    if not others or others[0][0] == x:
        return y * size / x
    x0, y0 = others[0]
    return y + (y - y0) / (x - x0) * (size - x)


def largest_size(measured: Sequence[tuple[float, int]], available: int, multiple: int = 1) -> int:
    """Return the largest batch size that is predicted to fit, below the last measured size.

    Args:
      measured: Sizes and memory (bytes) of programs, which did not fit.
      available: Memory that the program may use (bytes).
      multiple: Result is a multiple of this number; it is at least one of them.
    """
    last, target = measured[-1][0], _AIMED * available
    slope = predict_bytes(measured, last) - predict_bytes(measured, last - 1)
    size = last - (measured[-1][1] - target) / slope if slope > 0 else last / 2
    # at most 15/16 of the last size, so that a bad prediction cannot cause many compilations
    size = min(size, last * 15 / 16)
    return max(multiple * math.floor(size / multiple), multiple)
