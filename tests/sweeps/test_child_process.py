"""Tests for child_process: a child receives the signals of this process and ends with it."""

import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mlip_jax.sweeps.child_process import SignalForwarder, run_logged

REPOSITORY = Path(__file__).parents[2]
# Program that writes "ready" and the names of its signals to a pipe; the first may end it with 75.
PROGRAM = """
import os, signal, sys
signal.alarm(60)
pipe, ends = os.open(sys.argv[1], os.O_WRONLY), sys.argv[2] == "ends"

def report(number, frame):
    os.write(pipe, (signal.Signals(number).name + "\\n").encode())
    if ends:
        sys.exit(75)

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, report)
os.write(pipe, b"ready\\n")
while True:
    signal.pause()
"""


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def open_when_written(pipe):
    """Open the pipe once the program has written to it."""
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert select.select([reader], [], [], 30)[0], "the program did not start"
    os.set_blocking(reader, True)
    return open(reader)


def program(pipe, ends="ends"):
    return [sys.executable, "-I", "-S", "-c", PROGRAM, str(pipe), ends]


def run_and_signal(command, pipe, log_file, *numbers):
    """Run the program and send signals to this process, one for each line that the program writes.

    Returns the exit code, all lines, and the first signal that was seen here.
    """
    lines = []

    def send():
        with open_when_written(pipe) as file:
            for number in numbers:
                lines.append(file.readline().strip())
                os.kill(os.getpid(), number)
            lines.extend(file.read().split())

    with SignalForwarder() as signals:
        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        code = run_logged(command, log_file, signals)
        thread.join(30)
    return code, lines, signals.received


@pytest.mark.parametrize(
    "sent, received",
    [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGUSR1", "SIGUSR1"), ("SIGHUP", "SIGTERM")],
)
def test_a_signal_is_forwarded_once(tmp_path, pipe, sent, received):
    before = signal.getsignal(signal.SIGTERM)
    assert run_and_signal(program(pipe), pipe, tmp_path / "log.txt", signal.Signals[sent]) == (
        75,
        ["ready", received],
        signal.Signals[sent],
    )
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_kills(tmp_path, pipe):
    assert run_and_signal(
        program(pipe, "stays"), pipe, tmp_path / "log.txt", signal.SIGINT, signal.SIGINT
    ) == (-signal.SIGKILL, ["ready", "SIGINT"], signal.SIGINT)


def test_a_signal_before_the_process_began_reaches_it(tmp_path):
    with SignalForwarder() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert run_logged(["sleep", "60"], tmp_path / "log.txt", signals) == -signal.SIGTERM


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalForwarder() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_is_printed_and_logged(tmp_path, capsys):
    command = ["sh", "-c", "echo 'one ä'; echo two >&2; exit 3"]
    for _ in range(2):
        with SignalForwarder() as signals:
            assert run_logged(command, tmp_path / "a/log.txt", signals) == 3
    text = (tmp_path / "a/log.txt").read_text(encoding="utf-8")
    assert text.count("one ä\ntwo\n") == 2 and text.startswith("$ sh -c ")
    assert capsys.readouterr().out == "one ä\ntwo\n" * 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the death of the parent")
def test_a_process_is_asked_to_stop_when_its_parent_is_killed(tmp_path, pipe):
    script = (
        "import pathlib, sys\nfrom mlip_jax.sweeps.child_process import SignalForwarder, run_logged\n"
        "with SignalForwarder() as signals:\n    run_logged(sys.argv[2:], pathlib.Path(sys.argv[1]), signals)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "log.txt"), *program(pipe)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    with open_when_written(pipe) as file:
        assert file.readline() == "ready\n"
        parent.kill()
        parent.wait()
        assert file.read() == "SIGTERM\n"


def test_the_mask_of_signals_is_restored_after_an_error():
    """Detects signals that stay blocked if forwarding fails, or that lose an earlier block."""

    class Ended:
        def send_signal(self, number):
            raise PermissionError

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        signals = SignalForwarder()
        signals.received = signal.SIGTERM
        with pytest.raises(PermissionError), signals.forward_to(Ended()):
            pass
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before | {signal.SIGUSR1}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
