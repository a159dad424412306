"""The process of native parsers, from the side of its parent.

Requests and replies are lists of byte strings, sent through pipes with their lengths (8 bytes each).
The process is started by the first request and ends when its parent closes the pipe. It is replaced
after a crash, if it needs too long, and if it has ended between two requests, which says nothing
about the next one.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from mlip_jax.datasets.isolation.program import pack, unpack

SECONDS = 60.0  # limit of one request
_GRACE = 10.0  # further time (s) after which the process of a killed parent ends
_START_SECONDS = 120.0  # limit of the start, which reads NumPy, perhaps from a network file system
_NO_START = "the process that reads files and molecules cannot be started"
_MAX_REPLY = 2**30  # bytes; a corrupted process can reply anything
_PROGRAM = Path(__file__).with_name("program.py")


class ParserDeathError(ValueError):
    """The process of native parsers crashed or took too long."""


class ParserProcess:
    """Process of native parsers. Threads may share it.

    Attributes:
      process: The running process, or None.
    """

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self._owner = 0  # process that started it
        self._lock = threading.Lock()

    def call(self, parser: str, *parts: bytes, seconds: float | None = None) -> list[bytes]:
        """Return the reply to a request.

        Args:
          parser: Name of a function in program.PARSERS.
          *parts: Arguments of the function.
          seconds: Time limit (s); None for SECONDS.

        Raises:
          ParserDeathError: The process crashed or took too long.
          ValueError: The parser raised an error.
          ImportError: A package of the parser is missing.
          OSError: The process cannot be started.
        """
        seconds = SECONDS if seconds is None else seconds
        limit = str(seconds + _GRACE).encode()
        with self._lock:
            if not self._is_ready():
                self._start()
            try:
                self.process.stdin.write(pack([parser.encode(), limit, *parts]))
                self.process.stdin.flush()
                reply = self._receive(seconds)
                status, *values = _validate(unpack(reply))
            except (OSError, EOFError, ValueError, struct.error) as error:
                self.process.kill()
                code = self.process.wait()
                self.process = None
                reason = str(error) if isinstance(error, TimeoutError) else f"ended with {code}"
                raise ParserDeathError(f"the process of the parser: {reason}") from error
            except BaseException:  # an interrupt: the reply would be taken for that of the next one
                self.process.kill()
                self.process.wait()
                self.process = None
                raise
        if status == b"missing":
            raise ImportError(values[0].decode())
        if status == b"error":
            raise ValueError(values[0].decode())
        return values

    def _is_ready(self) -> bool:
        """Return whether the process waits for a request."""
        # a forked process must not share the pipe of its parent
        return (
            self.process is not None and self._owner == os.getpid() and self.process.poll() is None
        )

    def _start(self) -> None:
        """Start the process."""
        self.process = None
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise OSError(error.errno, f"{_NO_START} ({error.strerror})") from error
        self.process, self._owner = process, os.getpid()
        try:
            self._receive(_START_SECONDS)
        except BaseException as error:
            process.kill()
            code, self.process = process.wait(), None
            if not isinstance(error, OSError | EOFError):
                raise
            raise OSError(errno.ECHILD, f"{_NO_START} (it ended with {code})") from error

    def _receive(self, seconds: float) -> bytes:
        """Return a reply. Raise EOFError or TimeoutError if there is none."""
        descriptor, deadline = self.process.stdout.fileno(), time.monotonic() + seconds
        data, size = bytearray(), 8
        while len(data) < size:
            if not select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise TimeoutError(f"no result within {seconds:g} s")
            part = os.read(descriptor, 1 << 20)
            if not part:
                raise EOFError("the process ended")
            data += part
            if len(data) >= 8:
                size = 8 + struct.unpack_from("=Q", data)[0]
            if size > _MAX_REPLY:
                raise EOFError(f"a reply of {size} bytes")
        return bytes(data[8:])


def _validate(parts: list[bytes]) -> list[bytes]:
    """Return the parts of a reply. Raise ValueError if a corrupted process sent it."""
    if not parts or parts[0] not in (b"ok", b"error", b"missing") or parts == parts[:1] != [b"ok"]:
        raise ValueError("an invalid reply")
    return parts


PARSERS = ParserProcess()  # shared by the package
