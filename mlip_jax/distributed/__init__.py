"""Runs of several processes, on one machine or many.

    environment = from_environment()
    with session(environment):      # does nothing for a single process
        ...

Every process runs the same program. Process 0 is the leader: it alone writes, and it tells the others what they cannot
know. All that is here works with a single process as well, without touching JAX's devices. When a process fails, the
others end within a second, and within 12 when it was killed, with exit code 76 (EXIT_PEER_FAILED) and a line on which
one it was: what they wait for on their devices may never come.
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
from mlip_jax.distributed.signals import EXIT_REQUEUE, InterruptedTwice, Stopped, StopSignal, ended_by_signals
from mlip_jax.distributed.values import decode, encode

__all__ = ["EXIT_PEER_FAILED", "EXIT_REQUEUE", "Environment", "InterruptedTwice", "StopSignal", "Stopped", "barrier",
           "broadcast", "count", "ended_by_signals", "expand_hostlist", "failed_peer_message", "from_environment",
           "index", "initialize", "leader", "leader_first", "session", "shutdown", "total"]

log = logging.getLogger(__name__)

# This process was sound, another one of its run was not.
EXIT_PEER_FAILED = 76

# From the first process that is stopped to the last; the leader may be writing a checkpoint.
_STOP_SECONDS = 60
# Within which a failed collective is followed by the message of which process has ended: JAX takes 11 to find out.
_WORD_SECONDS = 13.0
# The most that the key-value store carries at once; with megabytes it takes seconds.
_SMALL_BYTES = 65_536
_MESSAGE = "The same command goes on from the last checkpoint."
# What collectives and the coordination service say when a process at the other end is gone.
_PEER_ERRORS = re.compile(
    r"gloo.{0,80}(failed|timed? ?out)|connect(ing|ion)?.{0,40}gloo|coordination.?service|heartbeat timeout"
    r"|tasks? (is|are) unhealthy|preempted/died|ncclRemoteError"
    r"|nccl.{0,200}(remote (process|error)|connection (closed|reset|refused)|abort|timed? ?out)",
    re.IGNORECASE | re.DOTALL)

_coordination: Coordination | None = None


def initialize(environment: Environment | None, timeout: float = 300.0) -> None:
    """Meet the other processes and start JAX with the devices of all; before anything else touches JAX's devices.

    Args:
      environment: Of `from_environment`; None does nothing.
      timeout: Seconds to wait for the other processes.

    Raises:
      RuntimeError: Not all processes have come, they do not fit together, or JAX cannot start. What to check is said.
    """
    global _coordination
    if environment is None:
        return
    if _coordination is not None:
        raise RuntimeError("this process has joined a run already; initialize is called once")
    import jax
    # its handler would swallow every SIGTERM
    jax.config.update("jax_enable_preemption_service", False)
    # otherwise JAX aborts all others when one has died, without a word on which one it was
    jax.config.update("jax_enable_recoverability", True)
    if jax.config.jax_cpu_collectives_implementation != "mpi":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        meet(environment, timeout)
        state = jax_internals.coordination()
        _coordination = Coordination(state.client, state.coordinator_address, state.process_id, state.num_processes,
                                     _end_process)
        _coordination.barrier(f"start of a run of {state.num_processes} processes")
        # all tell each other what devices they have: one that came to it later, behind something that it waits for
        # from another process, would keep both waiting
        jax.devices()
    except BaseException as error:
        if _coordination is None:
            _leave_at_exit(error)
        _abandon(error)
        raise


def shutdown(timeout: float | None = None) -> None:
    """Wait until all processes are here, and part; does nothing for a single process.

    Raises:
      RuntimeError: One has not come within `timeout` seconds, or is at another place of the program.
    """
    global _coordination
    if _coordination is None:
        return
    _coordination.close(timeout)
    _coordination = None


@contextlib.contextmanager
def session(environment: Environment | None, timeout: float = 300.0) -> Iterator[None]:
    """`initialize`, then the body, then `shutdown`; an exception in the body ends the other processes.

    SystemExit with 0 or EXIT_REQUEUE is an end that all come to, any other is a failure. After a failure the process
    leaves with the exit code of the exception (1, or that of SystemExit) without waiting for the others.
    """
    initialize(environment, timeout)
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0, EXIT_REQUEUE):
            _part(error)
        else:
            _abandon(error)
        raise
    _part(None)


def _part(error: SystemExit | None) -> None:
    """`shutdown`; a stop that the others know nothing of becomes a failure."""
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
    """Whether this is process 0."""
    return index() == 0


def index() -> int:
    """Which process this is, from 0."""
    return 0 if _coordination is None else _coordination.index


def count() -> int:
    """How many processes the run has."""
    return 1 if _coordination is None else _coordination.count


def broadcast(value: Any) -> Any:
    """The leader's `value`, on all processes: numbers, text, lists, dictionaries with text as keys, NumPy arrays.

    What others give is not looked at. Tuples come back as lists, with a single process as well.

    Raises:
      TypeError: There is something else in the value of the leader; the others end.
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
    """Return the leader's `data` on all processes; large data are carried by the devices, which are quicker."""
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
    # JAX adds up the numbers of the leader and the zeros of the others
    numbers = np.frombuffer(data + bytes(-size % 4), np.uint32)
    return np.asarray(multihost_utils.broadcast_one_to_all(numbers)).tobytes()[:size]


