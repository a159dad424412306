"""A process that gets the signals of this one and ends with it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mlip_jax.child import Stop, start

REPOSITORY = Path(__file__).parents[1]
# Writes the names of the signals that it gets; ends at the first of them if it is asked to, with 75.
PROGRAM = """
import pathlib, signal, sys, time
here, ends = pathlib.Path(sys.argv[1]), sys.argv[2] == "ends"

def got(number, frame):
    with open(here / "got", "a") as file:
        print(signal.Signals(number).name, file=file, flush=True)
    if ends:
        sys.exit(75)

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, got)
(here / "ready").touch()
time.sleep(60)
"""


def program(folder, ends="ends"):
    return [sys.executable, "-c", PROGRAM, str(folder), ends]


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def send(folder, *numbers):
    """Signals to this process once the program of `folder` is ready, the second when it got the first."""

    def send():
        wait_for(folder / "ready")
        for number in numbers:
            os.kill(os.getpid(), number)
            wait_for(folder / "got")

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("sent, got", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGUSR1", "SIGUSR1"),
                                       ("SIGHUP", "SIGTERM")])
def test_a_signal_goes_on_once(tmp_path, sent, got):
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        thread = send(tmp_path, signal.Signals[sent])
        code = start(program(tmp_path), tmp_path / "log.txt", stop)
        thread.join()
    assert code == 75 and (tmp_path / "got").read_text().split() == [got]
    assert stop.received == signal.Signals[sent] and signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_ends_at_once(tmp_path):
    began = time.monotonic()
    with Stop() as stop:
        thread = send(tmp_path, signal.SIGINT, signal.SIGINT)
        code = start(program(tmp_path, "stays"), tmp_path / "log.txt", stop)
        thread.join()
    assert code == -signal.SIGKILL and time.monotonic() - began < 30


def test_a_signal_before_the_process_began_reaches_it(tmp_path):
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        code = start(program(tmp_path), tmp_path / "log.txt", stop)
    assert code in (75, -signal.SIGTERM)  # before or after it could set its handler


def test_ignored_signals_stay_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
        assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_is_shown_and_kept(tmp_path, capsys):
    script = "import sys; print('one ä'); print('two', file=sys.stderr); sys.exit(3)"
    for _ in range(2):
        with Stop() as stop:
            assert start([sys.executable, "-X", "utf8", "-c", script], tmp_path / "a/log.txt", stop) == 3
    text = (tmp_path / "a/log.txt").read_text(encoding="utf-8")
    assert text.count("one ä\ntwo\n") == 2 and text.startswith(f"$ {sys.executable} ")
    assert capsys.readouterr().out == "one ä\ntwo\n" * 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_process_is_asked_to_stop_when_its_parent_is_killed(tmp_path):
    script = ("import pathlib, sys\nfrom mlip_jax.child import Stop, start\n"
              "with Stop() as stop:\n    start(sys.argv[2:], pathlib.Path(sys.argv[1]), stop)\n")
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "log.txt"), *program(tmp_path)],
                              env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    wait_for(tmp_path / "ready")
    parent.kill()
    parent.wait()
    wait_for(tmp_path / "got")
    assert (tmp_path / "got").read_text().split() == ["SIGTERM"]
