"""Messages between the processes of a run outside of their devices, in the key-value store that JAX keeps.

JAX's coordination service runs in process 0, and knows after eleven seconds at most that another process has died. The
others notice the death of process 0 by a call at its port, the only connection that is opened here: JAX itself would
abort them, and it takes no callback from Python.
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
# Between two calls at the port of process 0, and for an answer.
_CALL_SECONDS, _ANSWER_SECONDS = 1.0, 8.0
# For which process 0 waits until the others have read of a failure, or have left: the store ends with it.
_LAST_SECONDS = 3.0


class Coordination:
    """The place of a process in a run, and the store that all processes share.

    Args:
      client: JAX's client of its coordination service, connected.
      address: "host:port" of that service, in process 0.
      index, count: Number of this process, from 0, and of all processes.
      on_failure: Called at most once, in a thread of its own, with a sentence on which other process failed and how.
    """

    def __init__(self, client: Any, address: str, index: int, count: int, on_failure: Callable[[str], None]):
        self.index, self.count = index, count
        self._client, self._on_failure = client, on_failure
        self._turn = 0  # messages of the leader so far
        self._over = threading.Lock()  # taken for good by the first failure
        self._parting = threading.Event()
        self._watches = [_thread(self._await_failure), *([_thread(self._await_silence, address)] if index else ())]
        self._deaths = [] if index else [_thread(self._await_death, k) for k in range(1, count)]

    @property
    def failed(self) -> bool:
        """Whether this process or another has failed."""
        return self._over.locked()

    def barrier(self, name: str, timeout: float | None = None) -> None:
        """Wait until all processes have come to the barrier of this name, `timeout` seconds for each or for ever.

        Raises:
          RuntimeError: One has not come in time, or is at another place of the program.
        """
        if self.index:
            self._put(f"turn/{self._turn}/{self.index}", name.encode())
            self.await_leader(name, timeout)
            return
        for k in range(1, self.count):
            self._take(k, name, timeout)
        self.announce(name)

    def announce(self, name: str, body: bytes = b"") -> None:
        """Leader: send all others a message of 100 kB at most, which they take with `await_leader`."""
        self._put(f"turn/{self._turn}/0", name.encode() + b"\0" + body)
        self._turn += 1

    def await_leader(self, name: str, timeout: float | None = None) -> bytes:
        """Others: wait for the message that the leader announces by this name."""
        body = self._take(0, name, timeout)
        self._turn += 1
        return body

    def fail(self, text: str) -> None:
        """Tell all others that this process has failed; from here on nothing that they do matters."""
        if self._over.acquire(blocking=False):
            self._report(self.index, f"process {self.index} of this run has failed: {text}")

    def await_hearers(self) -> None:
        """Leader, after a failure: wait until the others have read of it."""
        deadline = time.monotonic() + _LAST_SECONDS
        while self.index == 0 and time.monotonic() < deadline:
            if len(self._client.key_value_dir_get_bytes("mlip_jax/heard")) == self.count:
                return
            time.sleep(0.02)

    def close(self, timeout: float | None = None) -> None:
        """Wait until all are here, and part; the leader is the last."""
        import jax
        self.barrier(_END, timeout)
        if self.index:
            self._put(f"parting/{self.index}", b"")
        self._parting.set()
        for k, thread in enumerate(self._deaths, 1):
            thread.join()
            with contextlib.suppress(RuntimeError):  # it died after its work
                self._get(f"parted/{k}", int(_LAST_SECONDS * 1000))
        jax.distributed.shutdown()
        if self.index:  # the client can still write
            self._put(f"parted/{self.index}", b"")
        for thread in self._watches:
            thread.join()

    def _put(self, key: str, value: bytes) -> None:
        self._client.key_value_set_bytes(f"mlip_jax/{key}", value)

    def _get(self, key: str, milliseconds: int = _FOREVER) -> bytes:
        return self._client.blocking_key_value_get_bytes(f"mlip_jax/{key}", milliseconds)

    def _take(self, k: int, name: str, timeout: float | None) -> bytes:
        """Return the body of the message of process `k` in this turn."""
        try:
            message = self._get(f"turn/{self._turn}/{k}", _FOREVER if timeout is None else int(timeout * 1000))
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise RuntimeError(f"process {k} of this run has not come to {name!r} within {timeout:g} s of process "
                               f"{self.index}") from error
        found, _, body = message.partition(b"\0")
        if found != name.encode():
            raise RuntimeError(f"process {self.index} of this run waits for process {k} at {name!r}, which is at "
                               f"{found.decode()!r}: they do not run the same program, or do not have the same config")
        return body

    def _report(self, k: int, text: str) -> None:
        """Write down that process `k` has failed, unless another failed before, and that it reads no more."""
        for key, value in (("failure", json.dumps([k, text[:_MAX_TEXT]]).encode()), (f"heard/{k}", b"")):
            with contextlib.suppress(RuntimeError):  # it is there, or process 0 is gone, as all know
                self._put(key, value)

    def _await_failure(self) -> None:
        """Wait for the first failure of the run."""
        try:
            k, text = json.loads(self._get("failure"))
        except RuntimeError:  # the connection is closed
            self._lose_leader()
            return
        if k == self.index or not self._over.acquire(blocking=False):
            return
        with contextlib.suppress(RuntimeError):
            self._put(f"heard/{self.index}", b"")
            self.await_hearers()
        self._on_failure(text)

    def _await_death(self, k: int) -> None:
        """Leader: wait until process `k` has left or has died."""
        # returns when all of the two that are alive have called it: process k never does
        self._client.get_live_nodes([0, k])
        if f"mlip_jax/parting/{k}" not in dict(self._client.key_value_dir_get_bytes("mlip_jax/parting")):
            self._report(k, _DIED.format(k))

    def _await_silence(self, address: str) -> None:
        """Others: wait until nothing answers at the port of process 0.

        Calls of the client need not return then: the thread that does so may be the one that JAX aborts with.
        """
        host, _, port = address.rpartition(":")
        while not self._parting.wait(_CALL_SECONDS):
            try:
                socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
            except OSError as error:  # others are of this machine, such as too many open files
                if isinstance(error, TimeoutError) or error.errno in (errno.ECONNREFUSED, errno.EHOSTUNREACH):
                    self._lose_leader()
                    return

    def _lose_leader(self) -> None:
        # the client is not touched: its calls would wait for process 0, or for the thread that aborts this process
        if not self._parting.is_set() and self._over.acquire(blocking=False):
            self._on_failure(_DIED.format(0))


def _thread(function: Callable, *args) -> threading.Thread:
    thread = threading.Thread(target=function, args=args, name=function.__name__, daemon=True)
    thread.start()
    return thread
