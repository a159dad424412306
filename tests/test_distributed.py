"""Tests for runs of several processes: connection, communication, signals, and failures of one."""

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlip_jax import distributed
from mlip_jax.distributed import StopSignal
from mlip_jax.distributed.values import decode, encode
from tests.distributed_program import LARGE
from tests.forks import Forks
from tests.ports import free_port

REPOSITORY = Path(__file__).parents[1]


# --- values


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3),
    max_leaves=12,
)


@given(plain)
def test_plain_values_round_trip(value):
    assert decode(encode(value)) == value


def test_arrays_round_trip():
    value = {
        "a": [np.arange(6.0).reshape(2, 3).T, np.array([], np.int8)],
        "b": np.float32(0.1),
        "c": np.array(["å", "b"]),
        "d": np.array(np.nan),
    }
    received = distributed.broadcast(value)
    assert received["b"].dtype == np.float32 and received["b"] == np.float32(0.1)
    assert received["d"].shape == ()
    for before, after in [
        *zip(value["a"], received["a"]),
        (value["c"], received["c"]),
        (value["d"], received["d"]),
    ]:
        np.testing.assert_array_equal(before, after)
        assert before.dtype == after.dtype


@pytest.mark.parametrize(
    "value, message",
    [
        ({"a": [1, {2}]}, r"value\['a'\]\[1\]: set"),
        ({1: 2}, "the key 1"),
        ({"__array__": 1}, "__array__"),
        (np.array([None]), "Python objects"),
        (b"", "bytes"),
    ],
)
def test_other_values_are_errors(value, message):
    with pytest.raises(TypeError, match=message):
        distributed.broadcast(value)


def test_single_process_needs_no_coordination():
    with distributed.session(None):
        assert distributed.leader() and (distributed.index(), distributed.count()) == (0, 1)
        distributed.barrier("here")
        with distributed.leader_first("body"):
            assert distributed.broadcast((1, "a")) == [1, "a"]
        with pytest.raises(KeyError), distributed.leader_first("body"):
            raise KeyError("a")
    distributed.shutdown()


# --- errors and signals


