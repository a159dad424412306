"""The start of a run of several processes: they find each other, and JAX starts its coordination service."""

from __future__ import annotations

import ctypes
import queue
import signal
import socket
import threading
import time

from mlip_jax.distributed.environment import Environment

_HEARTBEAT_SECONDS = 10
_SHUTDOWN_SECONDS = 30
# JAX would abort the process when its own time is over, so that its time is longer than ours.
_SPARE_SECONDS = 60
_HERE = ("localhost", "127.0.0.1", "[::1]")


def meet(environment: Environment, timeout: float) -> None:
    """Call `jax.distributed.initialize`, which returns when all processes have called it.

    Raises:
      RuntimeError: Not all processes have come within `timeout` seconds, or JAX cannot start.
    """
    deadline = time.monotonic() + timeout
    options = _options(environment, deadline)
    _wait_before_aborts()
    result: queue.SimpleQueue = queue.SimpleQueue()

    def start() -> None:
        import jax
        try:
            jax.distributed.initialize(
                initialization_timeout=int(timeout) + _SPARE_SECONDS, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=_SHUTDOWN_SECONDS, **options)
            result.put(None)
        except BaseException as error:  # raised below, in the thread that waits
            result.put(error)

    # nothing interrupts the call, so that it has a thread of its own
    threading.Thread(target=start, name="jax.distributed.initialize", daemon=True).start()
    try:
        error = result.get(timeout=max(0.1, deadline - time.monotonic()))
    except queue.Empty:
        raise RuntimeError(
            f"not all of the {environment.num_processes or ''} processes of this run have come within {timeout:g} s. "
            f"Look into the logs of the others, and check that they are numbered from 0, each with a number of its "
            f"own, and that their machines reach process 0 ({environment.coordinator or 'found by JAX'})") from None
    if error is not None:
        raise RuntimeError(
            f"JAX cannot start a run of several processes: {error}\nCheck that nothing has used JAX's devices before, "
            "and that the processes reach each other") from error


def _options(environment: Environment, deadline: float) -> dict:
    """Arguments of `jax.distributed.initialize`, after a look at the address that they contain."""
    if environment.coordinator is None:  # JAX finds them
        return {}
    host, _, port = environment.coordinator.rpartition(":")
    if environment.process_id == 0:
        _check_port(host, int(port))
    else:
        _await_leader(host, int(port), environment, deadline)
    ids = environment.local_device_ids
    return {
        "coordinator_address": environment.coordinator, "num_processes": environment.num_processes,
        "process_id": environment.process_id, "local_device_ids": None if ids is None else list(ids),
        "cluster_detection_method": "deactivate",
        # if all processes are on this machine, others have no access
        "coordinator_bind_address": environment.coordinator if host in _HERE else None}


def _check_port(host: str, port: int) -> None:
    """The server of JAX would share a port with the server of another run and take in its processes."""
    here, dual = host in _HERE, socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if host == "[::1]" or (dual and not here) else socket.AF_INET
    try:
        socket.create_server((host.strip("[]") if here else "", port), family=family,
                             dualstack_ipv6=dual and not here).close()
    except OSError as error:
        raise RuntimeError(f"process 0 cannot listen on port {port} ({error}): another run may be using it. Choose "
                           "another port for MLIP_JAX_COORDINATOR") from error


def _await_leader(host: str, port: int, environment: Environment, deadline: float) -> None:
    while True:
        try:
            socket.create_connection((host.strip("[]"), port), max(0.1, min(10.0, deadline - time.monotonic()))).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"process {environment.process_id} cannot reach process 0 on {host}:{port} ({error}). Check that "
                    "process 0 has started (its log), that this machine knows the name of its host, and that no "
                    "firewall is between") from error
            time.sleep(0.2)


def _wait_before_aborts() -> None:
    """Make an abort of this process wait six seconds (the number of SIGABRT), in which `Coordination` can end it.

    JAX aborts a process that has lost process 0, with exit code 134, and takes no callback from Python.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
