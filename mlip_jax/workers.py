"""Parallel jobs on several cores, in worker processes that end with their parent.

The workers extend those of the standard library: they also end if their parent is killed, and a job
that kills its worker can be isolated. The workers of loky do not end if their parent is killed in
the middle of a job, and such a job breaks its pool as well. Pebble isolates such a job, but its
license is the LGPL.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
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
from multiprocessing.synchronize import Event
from typing import Any

from mlip_jax import executors

SINGLE_THREADED = {
    name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
}
# A new interpreter would otherwise import modules of the current folder, such as a file pickle.py in a
# folder of other people, in place of those of Python.
_SAFE_PATH = "PYTHONSAFEPATH"
_isolated = False  # whether this process may die
_JOBS_AHEAD = 8  # default maximum number of pending or running jobs per process


class WorkerStartError(RuntimeError):
    """Worker processes cannot be started."""

    def __init__(self):
        super().__init__(
            "worker processes ended while they were started. A worker imports the script that "
            'started it: put the calls of the script below `if __name__ == "__main__":`. If they '
            "are, the memory or the number of processes is too small."
        )


def is_isolated() -> bool:
    """Return whether this process is a worker, whose death its parent survives."""
    return _isolated


def set_isolated() -> None:
    """Declare this process a worker."""
    global _isolated
    _isolated = True


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End this process if the block takes longer, even in the middle of a call of native code.

    Only workers end; other processes have no limit.
    """
    if not _isolated:
        yield
        return
    # SIGALRM ends the process. An outer limit continues after the block.
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, outer)