def total(array: np.ndarray) -> np.ndarray:
    """The sum of the arrays of all processes, which are of one shape, float32 or smaller; all call it."""
    if count() == 1:
        return array
    from jax.experimental import multihost_utils
    return np.asarray(multihost_utils.process_allgather(array)).reshape(count(), *array.shape).sum(0)


def barrier(name: str) -> None:
    """Wait until all processes have come here, however long it takes.

    Raises:
      RuntimeError: Another process waits at another place.
    """
    if _coordination is not None:
        _coordination.barrier(f"barrier {name}")


@contextlib.contextmanager
def leader_first(name: str) -> Iterator[None]:
    """The leader runs the body first, then all others at the same time. If the leader fails in it, all end."""
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
    """What to tell the user if `error` is what JAX raises when another process has died; None for other errors."""
    if isinstance(error, OSError) or not _PEER_ERRORS.search(str(error)):
        return None
    return f"another process of this run has died; see its log. {_MESSAGE}"


def _abandon(error: BaseException) -> None:
    """Tell the others that this process has failed, and see to it that it ends without waiting for them."""
    if _coordination is None:
        return
    if failed_peer_message(error):
        time.sleep(_WORD_SECONDS)  # the message of which process it was ends this one
    _coordination.fail(_describe(error))
    _leave_at_exit(error)


def _leave_at_exit(error: BaseException) -> None:
    """When the interpreter ends, JAX waits for the others. What is registered last is called first."""
    atexit.register(_leave, _exit_code(error))


def _leave(code: int) -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if _coordination is not None:
        with contextlib.suppress(RuntimeError):
            _coordination.await_hearers()
    os._exit(code)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    if isinstance(error, KeyboardInterrupt) and not isinstance(error, InterruptedTwice):
        return EXIT_REQUEUE
    return 1


def _describe(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    if isinstance(error, SystemExit):
        return f"exit code {error.code}" if isinstance(error.code, int) else str(error.code).strip()
    return f"{type(error).__name__}: {error}"


def _end_process(reason: str) -> None:
    """End at once: the main thread may wait for a device for ever, and JAX would end it with pages of its own."""
    text = f"\nprocess {index()} ends because {reason}\nSee the log of that process. {_MESSAGE}\n"
    # not by way of the logs or of sys.stderr, which the main thread may hold
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
    os._exit(EXIT_PEER_FAILED)
