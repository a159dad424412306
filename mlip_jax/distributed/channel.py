"""TCP connections from every process of a run to its leader, process 0.

They carry what processes tell each other outside of the devices, and they show at once that one has ended: JAX's own
heartbeats take ten seconds, and collectives on a device may wait for ever.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

_HEAD = struct.Struct(">cHQ")  # kind, bytes of the tag, bytes of the body
_MESSAGE, _FAILURE = b"M", b"F"
_END = "end of the run"
_GREETING = "mlip_jax process"
_MAX_TEXT = 2_000


class PeerFailure(RuntimeError):
    """Another process of this run has failed."""


class Channel:
    """The connections of one process, in use.

    Args:
      index, count: Which process this is, of how many.
      links: Leader: a connection of each of the others, by their index. Others: {0: connection to the leader}.
      on_failure: Called once, in a thread of its own, with a sentence on which process failed and how.
    """

    def __init__(self, index: int, count: int, links: dict[int, socket.socket], on_failure: Callable[[str], None]):
        self.index, self.count = index, count
        self._links, self._on_failure = links, on_failure
        self._inbox = {k: queue.SimpleQueue() for k in links}
        self._sending = threading.Lock()
        self._ended: set[int] = set()
        self._over = threading.Lock()  # taken for good by the first failure
        self._reason = ""
        for k in links:
            threading.Thread(target=self._read, args=(k,), name=f"process {k}", daemon=True).start()

    @property
    def failed(self) -> bool:
        """Whether this process or another has failed."""
        return self._over.locked()

    def barrier(self, name: str, timeout: float | None = None) -> None:
        """Wait until all processes have come to the barrier of this name; seconds for each, or None for ever."""
        if self.index:
            self._send(0, name)
            self._take(0, name, timeout)
            return
        for k in self._links:
            self._take(k, name, timeout)
        self.announce(name)

    def announce(self, name: str, body: bytes = b"") -> None:
        """Leader: send to all others, which take it with `await_leader`."""
        for k in self._links:
            self._send(k, name, body)

    def await_leader(self, name: str) -> bytes:
        """Others: what the leader announces by this name."""
        return self._take(0, name)

    def fail(self, text: str) -> None:
        """Tell all others that this process has failed; from here on nothing that they do matters."""
        if self._over.acquire(blocking=False):
            self._reason = f"process {self.index} of this run has failed: {text}"
            self._tell(self._reason)
            self._wake()

    def close(self, timeout: float | None = None) -> None:
        """Wait until all are here, and part."""
        self.barrier(_END, timeout)
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_WR)

    def _send(self, k: int, name: str, body: bytes = b"", kind: bytes = _MESSAGE) -> None:
        tag = name.encode()
        try:
            with self._sending:
                self._links[k].sendall(_HEAD.pack(kind, len(tag), len(body)) + tag + body)
        except OSError as error:
            self._lost(k)
            raise PeerFailure(self._reason) from error

    def _take(self, k: int, name: str, timeout: float | None = None) -> bytes:
        try:
            item = self._inbox[k].get(timeout=timeout)
        except queue.Empty:
            raise RuntimeError(f"process {k} of this run has not come to {name!r} within {timeout:g} s of process "
                               f"{self.index}") from None
        if item is None:
            raise PeerFailure(self._reason)
        found, body = item
        if found != name:
            raise RuntimeError(f"process {self.index} of this run waits for process {k} at {name!r}, which is at "
                               f"{found!r}: they do not run the same program, or do not have the same config")
        return body

    def _read(self, k: int) -> None:
        """All that comes from process k, until it ends."""
        with contextlib.suppress(OSError), self._links[k].makefile("rb") as file:
            for kind, tag, body in _frames(file):
                if kind == _FAILURE:
                    self._failed(body.decode(errors="replace"), k)
                    return
                if tag == _END:
                    self._ended.add(k)
                self._inbox[k].put((tag, body))
        self._lost(k)

    def _lost(self, k: int) -> None:
        if k not in self._ended:
            self._failed(f"process {k} of this run has died (killed, out of memory, or its machine is gone)", k)

    def _failed(self, text: str, k: int) -> None:
        if not self._over.acquire(blocking=False):
            return
        self._reason = text
        self._tell(text, but=k)
        self._on_failure(text)
        self._wake()

    def _wake(self) -> None:
        """Let a main thread that waits know of the failure."""
        for inbox in self._inbox.values():
            inbox.put(None)

    def _tell(self, text: str, but: int | None = None) -> None:
        """Send a failure to all that are connected with this process."""
        for k in self._links:
            if k != but:
                with contextlib.suppress(PeerFailure):
                    self._send(k, "", text[:_MAX_TEXT].encode(), _FAILURE)


def _frames(file) -> Iterator[tuple[bytes, str, bytes]]:
    while len(head := file.read(_HEAD.size)) == _HEAD.size:
        kind, tag_size, body_size = _HEAD.unpack(head)
        content = file.read(tag_size + body_size)
        if len(content) < tag_size + body_size:
            return
        yield kind, content[:tag_size].decode(), content[tag_size:]


def connect(address: str, index: int, count: int, timeout: float, on_failure: Callable[[str], None]) -> Channel:
    """Meet the other processes.

    Args:
      address: "host:port" on which process 0 listens.
      timeout: Seconds after which it is given up.

    Raises:
      RuntimeError: Not all have come, the address cannot be used, or their counts and numbers do not fit together.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    meet = _gather if index == 0 else _join
    links = meet(host.strip("[]"), int(port), index, count, deadline)
    for link in links.values():
        link.settimeout(None)
        _notice_silence(link)
    return Channel(index, count, links, on_failure)


