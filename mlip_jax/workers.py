"""Work on several cores: worker processes that end with their parent, however it ends."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
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


def stream(function: Callable[[Any], Any], jobs: Iterable[Any], num_processes: int | None = None, *,
           ahead: int | None = None, on_death: Callable[[Any], Any] | None = None) -> Iterator[Any]:
    """function(job) for each of any number of jobs, in their order, computed a bounded way ahead of who takes them.

    Worker processes are those of `run`. Leaving the iterator ends them at once, in the midst of a job. One process
    means this one, and nothing ahead.

    Args:
      jobs: Taken from as results are taken, `ahead` before them.
      num_processes: None for one per core.
      ahead: Jobs that wait or are worked on; None for 8 for each process.
      on_death: Gives the result of a job that ends its worker process, which is told apart from its innocent neighbours
        by trying each alone; None: it is an error.

    Raises:
      BrokenProcessPool (a RuntimeError): A worker process has died, and there is no `on_death`.
    """
    num_processes = available_cores() if num_processes is None else num_processes
    if num_processes == 1:
        yield from map(function, jobs)
        return
    source, waiting = iter(jobs), deque()
    pool = _Pool(function, num_processes)
    try:
        while True:
            for job in itertools.islice(source, max((ahead or 8 * num_processes) - len(waiting), 0)):
                waiting.append((job, pool.submit(job)))
            if not waiting:
                return
            job, future = waiting.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                if on_death is None:
                    raise
                result = pool.alone(job, on_death)
                waiting = deque((j, f if _is_sound(f) else pool.submit(j)) for j, f in waiting)
            yield result
    finally:
        pool.end()


def _is_sound(future: Future) -> bool:
    """Whether it has come to a result before its pool broke."""
    return future.done() and future.exception() is None


class _Pool:
    """Worker processes that can be ended in the midst of a job, and started anew."""

    def __init__(self, function: Callable[[Any], Any], num_processes: int):
        self._function, self._num_processes = function, num_processes
        self._executor = self._start(num_processes)

    @staticmethod
    def _start(num_processes: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), _start, (None,))

    def submit(self, job: Any) -> Future:
        with _environment(SINGLE_THREADED):  # processes are started here, as they are needed
            try:
                return self._executor.submit(self._function, job)
            except BrokenProcessPool as error:  # known only now; the future says so in its turn
                future: Future = Future()
                future.set_exception(error)
                return future

    def alone(self, job: Any, on_death: Callable[[Any], Any]) -> Any:
        """The result of a job in a process of its own, then `submit` has new processes."""
        self.end()
        self._executor = self._start(1)
        try:
            return self.submit(job).result()
        except BrokenProcessPool:
            return on_death(job)
        finally:
            self.end()
            self._executor = self._start(self._num_processes)

    def end(self) -> None:
        processes = list((self._executor._processes or {}).values())  # public from Python 3.14 on: kill_workers
        for process in processes:
            process.kill()
        self._executor.shutdown(wait=True, cancel_futures=True)


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
