"""Start of a run of several processes: they connect, and JAX starts its coordination service."""

from __future__ import annotations

import ctypes
import queue
import signal
import socket
import threading

from mlip_jax.distributed.environment import Environment

_HEARTBEAT_SECONDS = 10
_SHUTDOWN_SECONDS = 30
# JAX aborts the process after its own timeout, which is therefore longer than that of `meet`.
_SPARE_SECONDS = 60


def meet(environment: Environment, timeout: float) -> None:
    """Call `jax.distributed.initialize`, which returns when all processes have called it.

    Raises:
      RuntimeError: Not all processes have connected within `timeout` seconds, or JAX cannot start.
    """
    options = {} if environment.coordinator is None else _options(environment)
    _wait_before_aborts()
    result: queue.SimpleQueue = queue.SimpleQueue()

    def start() -> None:
        import jax

        try:
            jax.distributed.initialize(
                initialization_timeout=int(timeout) + _SPARE_SECONDS,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
                **options,
            )
            result.put(None)
        except BaseException as error:  # raised below, in the calling thread
            result.put(error)

    # the call cannot be interrupted, so it runs in another thread
    threading.Thread(target=start, name="jax.distributed.initialize", daemon=True).start()
    try:
        error = result.get(timeout=timeout)
    except queue.Empty:
        raise RuntimeError(
            f"not all processes of this run have connected within {timeout:g} s. Read the logs of "
            "the others. Check that their number is "
            f"{environment.num_processes or 'that which JAX detects'}, that each has its own index "
            "from 0, and that no firewall separates them from process 0 "
            f"({environment.coordinator or 'detected by JAX'})."
        ) from None
    if error is not None:
        raise RuntimeError(
            f"JAX cannot start a run of several processes: {error}\nCheck that no code has used "
            "JAX's devices before, and that the processes can connect to each other."
        ) from error


def _options(environment: Environment) -> dict:
    """Return the arguments of `jax.distributed.initialize` for the place of this process.

    Raises:
      RuntimeError: The port is in use. JAX would share it and mix the processes of two runs.
    """
    host, _, port = environment.coordinator.rpartition(":")
    is_local = host in ("localhost", "127.0.0.1", "[::1]")
    if environment.process_id == 0:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            socket.create_server(
                (host.strip("[]") if is_local else "", int(port)), family=family
            ).close()
        except OSError as error:
            raise RuntimeError(
                f"process 0 cannot listen on port {port} ({error}); another run may use it. Choose "
                "another port for MLIP_JAX_COORDINATOR."
            ) from error
    ids = environment.local_device_ids
    return {
        "coordinator_address": environment.coordinator,
        "num_processes": environment.num_processes,
        "process_id": environment.process_id,
        "local_device_ids": None if ids is None else list(ids),
        "cluster_detection_method": "deactivate",
        # accept only local connections if all processes are on this machine
        "coordinator_bind_address": environment.coordinator if is_local else None,
    }


def _wait_before_aborts() -> None:
    """Make an abort of this process wait six seconds, so that `Coordination` can end it first.

    JAX aborts a process that has lost process 0, with exit code 134, and does not accept a Python
    callback. The handler is `sleep`, whose argument is the number of the signal: SIGABRT is 6.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