def _gather(host: str, port: int, index: int, count: int, deadline: float) -> dict[int, socket.socket]:
    """Leader: a connection from each of the others."""
    links: dict[int, socket.socket] = {}
    callers, error = [], None
    with _listen(host, port) as server:
        while len(links) < count - 1 and error is None:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                link, (origin, *_) = server.accept()
            except TimeoutError:
                missing = ", ".join(str(k) for k in range(1, count) if k not in links)
                error = (f"{len(links) + 1} of {count} processes have come to {host}:{port}; missing: {missing}. Look "
                         "into their logs, and check that their machines reach it")
                break
            greeting = _greeting(link)
            if greeting is None:  # something that calls at ports, and none of ours
                link.close()
                continue
            callers.append(link)
            error = _misfit(*greeting, origin, count, links)
            links[greeting[0]] = link
    answer = json.dumps({"error": error}).encode() + b"\n"
    for link in callers:
        with contextlib.suppress(OSError):
            link.sendall(answer)
    if error is not None:
        for link in callers:
            link.close()
        raise RuntimeError(error)
    return links


def _misfit(k: int, their_count: int, origin: str, count: int, links) -> str | None:
    """Why process k, which has come from `origin`, is none of this run."""
    if their_count != count:
        return f"process {k} on {origin} is of a run of {their_count} processes, process 0 of one of {count}"
    if k in links or not 0 < k < count:
        return f"a second process {k} has come, from {origin}: each needs a number of its own, 0 to {count - 1}"
    return None


def _listen(host: str, port: int) -> socket.socket:
    # only what comes from this machine, where all processes are on it
    here = host in ("localhost", "127.0.0.1", "::1")
    dual = not here and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((("::1" if host == "::1" else "127.0.0.1") if here else "", port),
                                    family=socket.AF_INET6 if dual or host == "::1" else socket.AF_INET,
                                    dualstack_ipv6=dual, backlog=1024)
    except OSError as error:
        raise RuntimeError(f"process 0 cannot listen on port {port} ({error}): another run may be using it. Choose "
                           "another port for MLIP_JAX_COORDINATOR") from error


def _greeting(link: socket.socket) -> tuple[int, int] | None:
    """(index, count) of the process that has come; None if it is none."""
    link.settimeout(5.0)
    try:
        text = _line(link)
        name, index, count = json.loads(text)
        return (int(index), int(count)) if name == _GREETING else None
    except (OSError, ValueError, TypeError):
        return None


def _join(host: str, port: int, index: int, count: int, deadline: float) -> dict[int, socket.socket]:
    """Others: the connection to the leader, once all have come."""
    while True:
        try:
            link = socket.create_connection((host, port), timeout=max(0.1, min(10.0, deadline - time.monotonic())))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"process {index} cannot reach process 0 on {host}:{port} ({error}). Check that process 0 has "
                    "started (its log), that this machine knows the name of its host, and that no firewall is between"
                ) from error
            time.sleep(0.2)
    try:
        link.sendall(json.dumps([_GREETING, index, count]).encode() + b"\n")
        link.settimeout(max(1.0, deadline + 5.0 - time.monotonic()))
        answer = json.loads(_line(link))["error"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RuntimeError(f"process {index}: process 0 on {host}:{port} ended the connection before all {count} "
                           f"processes had come ({error}). See its log") from error
    if answer is not None:
        raise RuntimeError(answer)
    return {0: link}


def _line(link: socket.socket) -> bytes:
    """One short line, and nothing of what comes after it."""
    text = b""
    while len(text) < 4_096 and not text.endswith(b"\n"):
        part = link.recv(1)
        if not part:
            raise ConnectionError("the connection was closed")
        text += part
    return text


def _notice_silence(link: socket.socket) -> None:
    """A machine that is gone sends nothing, not even an end: ask after three seconds of silence, give up after ten."""
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 10_000)):
        if hasattr(socket, name):  # Linux has all of them
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
