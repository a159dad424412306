"""Runs of several processes, on one or more machines.

    environment = from_environment()
    with session(environment):      # does nothing for a single process
        ...

Every process runs the same program. Process 0 is the leader: only the leader writes files, and it
broadcasts to the others what they cannot know. All functions also work with a single process,
without touching JAX's devices.

When a process fails, the others end within a second, or within 12 seconds if it was killed. They
exit with code 76 (EXIT_PEER_FAILED) and report which process failed, because a collective that they
wait for on their devices may never finish.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlip_jax.distributed import jax_internals
from mlip_jax.distributed.coordination import Coordination
from mlip_jax.distributed.environment import Environment, expand_hostlist, from_environment
from mlip_jax.distributed.meeting import meet
from mlip_jax.distributed.signals import (
    EXIT_REQUEUE,
    ForcedInterrupt,
    ReportedInterrupt,
    Stopped,
    StopSignal,
    ended_by_signals,
    report_end,
)
from mlip_jax.distributed.values import decode, encode

__all__ = [
    "EXIT_PEER_FAILED",
    "EXIT_REQUEUE",
    "Environment",
    "ForcedInterrupt",
    "ReportedInterrupt",
    "StopSignal",
    "Stopped",
    "barrier",
    "broadcast",
    "count",
    "ended_by_signals",
    "expand_hostlist",
    "failed_peer_message",
    "from_environment",
    "index",
    "initialize",
    "leader",
    "leader_first",
    "report_end",
    "session",
    "shutdown",
    "total",
]

log = logging.getLogger(__name__)

# Exit code of a process that ends because another process of its run has failed.
EXIT_PEER_FAILED = 76

# Maximum time between the stop of the first process and that of the last. The leader may be writing
# a checkpoint.
_STOP_SECONDS = 60
# Maximum time after a failed collective until it is known which process has ended. JAX takes 11 s.
CAUSE_SECONDS = 13.0
# Maximum size of a message in the key-value store, which takes seconds for megabytes.
_SMALL_BYTES = 65_536
_RERUN = "Rerun the same command to resume from the last checkpoint."
# Error messages of collectives and of the coordination service if another process has died.
_PEER_ERRORS = re.compile(
    r"gloo.{0,80}(failed|timed? ?out)|connect(ing|ion)?.{0,40}gloo|coordination.?service"
    r"|heartbeat timeout"
    r"|tasks? (is|are) unhealthy|preempted/died|ncclRemoteError"
    r"|nccl.{0,200}(remote (process|error)|connection (closed|reset|refused)|abort|timed? ?out)",
    re.IGNORECASE | re.DOTALL,
)

_coordination: Coordination | None = None


def initialize(environment: Environment | None, timeout: float = 300.0) -> None:
    """Connect to the other processes and start JAX with the devices of all of them.

    It must be called before anything else touches JAX's devices.

    Args:
      environment: Result of `from_environment`. None: do nothing.
      timeout: Time to wait for the other processes (s).

    Raises:
      RuntimeError: Not all processes have connected, they do not match, or JAX cannot start. The
        message says what to check.
    """
    global _coordination
    if environment is None:
        return
    if _coordination is not None:
        raise RuntimeError("this process has already joined a run: call initialize only once")
    import jax

    # the handler of that service would swallow every SIGTERM
    jax.config.update("jax_enable_preemption_service", False)
    # otherwise, JAX aborts all other processes when one has died, and does not report which one
    jax.config.update("jax_enable_recoverability", True)
    if jax.config.jax_cpu_collectives_implementation != "mpi":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        meet(environment, timeout)
        state = jax_internals.coordination()
        _coordination = Coordination(
            state.client,
            state.coordinator_address,
            state.process_id,
            state.num_processes,
            _end_process,
        )
        _coordination.barrier(f"start of a run of {state.num_processes} processes")
        # The processes exchange their devices here. If one did so later, while it waits for a
        # message of another that is still in this exchange, both would wait forever.
        jax.devices()
    except BaseException as error:
        if _coordination is None:
            _leave_at_exit(error)
        _abandon(error)
        raise


def shutdown(timeout: float | None = None) -> None:
    """Wait for all processes and disconnect. Does nothing for a single process.

    Raises:
      RuntimeError: A process has not called this within `timeout` seconds, or is waiting in another
        part of the program.
    """
    global _coordination
    if _coordination is None:
        return
    _coordination.close(timeout)
    _coordination = None


@contextlib.contextmanager
def session(environment: Environment | None, timeout: float = 300.0) -> Iterator[None]:
    """Run the body between `initialize` and `shutdown`. An exception ends the other processes.

    SystemExit with code 0 or EXIT_REQUEUE is a normal end, which all processes reach. Any other
    exception is a failure: the process exits without waiting for the others, with the code of
    SystemExit or 1.
    """
    initialize(environment, timeout)
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0, EXIT_REQUEUE):
            _disconnect(error)
        else:
            _abandon(error)
        raise
    _disconnect(None)


def _disconnect(error: SystemExit | None) -> None:
    """Shut down. If this process was stopped and the others do not stop, report a failure."""
    if _coordination is None or _coordination.failed:
        return
    stopped = error is not None and error.code == EXIT_REQUEUE
    try:
        shutdown(_STOP_SECONDS if stopped else None)
    except RuntimeError as problem:
        _abandon(error or problem)
        if error is None:
            raise
        log.warning("%s", problem)


def leader() -> bool:
    """Return whether this is process 0."""
    return index() == 0


def index() -> int:
    """Return the index of this process, from 0."""
    return 0 if _coordination is None else _coordination.index


def count() -> int:
    """Return the number of processes of the run."""
    return 1 if _coordination is None else _coordination.count


def broadcast(value: Any) -> Any:
    """Return the leader's `value` on all processes.

    Args:
      value: Value of numbers, text, lists, dictionaries with text as keys, and NumPy arrays. The
        values of the other processes are ignored. Tuples are returned as lists, also with a single
        process.

    Raises:
      TypeError: The leader's value contains another type. The other processes end.
    """
    data = b""
    if leader():
        try:
            data = encode(value)
        except TypeError as error:
            _abandon(error)
            raise
    return decode(data if _coordination is None else _share(data))


def _share(data: bytes) -> bytes:
    """Return the leader's `data` on all processes. Large data use the devices, which are faster."""
    if leader():
        size, small = len(data), data if len(data) <= _SMALL_BYTES else b""
        _coordination.announce("broadcast", size.to_bytes(8, "big") + small)
    else:
        message = _coordination.await_leader("broadcast")
        size, small = int.from_bytes(message[:8], "big"), message[8:]
        data = bytes(size)
    if len(small) == size:
        return small
    from jax.experimental import multihost_utils

    # JAX broadcasts by a sum; the other processes contribute zeros
    numbers = np.frombuffer(data + bytes(-size % 4), np.uint32)
    return np.asarray(multihost_utils.broadcast_one_to_all(numbers)).tobytes()[:size]


