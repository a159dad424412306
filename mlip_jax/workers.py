"""Parallel jobs on several cores, in worker processes that end with their parent, however it ends.

The workers are those of the standard library, with what it lacks: loky's do not end when their parent is killed in the
middle of a job, and a job that kills its worker breaks its pool just the same. Pebble isolates such a job, but it is
under the LGPL.
"""

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
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

SINGLE_THREADED = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
_JOBS_AHEAD = 8  # per process


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(function: Callable[[Any], Any], jobs: Sequence[Any], num_processes: int | None = None, *,
        initializer: Callable[[], None] | None = None, one_stays_here: bool = True) -> Iterator[tuple[int, Any]]:
    """Yield (index of the job, function(job)) in the order in which jobs finish.

    Worker processes are fresh interpreters with single-threaded libraries: `function`, its argument and its result must
    pickle, and a script that calls this needs the usual `if __name__ == "__main__":`. The workers end after their
    current job if the caller leaves the iterator, on an error, and on Ctrl-C.

    Args:
      num_processes: Number of workers, None for one per core.
      initializer: Function that each worker (not this process) calls before its first job.
      one_stays_here: With one process, run the jobs in this process and in order.
    """
    num_processes = min(available_cores() if num_processes is None else num_processes, len(jobs))
    if not jobs:
        return
    if num_processes == 1 and one_stays_here:
        for index, job in enumerate(jobs):
            yield index, function(job)
        return
    executor = _Executor(num_processes, initializer)
    try:
        futures = {executor.submit(function, job): index for index, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def stream(function: Callable[[Any], Any], jobs: Iterable[Any], num_processes: int | None = None, *,
           ahead: int | None = None, on_death: Callable[[Any], Any] | None = None) -> Iterator[Any]:
    """Yield function(job) for each of any number of jobs, in order, computed a bounded number of jobs ahead.

    Worker processes are those of `run`. If the caller leaves the iterator, they end at once, in the middle of a job.
    One process means this one, which computes nothing ahead.

    Args:
      jobs: Jobs, of which at most `ahead` are taken before their results are.
      num_processes: Number of workers, None for one per core.
      ahead: Maximum number of jobs that wait or run; None for 8 per process.
      on_death: Function that returns the result of a job that kills its worker. Retrying each suspect in a process of
        its own tells that job from the innocent ones. None: such a job is an error.

    Raises:
      BrokenProcessPool (a RuntimeError): A worker process died, and there is no `on_death`.
    """
    num_processes = available_cores() if num_processes is None else num_processes
    if num_processes == 1:
        yield from map(function, jobs)
        return
    source, waiting = iter(jobs), deque()
    executor = _Executor(num_processes)
    try:
        while True:
            for job in itertools.islice(source, max((ahead or _JOBS_AHEAD * num_processes) - len(waiting), 0)):
                waiting.append((job, _submit(executor, function, job)))
            if not waiting:
                return
            job, future = waiting.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                if on_death is None:
                    raise
                executor.kill()
                result = _run_isolated(function, job, on_death)
                executor = _Executor(num_processes)
                waiting = deque((j, f if _succeeded(f) else _submit(executor, function, j)) for j, f in waiting)
            yield result
    finally:
        executor.kill()


def _submit(executor: _Executor, function: Callable[[Any], Any], job: Any) -> Future:
    """Submit a job; if the executor turns out to be broken, return a future that raises when its turn comes."""
    try:
        return executor.submit(function, job)
    except BrokenProcessPool as error:
        future: Future = Future()
        future.set_exception(error)
        return future


def _succeeded(future: Future) -> bool:
    """Return whether a future had its result before its executor broke."""
    return future.done() and future.exception() is None


def _run_isolated(function: Callable[[Any], Any], job: Any, on_death: Callable[[Any], Any]) -> Any:
    """Run a job in a process of its own; return on_death(job) if that process dies."""
    executor = _Executor(1)
    try:
        return executor.submit(function, job).result()
    except BrokenProcessPool:
        return on_death(job)
    finally:
        executor.kill()


class _Executor(ProcessPoolExecutor):
    """Executor of single-threaded workers that can be killed in the middle of a job.

    Its context starts the workers and so knows them; from Python 3.14 on executors have kill_workers().
    """

    def __init__(self, num_processes: int, initializer: Callable[[], None] | None = None):
        self.context = _RecordingContext()
        super().__init__(num_processes, self.context, _initialize, (initializer,))

    def kill(self) -> None:
        """Kill the workers and wait until they have ended."""
        for process in self.context.processes:
            if process.is_alive():
                process.kill()
        self.shutdown(wait=True, cancel_futures=True)


class _RecordingContext(SpawnContext):
    """Context that keeps the processes that it makes."""

    def __init__(self):
        self.processes: list[SpawnProcess] = []

    def Process(self, *args, **kwargs) -> SpawnProcess:
        self.processes.append(_SingleThreadedProcess(*args, **kwargs))
        return self.processes[-1]


class _SingleThreadedProcess(SpawnProcess):
    def start(self) -> None:
        # in the environment, because libraries read it when they load, which is before any code of ours runs
        with _environment(SINGLE_THREADED):
            super().start()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    previous = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _initialize(initializer: Callable[[], None] | None) -> None:
    """Prepare a worker: leave requests to stop to the parent, and end with the parent, even if that is killed."""
    for number in (signal.SIGINT, signal.SIGUSR1):  # not SIGTERM, with which the executor ends its workers
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if initializer:
        initializer()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
