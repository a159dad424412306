"""Runs of several processes, on one machine or many.

    environment = from_environment()
    with session(environment):      # does nothing for a single process
        ...

Every process runs the same program. Process 0 is the leader: it alone writes, and it tells the others what they cannot
know. All that is here works with a single process as well, without touching JAX's devices. When a process fails or is
killed, the others end within a second, with exit code 76 (EXIT_PEER_FAILED) and a line on which one it was: what they
wait for on their devices may never come.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlip_jax.distributed.channel import Channel, PeerFailure, connect
from mlip_jax.distributed.environment import Environment, expand_hostlist, from_environment
from mlip_jax.distributed.signals import EXIT_REQUEUE, InterruptedTwice, Stopped, StopSignal, ended_by_signals
from mlip_jax.distributed.values import decode, encode

__all__ = ["EXIT_PEER_FAILED", "EXIT_REQUEUE", "Environment", "InterruptedTwice", "PeerFailure", "StopSignal",
           "Stopped", "barrier", "broadcast", "count", "ended_by_signals", "expand_hostlist", "failed_peer_message",
           "from_environment", "index", "initialize", "leader", "leader_first", "session", "shutdown", "total"]

log = logging.getLogger(__name__)

# This process was sound, another one of its run was not.
EXIT_PEER_FAILED = 76

_HEARTBEAT_SECONDS = 10
_SHUTDOWN_SECONDS = 30
# From the first process that is stopped to the last; the leader may be writing a checkpoint.
_STOP_SECONDS = 60
# Within which a failed collective is followed by the word of which process has ended.
_WORD_SECONDS = 5.0
_MESSAGE = "The same command goes on from the last checkpoint."
# What collectives and the coordination service say when a process at the other end is gone.
_PEER_ERRORS = re.compile(
    r"gloo.{0,80}(failed|timed? ?out)|connect(ing|ion)?.{0,40}gloo|coordination.?service|heartbeat timeout"
    r"|tasks? (is|are) unhealthy|preempted/died|ncclRemoteError"
    r"|nccl.{0,200}(remote (process|error)|connection (closed|reset|refused)|abort|timed? ?out)",
    re.IGNORECASE | re.DOTALL)

_channel: Channel | None = None


def initialize(environment: Environment | None, timeout: float = 300.0) -> None:
    """Meet the other processes and start JAX with the devices of all; before anything else touches JAX's devices.

    Args:
      environment: Of `from_environment`; None does nothing.
      timeout: Seconds to wait for the other processes.

    Raises:
      RuntimeError: Not all processes have come, they do not fit together, or JAX cannot start. What to check is said.
    """
    global _channel
    if environment is None:
        return
    if _channel is not None:
        raise RuntimeError("this process has joined a run already; initialize is called once")
    import jax
    # its handler would swallow every SIGTERM
    jax.config.update("jax_enable_preemption_service", False)
    if jax.config.jax_cpu_collectives_implementation != "mpi":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if environment.coordinator is None:
        _channel = _find_pod(timeout)
        return
    channel = connect(environment.coordinator, environment.process_id, environment.num_processes, timeout, _end_process)
    try:
        host = environment.coordinator.rpartition(":")[0]
        if channel.index == 0:
            channel.announce("port", str(port := _free_port()).encode())
        else:
            port = int(channel.await_leader("port"))
        ids = environment.local_device_ids
        _start_jax(timeout, coordinator_address=f"{host}:{port}", num_processes=channel.count, process_id=channel.index,
                   local_device_ids=None if ids is None else list(ids), cluster_detection_method="deactivate")
    except BaseException as error:
        channel.fail(_describe(error))
        raise
    _channel = channel


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _start_jax(timeout: float, **options) -> None:
    import jax
    try:
        jax.distributed.initialize(
            initialization_timeout=max(1, int(timeout)), heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS, **options)
        # all tell each other what devices they have: one that came to it later, behind something that it waits for
        # from another process, would keep both waiting
        jax.devices()
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"JAX cannot start a run of several processes: {error}\nCheck that nothing has used JAX's devices before, "
            "and that the processes reach each other") from error


def _find_pod(timeout: float) -> Channel:
    """A TPU pod: JAX finds out who is there."""
    _start_jax(timeout)
    from jax._src import distributed  # nothing public tells where the coordinator is
    state = distributed.global_state
    host, _, port = state.coordinator_address.rpartition(":")
    # the hosts of a pod are of one run, so that the port beside JAX's own is free
    return connect(f"{host}:{int(port) + 1}", state.process_id, state.num_processes, timeout, _end_process)


def shutdown(timeout: float | None = None) -> None:
    """Wait until all processes are here, and part; does nothing for a single process.

    Raises:
      RuntimeError: One has not come within `timeout` seconds, or is at another place of the program.
    """
    global _channel
    if _channel is None:
        return
    import jax
    _channel.close(timeout)
    jax.distributed.shutdown()
    _channel = None


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
    if _channel is None or _channel.failed:
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
    return 0 if _channel is None else _channel.index


def count() -> int:
    """How many processes the run has."""
    return 1 if _channel is None else _channel.count


def broadcast(value: Any) -> Any:
    """The leader's `value`, on all processes: numbers, text, lists, dictionaries with text as keys, NumPy arrays.

    What others give is not looked at. Tuples come back as lists, with a single process as well.

    Raises:
      TypeError: There is something else in the value of the leader; the others end.
    """
    if not leader():
        return decode(_channel.await_leader("broadcast"))
    try:
        data = encode(value)
    except TypeError as error:
        _abandon(error)
        raise
    if _channel is not None:
        _channel.announce("broadcast", data)
    return decode(data)


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
    if _channel is not None:
        _channel.barrier(f"barrier {name}")


@contextlib.contextmanager
def leader_first(name: str) -> Iterator[None]:
    """The leader runs the body first, then all others at the same time. If the leader fails in it, all end."""
    if not leader():
        _channel.await_leader(f"leader first {name}")
    try:
        yield
    except BaseException as error:
        if leader():
            _abandon(error)
        raise
    if _channel is not None and leader():
        _channel.announce(f"leader first {name}")


def failed_peer_message(error: BaseException) -> str | None:
    """What to tell the user if `error` is what JAX raises when another process has died; None for other errors."""
    if not isinstance(error, PeerFailure) and (isinstance(error, OSError) or not _PEER_ERRORS.search(str(error))):
        return None
    what = str(error) if isinstance(error, PeerFailure) else "another process of this run has died"
    return f"{what}; see its log. {_MESSAGE}"


def _abandon(error: BaseException) -> None:
    """Tell the others that this process has failed, and see to it that it ends without waiting for them."""
    if _channel is None:
        return
    if failed_peer_message(error):
        time.sleep(_WORD_SECONDS)  # ends this process with the word of who it was
    _channel.fail(_describe(error))
    # JAX waits for the others when the interpreter ends. Called before its own, which was registered earlier.
    atexit.register(_leave, _exit_code(error))


def _leave(code: int) -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
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
