"""Child process whose output is shown and logged, and to which this process forwards its signals.

On Linux, the child ends when this process is killed. Neither psutil nor a process pool
provides this: psutil does not handle the death of a parent, and the session of the child already
groups all processes that it starts.
"""

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

from mlip_jax.files import make_subfolder, open_in_place

COMMAND_PREFIX = "$ "  # marks the line of a log that holds the command
_PR_SET_PDEATHSIG = 1  # option of prctl(2): signal to receive when the parent dies


class SignalForwarder:
    """Context that forwards stop signals to a child process; a second signal kills the child.

    Attributes:
      received: Number of the first signal received, or None.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self):
        self.received: int | None = None
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> SignalForwarder:
        # Ignored signals stay ignored: nohup ignores SIGHUP on purpose.
        handled = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def forward_to(self, process: subprocess.Popen) -> Iterator[None]:
        """Forward signals to `process` within this context, including an earlier signal."""
        # Block signals; otherwise a signal that arrives before `_forward` would be forwarded twice.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        self._process = process
        try:
            try:
                if self.received:
                    self._forward()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield
        finally:
            self._process = None

    def _handle(self, number, frame):
        """Forward the first signal to the child; a second signal kills its process group."""
        again = self.received is not None
        self.received = self.received or number
        if self._process is None:
            return
        if again:
            _signal_group(self._process, signal.SIGKILL)
        else:
            # Unbuffered: the signal may have interrupted a write to sys.stdout or sys.stderr.
            os.write(
                2,
                f"\n{signal.Signals(number).name}: waiting for the variant to save; the same "
                "signal again "
                "ends it immediately\n".encode(),
            )
            self._forward()

    def _forward(self):
        # A closed terminal sends SIGHUP, which has the same meaning as SIGTERM.
        self._process.send_signal(
            signal.SIGTERM if self.received == signal.SIGHUP else self.received
        )


def run_logged(command: Sequence[str], log_file: Path, signals: SignalForwarder) -> int:
    """Run a command, print its output and append it to a file.

    Returns:
      Exit code of the command, or -N if signal N ended it.
    """
    make_subfolder(log_file.parent)
    with open_in_place(log_file, "ab", buffering=0) as file:
        file.write(f"{COMMAND_PREFIX}{shlex.join(command)}\n".encode())
        # A terminal sends Ctrl-C to all processes of its session. The child gets its own session;
        # otherwise it would receive the signal twice, and a second signal means exit immediately.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": _terminal_width()},
            start_new_session=True,
            preexec_fn=_stop_with_parent(),
        )
        with process, signals.forward_to(process):
            try:
                _copy_output(process.stdout, file)
                return process.wait()
            except BaseException:
                _signal_group(process, signal.SIGTERM)
                raise


def _terminal_width() -> str:
    """Return the width of the terminal in characters; the child cannot query it."""
    return str(shutil.get_terminal_size((120, 24)).columns)


def _stop_with_parent() -> Callable[[], Any] | None:
    """Return a function that makes Linux send SIGTERM to the child when its parent is killed.

    Return None on other systems. The function runs in the child before the command starts.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal_group(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a child process and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _copy_output(source, file) -> None:
    """Copy the output of the child to the log and to stdout as it arrives."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while data := os.read(source.fileno(), 65536):
        file.write(data)
        sys.stdout.write(decoder.decode(data))
        sys.stdout.flush()
