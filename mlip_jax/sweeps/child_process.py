"""A process that stops with this one: it gets its signals, and what it says is shown and kept."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

COMMAND = "$ "  # begins the line of a log that has the command
_PR_SET_PDEATHSIG = 1


class Stop:
    """Signals that ask to stop: the first goes on to the process that runs, a second ends that at once.

    Attributes:
      received: The first signal, or None.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self):
        self.received: int | None = None
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Stop:
        # what is ignored stays so: nohup means SIGHUP
        wanted = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in wanted}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def passed_on(self, process: subprocess.Popen) -> Iterator[None]:
        """Within this context signals go to `process`, also one that came just before it."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)  # else one that comes now would be passed on twice
        self._process = process
        try:
            if self.received:
                self._pass_on()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
            yield
        finally:
            self._process = None

    def _handle(self, number, frame):
        again = self.received is not None
        self.received = self.received or number
        if self._process is None:
            return
        if again:
            _end(self._process, signal.SIGKILL)
        else:
            # standard error, unbuffered: what was interrupted may be in the middle of writing to the other one
            os.write(2, f"\n{signal.Signals(number).name}: waiting for the variant to save; once more ends it at once\n"
                     .encode())
            self._pass_on()

    def _pass_on(self):
        # SIGHUP, of a terminal that was closed, asks for the same
        self._process.send_signal(signal.SIGTERM if self.received == signal.SIGHUP else self.received)


def start(command: Sequence[str], log_file: Path, stop: Stop) -> int:
    """Run a command, its output shown and appended to a file; returns its exit code, -N if a signal N ended it."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with open(log_file, "ab", buffering=0) as file:
        file.write(f"{COMMAND}{shlex.join(command)}\n".encode())
        # A session of its own: Ctrl-C in a terminal comes to all processes of one, and twice means at once.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": _columns()},
                                   start_new_session=True, preexec_fn=_stops_with_parent())
        with process, stop.passed_on(process):
            try:
                _copy(process.stdout, file)
                return process.wait()
            except BaseException:
                _end(process, signal.SIGTERM)
                raise


def _columns() -> str:
    """Width that a process is to write in: that of the terminal, which it does not see."""
    return str(shutil.get_terminal_size((120, 24)).columns)


def _stops_with_parent() -> Callable[[], Any] | None:
    """What a new process calls to be asked to stop when this one is killed without a word; Linux can do that."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen, number: int) -> None:
    """A signal to a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _copy(source, file) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while data := os.read(source.fileno(), 65536):
        file.write(data)
        sys.stdout.write(decoder.decode(data))
        sys.stdout.flush()
