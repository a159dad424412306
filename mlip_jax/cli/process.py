"""Process of the command: signals before the run, memory allocator, settings of libraries.

The module imports only the standard library, so that the first two functions run within
milliseconds of the start.
"""

from __future__ import annotations

import os
import platform
import signal
import sys

# ALLOCATOR: settings that keep glibc from returning every large buffer to the system and requesting
# it again. Without them, page faults take half of the time of a training step on a CPU.
ALLOCATOR = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368:"
    "glibc.malloc.top_pad=67108864:glibc.malloc.arena_max=1"
)
EXIT_REQUEUE = 75  # distributed.EXIT_REQUEUE, whose import would take too long


def exit_on_signals() -> None:
    """Exit with EXIT_REQUEUE on SIGTERM and SIGUSR1 until the run installs its own handlers.

    Before that, the run has nothing to save.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: os._exit(EXIT_REQUEUE))


def tune_allocator() -> None:
    """Replace this process by the same command with ALLOCATOR in GLIBC_TUNABLES.

    A restart is necessary because glibc reads the variable only at the start of a process. This
    does nothing if GLIBC_TUNABLES is set, so an empty value turns the tuning off.
    """
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def ignore_settings_of_matplotlib() -> None:
    """Ignore a file matplotlibrc of the current folder, which can make figures run LaTeX."""
    if os.path.lexists("matplotlibrc"):
        import matplotlib

        matplotlib.rcdefaults()