@contextlib.contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError if the block takes longer than `seconds`; None is no limit.

    The exception is raised when Python code runs. A worker that is still in native code after twice
    the time ends, even in the middle of a call.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():  # as in a worker of dask
        with _deadline_of_thread(seconds):
            yield
        return

    def stop(number, frame):
        raise TimeoutError(f"took longer than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if _isolated:
        faulthandler.dump_traceback_later(2 * seconds, exit=True, file=nowhere)
    try:
        yield
    finally:
        if _isolated:
            faulthandler.cancel_dump_traceback_later()
        os.close(nowhere)
        signal.setitimer(signal.ITIMER_REAL, outer)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def _deadline_of_thread(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in this thread if the block takes longer; only the main thread has signals."""
    number, lock = ctypes.c_ulong(threading.get_ident()), threading.Lock()
    raise_in_thread, state = ctypes.pythonapi.PyThreadState_SetAsyncExc, "running"

    def stop():
        nonlocal state
        with lock:
            if state == "running":
                state = "late"
                raise_in_thread(number, ctypes.py_object(TimeoutError))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except TimeoutError as error:
        if state == "late":  # Python creates this exception without a message
            raise TimeoutError(f"took longer than {seconds:g} s") from error
        raise
    finally:
        timer.cancel()
        with lock:
            if state == "late":
                raise_in_thread(number, None)  # in case that it has not been raised yet
            state = "ended"


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    function: Callable[[Any], Any],
    jobs: Sequence[Any],
    num_processes: int | None = None,
    *,
    initializer: Callable[[], None] | None = None,
    single_inline: bool = True,
    first_alone: bool = False,
    local: bool = False,
) -> Iterator[tuple[int, Any]]:
    """Yield (index of the job, function(job)) in the order in which the jobs finish.

    Worker processes are fresh interpreters with single-threaded libraries. Therefore `function`,
    its argument and its result must be picklable, and a calling script needs the usual
    `if __name__ == "__main__":`. The workers end at once, in the middle of a job, if the caller
    leaves the iterator, on an error, and on a signal. Within `executors.use_executor`, its executor
    takes the place of the worker processes.

    Args:
      function: Function of one job.
      jobs: Jobs.
      num_processes: Number of workers. None: one per core.
      initializer: Function that each worker (not this process) calls before its first job.
      single_inline: Whether to run the jobs in this process and in order instead of in a single
        worker.
      first_alone: Whether to start the other jobs only when the caller requests the second result.
      local: Whether the jobs need files of this machine and therefore ignore `use_executor`.
    """
    if not jobs:
        return
    # the cores of this machine say nothing about those of an executor
    inline = single_inline and 1 in (num_processes, len(jobs))
    if not local and not inline and (other := executors.selected()) is not None:
        yield from executors.run(other, function, jobs, initializer)
        return
    num_processes = min(available_cores() if num_processes is None else num_processes, len(jobs))
    if num_processes == 1 and single_inline:
        for index, job in enumerate(jobs):
            yield index, function(job)
        return
    executor = _Executor(num_processes, initializer)
    try:
        numbers = range(len(jobs))
        for group in (numbers[:1], numbers[1:]) if first_alone else (numbers,):
            futures = {executor.submit(function, jobs[index]): index for index in group}
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
    except BrokenProcessPool as error:
        executor.kill()
        executor.check_started(error)
        raise
    except BaseException:
        executor.kill()
        raise
    executor.shutdown(wait=True)


def stream(
    function: Callable[[Any], Any],
    jobs: Iterable[Any],
    num_processes: int | None = None,
    *,
    ahead: int | None = None,
    on_death: Callable[[Any], Any] | None = None,
) -> Iterator[Any]:
    """Yield function(job) for each job, in order, computing a bounded number of jobs ahead.

    The worker processes, or the executor in their place, are those of `run`. If the caller leaves
    the iterator, they end at once, in the middle of a job. With `num_processes=1`, the jobs run in
    this process, one at a time.

    Args:
      function: Function of one job.
      jobs: Jobs. At most `ahead` of them are taken before their results.
      num_processes: Number of workers. None: one per core. On a single core, the jobs run in this
        process as well, unless `on_death` is set.
      ahead: Maximum number of jobs that are pending or running. None: 8 per process.
      on_death: Function that returns the result of a job that kills its worker. To identify that
        job, each suspect is run again in its own process. None: such a job is an error.

    Raises:
      BrokenProcessPool (a RuntimeError): A worker process died, and `on_death` is None.
      WorkerStartError (a RuntimeError): No worker could be started.
    """
    if num_processes != 1 and (other := executors.selected()) is not None:
        yield from executors.stream(other, function, jobs, ahead, on_death)
        return
    may_die = num_processes is None and on_death is not None
    num_processes = available_cores() if num_processes is None else num_processes
    if num_processes == 1 and not may_die:
        yield from map(function, jobs)
        return
    source, pending = iter(jobs), deque()
    executor = _Executor(num_processes)
    try:
        while True:
            for job in itertools.islice(
                source, max((ahead or _JOBS_AHEAD * num_processes) - len(pending), 0)
            ):
                pending.append((job, _submit(executor, function, job)))
            if not pending:
                return
            job, future = pending.popleft()
            try:
                result = future.result()
            except BrokenProcessPool as error:
                executor.kill()
                executor.check_started(error)
                if on_death is None:
                    raise
                # Any running job may have killed the worker. Run this one in isolation and submit
                # the unfinished ones again.
                result = _run_isolated(function, job, on_death)
                executor = _Executor(num_processes)
                pending = deque(
                    (j, f if _has_result(f) else _submit(executor, function, j)) for j, f in pending
                )
            yield result
    finally:
        executor.kill()


def _submit(executor: _Executor, function: Callable[[Any], Any], job: Any) -> Future:
    """Submit a job. If the executor is broken, return a future that raises the error later."""
    try:
        return executor.submit(function, job)
    except BrokenProcessPool as error:
        future: Future = Future()
        future.set_exception(error)
        return future


def _has_result(future: Future) -> bool:
    """Return whether a future got its result before its executor broke."""
    return future.done() and future.exception() is None


def _run_isolated(function: Callable[[Any], Any], job: Any, on_death: Callable[[Any], Any]) -> Any:
    """Run a job in its own process. Return on_death(job) if that process dies."""
    executor = _Executor(1)
    try:
        return executor.submit(function, job).result()
    except BrokenProcessPool as error:
        executor.check_started(error)
        return on_death(job)
    finally:
        executor.kill()


class _Executor(ProcessPoolExecutor):
    """Executor of single-threaded workers that can be killed in the middle of a job.

    Its context starts the workers and therefore has a list of them. Since Python 3.14, executors
    have kill_workers().
    """

    def __init__(self, num_processes: int, initializer: Callable[[], None] | None = None):
        self.context = _RecordingContext()
        inherits_safe_path = _SAFE_PATH in os.environ
        with _environment({_SAFE_PATH: "1"}):  # the first event starts the resource tracker
            self._started = self.context.Event()
            arguments = (initializer, inherits_safe_path, self._started)
            super().__init__(num_processes, self.context, _initialize, arguments)

    def check_started(self, error: BrokenProcessPool) -> None:
        """Raise WorkerStartError if no worker was ready for its first job: the jobs are innocent."""
        if not self._started.is_set():
            raise WorkerStartError from error

    def kill(self) -> None:
        """Kill the workers and wait until they have ended."""
        for process in self.context.processes:
            if process.is_alive():
                process.kill()
        self.shutdown(wait=True, cancel_futures=True)


class _RecordingContext(SpawnContext):
    """Context that keeps a list of the processes that it creates."""

    def __init__(self):
        self.processes: list[SpawnProcess] = []

    def Process(self, *args, **kwargs) -> SpawnProcess:
        self.processes.append(_SingleThreadedProcess(*args, **kwargs))
        return self.processes[-1]


class _SingleThreadedProcess(SpawnProcess):
    """Process whose numerical libraries use a single thread."""

    def start(self) -> None:
        # Set the variables before the start: libraries read them when they are loaded, which
        # happens before any code of this package runs.
        with _environment({**SINGLE_THREADED, _SAFE_PATH: "1"}):
            super().start()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables during the body."""
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


def _initialize(
    initializer: Callable[[], None] | None, keeps_safe_path: bool, started: Event
) -> None:
    """Prepare a worker: ignore stop requests, which the parent handles, and end with the parent."""
    if not keeps_safe_path:  # calculators can be scripts that import files next to them
        os.environ.pop(_SAFE_PATH, None)
    started.set()
    set_isolated()
    for number in (signal.SIGINT, signal.SIGUSR1):  # not SIGTERM: the executor ends workers with it
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if initializer:
        initializer()


def _exit_with_parent() -> None:
    """Exit when the parent process ends, even if it is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)