def total(array: np.ndarray) -> np.ndarray:
    """Return the sum of the arrays of all processes; every process must call it.

    The arrays have the same shape, and a dtype of at most 32 bits.
    """
    if count() == 1:
        return array
    from jax.experimental import multihost_utils

    return (
        np.asarray(multihost_utils.process_allgather(array)).reshape(count(), *array.shape).sum(0)
    )


def barrier(name: str) -> None:
    """Wait until all processes have reached this barrier, without a time limit.

    Raises:
      RuntimeError: Another process is waiting in another part of the program.
    """
    if _coordination is not None:
        _coordination.barrier(f"barrier {name}")


@contextlib.contextmanager
def leader_first(name: str) -> Iterator[None]:
    """Run the body on the leader first, then on all others in parallel.

    If the body fails on the leader, all processes end.
    """
    if not leader():
        _coordination.await_leader(f"leader first {name}")
    try:
        yield
    except BaseException as error:
        if leader():
            _abandon(error)
        raise
    if _coordination is not None and leader():
        _coordination.announce(f"leader first {name}")


def failed_peer_message(error: BaseException) -> str | None:
    """Return a message for the user if `error` means that another process has died, or None."""
    if isinstance(error, OSError) or not _PEER_ERRORS.search(str(error)):
        return None
    return f"another process of this run has died. See its log. {_RERUN}"


def _abandon(error: BaseException) -> None:
    """Report to the others that this process has failed, and do not wait for them at its exit."""
    if _coordination is None:
        return
    if failed_peer_message(error):
        time.sleep(CAUSE_SECONDS)  # until `_end_process` ends this process with the cause
    _coordination.fail(_describe(error))
    _leave_at_exit(error)


def _leave_at_exit(error: BaseException) -> None:
    """Exit at the end of the interpreter, before JAX's own exit function waits for the others.

    Functions of `atexit` are called in reverse order of their registration.
    """
    atexit.register(_leave, _exit_code(error))


def _leave(code: int) -> None:
    """Exit with this code, once the logs are written and the others have read of the failure."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if _coordination is not None:
        with contextlib.suppress(RuntimeError):
            _coordination.await_acknowledgments()
    os._exit(code)


def _exit_code(error: BaseException) -> int:
    """Return the exit code for an exception; an interrupt may be requeued."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    if isinstance(error, KeyboardInterrupt) and not isinstance(error, ForcedInterrupt):
        return EXIT_REQUEUE
    return 1


def _describe(error: BaseException) -> str:
    """Describe an exception in a few words, for the logs of the other processes."""
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    if isinstance(error, SystemExit):
        return f"exit code {error.code}" if isinstance(error.code, int) else str(error.code).strip()
    return f"{type(error).__name__}: {error}"


def _end_process(reason: str) -> None:
    """End this process at once, because another one has failed.

    The main thread may wait for a device forever, and JAX would abort it with pages of output.
    """
    text = f"\nprocess {index()} ends because {reason}\nSee the log of that process. {_RERUN}\n"
    # not through the log or sys.stderr, whose locks the main thread may hold
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
    os._exit(EXIT_PEER_FAILED)
