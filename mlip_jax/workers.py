"""Work on several cores: worker processes that end with their parent, however it ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait
from typing import Any

SINGLE_THREADED = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(function: Callable[[Any], Any], jobs: Sequence[Any], num_processes: int | None = None, *,
        initializer: Callable[[], None] | None = None, one_stays_here: bool = True) -> Iterator[tuple[int, Any]]:
    """(number of the job, function(job)) as they are done, in any order.

    Worker processes are fresh interpreters with single-threaded libraries: `function` and what it takes and gives must
    pickle, and a script that calls this needs the usual `if __name__ == "__main__":`. Leaving the iterator, an error
    or Ctrl-C ends the workers after the job at hand.

    Args:
      num_processes: None for one per core.
      initializer: Called in each worker process (not in this one) before its first job.
      one_stays_here: One process means this one, and jobs in order.
    """
    num_processes = min(available_cores() if num_processes is None else num_processes, len(jobs))
    if not jobs:
        return
    if num_processes == 1 and one_stays_here:
        for index, job in enumerate(jobs):
            yield index, function(job)
        return
    executor = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), _start, (initializer,))
    try:
        # Read when a worker loads its libraries, which is before it runs anything of ours.
        with _environment(SINGLE_THREADED):
            futures = {executor.submit(function, job): index for index, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start(initializer):
    """Leaves the wish to stop to the parent, and ends with it even if it is killed without a word."""
    # SIGTERM is how the pool ends its workers
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if initializer:
        initializer()


def _exit_with_parent():
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
