"""Messages between the processes of a run, in JAX's key-value store, without their devices.

JAX's coordination service runs in process 0 and detects within eleven seconds that another process
has died. The others detect the death of process 0 by connecting to its port, the only connection
that this module opens. JAX itself would abort them and does not accept a Python callback.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

_FOREVER = 2**40  # milliseconds
_END = "end of the run"
_DIED = "process {} of this run has died (killed, out of memory, or its machine is gone)"
_MAX_TEXT = 2_000
# Interval between two connections to the port of process 0, and timeout of a connection.
_CALL_SECONDS, _ANSWER_SECONDS = 1.0, 8.0
# Time that process 0 waits at its end (s), until the others have read of a failure or have
# disconnected. The store ends with process 0.
_LAST_SECONDS = 3.0


class Coordination:
    """Connection of a process to the others of its run.

    Args:
      client: JAX's client of its coordination service, connected.
      address: "host:port" of that service, in process 0.
      index: Index of this process, from 0.
      count: Number of processes.
      on_failure: Function that is called at most once, in another thread, when another process has
        failed. Its argument is a sentence that says which one and how.
    """

    def __init__(
        self, client: Any, address: str, index: int, count: int, on_failure: Callable[[str], None]
    ):
        self.index, self.count = index, count
        self._client, self._on_failure = client, on_failure
        self._turn = 0  # number of messages of the leader so far
        self._over = threading.Lock()  # acquired by the first failure and never released
        self._parting = threading.Event()
        self._watches = [
            _thread(self._await_failure),
            *([_thread(self._await_silence, address)] if index else ()),
        ]
        self._deaths = [] if index else [_thread(self._await_death, k) for k in range(1, count)]

    @property
    def failed(self) -> bool:
        """Return whether this process or another has failed."""
        return self._over.locked()

    def barrier(self, name: str, timeout: float | None = None) -> None:
        """Wait until all processes have reached the barrier of this name.

        Args:
          name: Name of the barrier.
          timeout: Maximum time to wait for each process (s). None: forever.

        Raises:
          RuntimeError: A process has not arrived in time, or is in another part of the program.
        """
        if self.index:
            self._put(f"turn/{self._turn}/{self.index}", name.encode())
            self.await_leader(name, timeout)
            return
        for k in range(1, self.count):
            self._take(k, name, timeout)
        self.announce(name)

    def announce(self, name: str, body: bytes = b"") -> None:
        """Send a message of at most 100 kB to all others, which receive it by `await_leader`.

        Only for the leader.
        """
        self._put(f"turn/{self._turn}/0", name.encode() + b"\0" + body)
        self._turn += 1

    def await_leader(self, name: str, timeout: float | None = None) -> bytes:
        """Wait for the message of the leader with this name and return it. Not for the leader."""
        body = self._take(0, name, timeout)
        self._turn += 1
        return body

    def fail(self, text: str) -> None:
        """Report to all others that this process has failed. Later failures are ignored."""
        if self._over.acquire(blocking=False):
            self._report(self.index, f"process {self.index} of this run has failed: {text}")

    def await_acknowledgments(self) -> None:
        """Wait until the others have read of a failure, if this process is the leader."""
        deadline = time.monotonic() + _LAST_SECONDS
        while self.index == 0 and time.monotonic() < deadline:
            if len(self._client.key_value_dir_get_bytes("mlip_jax/heard")) == self.count:
                return
            time.sleep(0.02)

    def close(self, timeout: float | None = None) -> None:
        """Wait for all processes and disconnect. The leader is the last to disconnect."""
        import jax

        self.barrier(_END, timeout)
        if self.index:
            self._put(f"parting/{self.index}", b"")
        self._parting.set()
        for k, thread in enumerate(self._deaths, 1):
            thread.join()
            with contextlib.suppress(RuntimeError):  # it died after its work was done
                self._get(f"parted/{k}", int(_LAST_SECONDS * 1000))
        jax.distributed.shutdown()
        if self.index:  # the client can still write
            self._put(f"parted/{self.index}", b"")
        for thread in self._watches:
            thread.join()

    def _put(self, key: str, value: bytes) -> None:
        """Store a value. Raises RuntimeError if the key exists or process 0 has died."""
        self._client.key_value_set_bytes(f"mlip_jax/{key}", value)

    def _get(self, key: str, milliseconds: int = _FOREVER) -> bytes:
        """Wait for a key and return its value."""
        return self._client.blocking_key_value_get_bytes(f"mlip_jax/{key}", milliseconds)

    def _take(self, k: int, name: str, timeout: float | None) -> bytes:
        """Return the body of the message of process `k` in this turn."""
        try:
            message = self._get(
                f"turn/{self._turn}/{k}", _FOREVER if timeout is None else int(timeout * 1000)
            )
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise RuntimeError(
                f"process {k} of this run has not reached {name!r} within {timeout:g} s of process "
                f"{self.index}"
            ) from error
        received, _, body = message.partition(b"\0")
        if received != name.encode():
            raise RuntimeError(
                f"process {self.index} of this run waits for process {k} at {name!r}, but that "
                f"process is at {received.decode()!r}. Start all processes with the same program "
                "and the same config."
            )
        return body

    def _report(self, k: int, text: str) -> None:
        """Store that process `k` has failed, unless another one failed before.

        It also counts as a process that has read of the failure.
        """
        for key, value in (
            ("failure", json.dumps([k, text[:_MAX_TEXT]]).encode()),
            (f"heard/{k}", b""),
        ):
            # the key exists, or process 0 has died, which all others detect
            with contextlib.suppress(RuntimeError):
                self._put(key, value)

    def _await_failure(self) -> None:
        """Wait for the first failure of the run and handle it. Runs in a thread."""
        try:
            k, text = json.loads(self._get("failure"))
        except RuntimeError:  # the connection is closed
            self._lose_leader()
            return
        if k == self.index or not self._over.acquire(blocking=False):
            return
        with contextlib.suppress(RuntimeError):
            self._put(f"heard/{self.index}", b"")
            self.await_acknowledgments()
        self._on_failure(text)

    def _await_death(self, k: int) -> None:
        """Wait until process `k` has disconnected or died, and report a death. Runs in a thread.

        Only for the leader.
        """
        # Returns when every live process of the two has called it. Process k never calls it.
        self._client.get_live_nodes([0, k])
        if f"mlip_jax/parting/{k}" not in dict(
            self._client.key_value_dir_get_bytes("mlip_jax/parting")
        ):
            self._report(k, _DIED.format(k))

    def _await_silence(self, address: str) -> None:
        """Wait until process 0 no longer answers at its port. Runs in a thread, not for the leader.

        Calls of the client may never return then, because the thread that would complete them may
        be the one in which JAX aborts this process.
        """
        host, _, port = address.rpartition(":")
        while not self._parting.wait(_CALL_SECONDS):
            try:
                socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
            except OSError as error:  # other errors are local, such as too many open files
                if isinstance(error, TimeoutError) or error.errno in (
                    errno.ECONNREFUSED,
                    errno.EHOSTUNREACH,
                ):
                    self._lose_leader()
                    return

    def _lose_leader(self) -> None:
        """Handle the death of process 0, unless the run is ending anyway."""
        # Do not call the client: it would wait for process 0 or for the thread that aborts this
        # process.
        if not self._parting.is_set() and self._over.acquire(blocking=False):
            self._on_failure(_DIED.format(0))


def _thread(function: Callable, *args) -> threading.Thread:
    """Start a daemon thread that calls `function`."""
    thread = threading.Thread(target=function, args=args, name=function.__name__, daemon=True)
    thread.start()
    return thread