@pytest.mark.parametrize(
    "text",
    [
        "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read "
        "error [127.0.0.1]:23949: Connection reset by peer",
        "INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or there was a "
        "network error",
        "UNAVAILABLE: Task 1 heartbeat timeout. This indicates that the remote task has failed",
        "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was "
        "preempted/died",
    ],
)
def test_errors_due_to_a_dead_process_are_recognized(text):
    assert "last checkpoint" in distributed.failed_peer_message(ValueError(text))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("shapes (3,) and (4,) do not match"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        ConnectionResetError("Connection reset by peer"),
        RuntimeError("NCCL: unhandled cuda error"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_not_attributed_to_a_dead_process(error):
    assert distributed.failed_peer_message(error) is None


def test_first_signal_is_stored(caplog):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with StopSignal() as stop:
        assert stop.received is None
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.received == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    deadline = time.monotonic() + 60
    while not caplog.messages:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("SIGUSR1")


def test_signals_in_another_thread():
    def enter():
        with StopSignal() as stop:
            return signal.getsignal(signal.SIGTERM), stop.received

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result(60) == (signal.getsignal(signal.SIGTERM), None)


def test_second_sigterm_ends_the_process_at_once():
    code = (
        "import os, signal, time\nfrom mlip_jax.distributed import StopSignal\n"
        "with StopSignal() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    assert stop.received == 'SIGTERM'\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60).returncode == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_during_garbage_collection_is_not_lost(number):
    """Python ignores exceptions raised there, where JAX registers callbacks."""

    def collected(phase, info):
        if phase == "stop" and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # Python calls the handler during the sleep

    sent, hook = [], sys.unraisablehook
    gc.callbacks.append(collected)
    try:
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as caught:
            with distributed.ended_by_signals():
                gc.collect()
                assert sent
                time.sleep(10)
        assert number == signal.SIGINT or caught.value.code == 75
    finally:
        gc.callbacks.remove(collected)
    assert sys.unraisablehook is hook


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_exception_that_replaces_the_one_of_a_signal_ends_the_run(number, caplog):
    """NumPy did so in `np.unique`, and the exit code was that of an error."""
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as caught:
        with distributed.ended_by_signals():
            try:
                os.kill(os.getpid(), number)
                time.sleep(10)
            except BaseException:
                raise TypeError("Cannot compare structured arrays") from None
    assert number == signal.SIGINT or caught.value.code == 75
    assert "Cannot compare structured arrays" in caplog.text
    assert signal.getsignal(number) is before


def test_an_ignored_interrupt_remains_ignored():
    """Detects that Ctrl-C in a terminal ends a run in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with distributed.ended_by_signals():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_without_a_signal_is_raised():
    with pytest.raises(TypeError), distributed.ended_by_signals():
        raise TypeError


# --- real processes


@pytest.fixture(scope="module")
def forks():
    with Forks("tests.distributed_program") as forks:
        yield forks


@pytest.fixture
def processes(forks, tmp_path, monkeypatch):
    """Return a function that starts two processes of a run in `tmp_path`, with their logs there."""
    started = []

    def start(*arguments):
        port = str(free_port())
        for k in range(2):
            with open(tmp_path / f"log_{k}", "w") as log:
                started.append(
                    forks.start(
                        "from tests import distributed_program\ndistributed_program.main()",
                        f"--workdir={tmp_path}",
                        *arguments,
                        stdout=log,
                        MLIP_JAX_COORDINATOR=f"localhost:{port}",
                        MLIP_JAX_NUM_PROCESSES="2",
                        MLIP_JAX_PROCESS_ID=str(k),
                    )
                )
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(paths, started):
    deadline = time.monotonic() + 60
    while not all(p.exists() and p.stat().st_size for p in paths):
        assert time.monotonic() < deadline and all(p.poll() is None for p in started), (
            "the processes did not start"
        )
        time.sleep(0.02)


def test_processes_of_launch_local_communicate(tmp_path, monkeypatch):
    for name in [n for n in os.environ if n.startswith(("SLURM", "MLIP_JAX", "XLA_FLAGS"))]:
        monkeypatch.delenv(name)
    done = subprocess.run(
        [
            REPOSITORY / "launch/local.sh",
            "-n",
            "2",
            "--devices-per-process",
            "2",
            "-m",
            "tests.distributed_program",
            "--",
            "--task=communicate",
            f"--workdir={tmp_path}",
        ],
        capture_output=True,
        text=True,
        timeout=90,
        env=os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / f"communicate_{k}.json").read_text()) for k in range(2)]
    for k, result in enumerate(results):
        assert result == results[0] | {
            "arrival": result["arrival"],
            "after_barrier": result["after_barrier"],
            "jax": [k, 2],
        }
    assert results[0] == results[0] | {
        "name": "Ångström",
        "sizes": list(range(5)),
        "dtype": "int16",
        "pair": [1, None],
        "text": "by the leader",
        "large": hashlib.sha256(LARGE).hexdigest(),
        "count": 2,
        "devices": 4,
    }
    # one process arrives half a second later
    assert min(r["after_barrier"] for r in results) >= max(r["arrival"] for r in results)


@pytest.mark.slow
def test_processes_of_different_counts_end_with_a_reason(forks, tmp_path):
    """Detects processes of two launches that meet, and wait for each other forever."""
    port, started = free_port(), []
    for k, count in enumerate("23"):
        with open(tmp_path / f"log_{k}", "w") as log:
            started.append(
                forks.start(
                    "from tests import distributed_program\ndistributed_program.main()",
                    f"--workdir={tmp_path}",
                    stdout=log,
                    MLIP_JAX_COORDINATOR=f"localhost:{port}",
                    MLIP_JAX_NUM_PROCESSES=count,
                    MLIP_JAX_PROCESS_ID=str(k),
                )
            )
    try:
        codes = [process.wait(60) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    logs = [(tmp_path / f"log_{k}").read_text() for k in range(2)]
    assert 0 not in codes, logs
    assert any("a run of 3 processes" in log and "same" in log for log in logs), logs


@pytest.mark.parametrize("killed", [1, 0])
def test_survivor_of_a_kill_ends_within_seconds(processes, tmp_path, killed):
    """JAX detects the end of process 1 within eleven seconds; that of process 0 closes its port."""
    started = processes()
    wait_for([tmp_path / f"steps_{k}" for k in range(2)], started)
    assert (tmp_path / "steps_0").read_text() == "2"
    started[killed].kill()
    assert started[1 - killed].wait(15) == distributed.EXIT_PEER_FAILED
    assert (
        f"process {1 - killed} ends because process {killed} of this run has died"
        in (tmp_path / f"log_{1 - killed}").read_text()
    )


def test_error_of_one_ends_both(processes, tmp_path):
    """The other process waits within a step."""
    assert [p.wait() for p in processes("--config=raise_1")] == [distributed.EXIT_PEER_FAILED, 1]
    assert (
        "process 1 of this run has failed: ValueError: the third step failed"
        in (tmp_path / "log_0").read_text()
    )
    assert (tmp_path / "log_1").read_text().strip().endswith("error: the third step failed")


@pytest.mark.parametrize(
    "config, code, word", [("raise", 1, "ValueError: no such file"), ("stop", 75, "exit code 75")]
)
def test_leader_that_fails_before_the_others(processes, tmp_path, config, code, word):
    started = processes("--task=leader_fails", f"--config={config}")
    assert [p.wait() for p in started] == [code, distributed.EXIT_PEER_FAILED]
    assert f"process 0 of this run has failed: {word}" in (tmp_path / "log_1").read_text()
