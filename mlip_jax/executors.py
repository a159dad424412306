"""Executors that run jobs in place of the worker processes of this machine.

Jobs are labels, embeddings of molecules, and calculations of the reference method. `use_executor`
selects the executor: a scheduler of dask, or an executor of concurrent.futures that the caller owns.

    with use_executor("tcp://head:8786"):
        relax("molecules.smi")

A job that is lost with its machine is submitted again. The workers need this package, and one thread
each for numerical libraries (OMP_NUM_THREADS=1). Jobs that read or write files, such as the conversion
of data sets, always run on this machine.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future
from concurrent.futures import wait as wait_for_futures
from typing import Any

log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3  # submissions of a job
# Default maximum number of pending or running jobs, and so of busy workers. It bounds the memory of
# their results: a molecule of 10,000 atoms takes 0.3 MB per conformer, so 64 with 10 conformers 200 MB.
_AHEAD = 64
# errors of dask whose worker died, or whose result was lost
_LOST_IN_DASK = frozenset({"KilledWorker", "FutureCancelledError", "CommClosedError"})
_selected: contextvars.ContextVar[Executor | None] = contextvars.ContextVar(
    "executor", default=None
)
_initialized: set[Any] = set()  # initializers that this process has called


class JobLostError(RuntimeError):
    """A job was lost several times, or the executor takes no more jobs."""


@contextlib.contextmanager
def use_executor(executor: str | Executor | None) -> Iterator[Executor | None]:
    """Run jobs by an executor instead of worker processes of this machine, within the block.

    Args:
      executor: Address of a scheduler of dask, as in "tcp://head:8786"; an executor of
        concurrent.futures, which is not shut down; or None for worker processes of this machine.

    Raises:
      ImportError: dask.distributed is missing.
      OSError: There is no scheduler at this address.
      ValueError: Another object.
    """
    with _open_executor(executor) as actual:
        token = _selected.set(actual)
        try:
            yield actual
        finally:
            _selected.reset(token)


def selected() -> Executor | None:
    """Return the executor of `use_executor`, or None."""
    return _selected.get()


@contextlib.contextmanager
def _open_executor(executor: str | Executor | None) -> Iterator[Executor | None]:
    """Yield an executor; the connection to a scheduler is closed after the block."""
    if not isinstance(executor, str):
        if executor is not None and not callable(getattr(executor, "submit", None)):
            raise ValueError(
                "executor: expected the address of a scheduler of dask, an executor of "
                f"concurrent.futures, or None, received {executor!r}"
            )
        yield executor
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError(
            "a scheduler of dask requires dask.distributed: pip install 'mlip-flax[dask]'"
        ) from error
    with Client(executor, timeout=30) as client:
        workers = client.scheduler_info()["workers"]
        log.info("dask: %d worker(s) at %s", len(workers), executor)
        yield client.get_executor(pure=False)


def run(
    executor: Executor,
    function: Callable[[Any], Any],
    jobs: Sequence[Any],
    initializer: Callable[[], None] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yield (index of the job, function(job)) in the order in which the jobs finish.

    Args:
      executor: Executor.
      function: Function of one job.
      jobs: Jobs.
      initializer: Function that each process calls before its first job.

    Raises:
      JobLostError: A job was lost several times, or the executor takes no more jobs.
    """
    call = functools.partial(_call, function, initializer)
    waiting = deque(enumerate(jobs))
    attempts = dict.fromkeys(range(len(jobs)), 0)
    running: dict[Future, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < _AHEAD:
                index, job = waiting.popleft()
                attempts[index] += 1
                running[_submit(executor, call, job)] = index
            finished, _ = wait_for_futures(running, return_when=FIRST_COMPLETED)
            for future in finished:
                index = running.pop(future)
                error = _loss(future)
                if error is None:
                    yield index, future.result()
                    continue
                _check_attempts(attempts[index], error)
                waiting.appendleft((index, jobs[index]))
    finally:
        _cancel(running)


def stream(
    executor: Executor,
    function: Callable[[Any], Any],
    jobs: Iterable[Any],
    ahead: int | None = None,
    on_death: Callable[[Any], Any] | None = None,
) -> Iterator[Any]:
    """Yield function(job) for each job, in order, computing a bounded number of jobs ahead.

    Args:
      executor: Executor.
      function: Function of one job.
      jobs: Jobs. At most `ahead` of them are taken before their results.
      ahead: Maximum number of jobs that are pending or running. None: 64.
      on_death: Function that returns the result of a job that was lost several times. None: such a
        job is an error.

    Raises:
      JobLostError: A job was lost several times, and `on_death` is None; or the executor takes no
        more jobs.
    """
    call = functools.partial(_call, function, None)
    source, pending = iter(jobs), deque()
    try:
        while True:
            for job in itertools.islice(source, max((ahead or _AHEAD) - len(pending), 0)):
                pending.append((job, _submit(executor, call, job)))
            if not pending:
                return
            job, future = pending.popleft()
            for attempt in itertools.count(1):
                error = _loss(future)
                if error is None:
                    yield future.result()
                    break
                if attempt == _MAX_ATTEMPTS and on_death is not None:
                    yield on_death(job)
                    break
                _check_attempts(attempt, error)
                future = _submit(executor, call, job)
    finally:
        _cancel(future for _, future in pending)


def _submit(executor: Executor, call: Callable[[Any], Any], job: Any) -> Future:
    """Submit a job."""
    try:
        return executor.submit(call, job)
    except (BrokenExecutor, RuntimeError) as error:
        raise JobLostError(
            f"the executor takes no more jobs: {error}. Rerun with another one; finished results are "
            "kept."
        ) from error


def _loss(future: Future) -> BaseException | None:
    """Wait for a future. Return the error if its job was lost, which says nothing about the job."""
    try:
        error = future.exception()
    except CancelledError as cancelled:
        return cancelled
    lost = isinstance(error, BrokenExecutor | CancelledError)
    return error if lost or type(error).__name__ in _LOST_IN_DASK else None


def _check_attempts(attempts: int, error: BaseException) -> None:
    """Raise JobLostError if a job was submitted too often; otherwise log that it was lost."""
    reason = str(error) or type(error).__name__
    if attempts >= _MAX_ATTEMPTS:
        raise JobLostError(
            f"a job was lost {attempts} times ({reason}). Check the memory and the log of the "
            "workers, then rerun; finished results are kept."
        ) from error
    log.warning("a job was lost (%s) and is submitted again", reason)


def _cancel(futures: Iterable[Future]) -> None:
    """Cancel jobs that have not started."""
    for future in futures:
        future.cancel()


def _call(function: Callable[[Any], Any], initializer: Callable[[], None] | None, job: Any) -> Any:
    """Run a job in a process of the executor."""
    if initializer is not None and initializer not in _initialized:
        initializer()
        _initialized.add(initializer)
    return function(job)
