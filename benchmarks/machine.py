"""Description of the machine and summaries of measured values."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence


def describe(packages: Sequence[str]) -> str:
    """Return one line with date, processor, number of cores and versions."""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages if _has(p))
    return (
        f"{datetime.date.today()}, {_processor()}, {len(os.sched_getaffinity(0))} core(s), Python "
        f"{platform.python_version()}, {versions}"
    )


def _has(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def spread(values: Sequence[float]) -> str:
    """Format values as "median (lowest to highest)"."""
    return f"{statistics.median(values):,.4g} ({min(values):,.4g} to {max(values):,.4g})"
