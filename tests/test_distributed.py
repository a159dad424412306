"""Processes find each other, tell each other what they must, and none outlives another that has failed."""

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlip_jax import distributed
from mlip_jax.distributed import StopSignal
from mlip_jax.distributed import channel as channels
from mlip_jax.distributed.values import decode, encode

REPOSITORY = Path(__file__).parents[1]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


# --- values


plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                     lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3), max_leaves=12)


@given(plain)
def test_plain_values_come_back(value):
    assert decode(encode(value)) == value


def test_arrays_come_back():
    value = {"a": [np.arange(6.0).reshape(2, 3).T, np.array([], np.int8)], "b": np.float32(0.1),
             "c": np.array(["å", "b"]), "d": np.array(np.nan)}
    found = distributed.broadcast(value)
    assert found["b"].dtype == np.float32 and found["b"] == np.float32(0.1) and found["d"].shape == ()
    for mine, theirs in [*zip(value["a"], found["a"]), (value["c"], found["c"]), (value["d"], found["d"])]:
        np.testing.assert_array_equal(mine, theirs)
        assert mine.dtype == theirs.dtype


@pytest.mark.parametrize("value, message", [
    ({"a": [1, {2}]}, r"value\['a'\]\[1\]: set"), ({1: 2}, "the key 1"), ({"__array__": 1}, "__array__"),
    (np.array([None]), "Python objects"), (b"", "bytes")])
def test_other_values_are_refused(value, message):
    with pytest.raises(TypeError, match=message):
        distributed.broadcast(value)


def test_single_process_needs_nothing():
    with distributed.session(None):
        assert distributed.leader() and (distributed.index(), distributed.count()) == (0, 1)
        distributed.barrier("here")
        with distributed.leader_first("body"):
            assert distributed.broadcast((1, "a")) == [1, "a"]
        with pytest.raises(KeyError), distributed.leader_first("body"):
            raise KeyError("a")
    distributed.shutdown()


# --- the connections


class Party:
    """Processes of a run, as threads."""

    def __init__(self, count):
        address, self.failures = f"localhost:{free_port()}", {k: [] for k in range(count)}
        self.channels = together([lambda k=k: channels.connect(address, k, count, 20, self.failures[k].append)
                                  for k in range(count)])

    def failed(self, k):
        deadline = time.monotonic() + 5
        while not self.failures[k]:
            assert time.monotonic() < deadline, f"process {k} has heard of nothing"
            time.sleep(0.01)
        text, = self.failures[k]
        return text


def together(functions):
    """What each gives, or its exception."""
    results = [None] * len(functions)

    def call(k):
        try:
            results[k] = functions[k]()
        except Exception as error:  # handed to the test, which looks at it
            results[k] = error

    threads = [threading.Thread(target=call, args=(k,), daemon=True) for k in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "it hangs"
    return results


def test_barrier_waits_for_the_last():
    party, times = Party(3), {}

    def come(k):
        time.sleep(0.2 * k)
        times[k] = time.monotonic()
        party.channels[k].barrier("here")
        return time.monotonic()

    passed = together([lambda k=k: come(k) for k in range(3)])
    assert min(passed) >= max(times.values())
    together([c.close for c in party.channels])
    time.sleep(0.1)
    assert party.failures == {0: [], 1: [], 2: []}  # to part is no failure


@pytest.mark.parametrize("k", [0, 1, 2])
def test_failure_reaches_all_others(k):
    party = Party(3)
    party.channels[k].fail("no such file")
    for other in {0, 1, 2} - {k}:
        assert party.failed(other) == f"process {k} of this run has failed: no such file"
    assert party.failures[k] == []


@pytest.mark.parametrize("k", [0, 1, 2])
def test_death_reaches_all_others(k):
    party = Party(3)
    for link in party.channels[k]._links.values():
        link.shutdown(socket.SHUT_RDWR)
    for other in {0, 1, 2} - {k}:
        assert f"process {k} of this run has died" in party.failed(other)


def test_own_failure_ends_waiting():
    leader, _ = Party(2).channels
    leader.fail("no")
    assert leader.failed
    with pytest.raises(distributed.PeerFailure, match="process 0 of this run has failed: no"):
        leader.barrier("here")


def test_end_that_only_one_comes_to():
    _, other = Party(2).channels
    with pytest.raises(RuntimeError, match="process 0 of this run has not come to 'end of the run' within 0.1 s"):
        other.close(0.1)


def test_who_waits_is_told():
    party = Party(2)
    found = together([lambda: party.channels[0].barrier("here"), lambda: party.channels[1].fail("no")])
    assert isinstance(found[0], distributed.PeerFailure) and "process 1" in str(found[0])


def test_different_programs_are_an_error():
    leader, other = Party(2).channels
    found = together([lambda: leader.barrier("here"), lambda: other._send(0, "there")])
    assert isinstance(found[0], RuntimeError) and "'here'" in str(found[0]) and "'there'" in str(found[0])


def meet(address, *places, timeout=2.0):
    return together([lambda p=p: channels.connect(address, *p, timeout, lambda text: None) for p in places])


def test_too_few_processes():
    address = f"localhost:{free_port()}"
    for error in meet(address, (0, 4), (2, 4), timeout=1.0):
        assert isinstance(error, RuntimeError) and "2 of 4 processes" in str(error) and "missing: 1, 3" in str(error)


def test_counts_that_differ():
    for error in meet(f"localhost:{free_port()}", (0, 2), (1, 3)):
        assert "of a run of 3 processes, process 0 of one of 2" in str(error)


def test_number_given_twice():
    assert "a second process 1" in str(meet(f"localhost:{free_port()}", (0, 3), (1, 3), (1, 3))[0])


def test_leader_that_is_not_there():
    error, = meet(f"localhost:{free_port()}", (1, 2), timeout=0.5)
    assert isinstance(error, RuntimeError) and "cannot reach process 0" in str(error) and "firewall" in str(error)


def test_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as server:
        error, = meet(f"localhost:{server.getsockname()[1]}", (0, 2))
    assert "cannot listen" in str(error) and "MLIP_JAX_COORDINATOR" in str(error)


def test_strangers_are_left_aside():
    port = free_port()

    def stranger(text):
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 10) as link:
                link.sendall(text)
                try:
                    return link.recv(10)
                except ConnectionResetError:
                    return b""

    def late():
        time.sleep(0.5)
        return channels.connect(f"localhost:{port}", 1, 2, 10, print)

    found = together([lambda: channels.connect(f"localhost:{port}", 0, 2, 10, print), late,
                      lambda: stranger(b"GET / HTTP/1.0\r\n\r\n"), lambda: stranger(b'["other", 1, 2]\n')])
    assert found[0].count == found[1].count == 2 and found[2:] == [b"", b""]


# --- errors and signals


@pytest.mark.parametrize("text", [
    "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:23949: "
    "Connection reset by peer",
    "INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or there was a network error",
    "UNAVAILABLE: Task 1 heartbeat timeout. This indicates that the remote task has failed",
    "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted/died"])
def test_errors_of_a_dead_peer(text):
    assert "last checkpoint" in distributed.failed_peer_message(ValueError(text))


@pytest.mark.parametrize("error", [
    ValueError("shapes (3,) and (4,) do not match"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    ConnectionResetError("Connection reset by peer"), RuntimeError("NCCL: unhandled cuda error"), KeyboardInterrupt()])
def test_errors_of_this_process(error):
    assert distributed.failed_peer_message(error) is None


def test_first_signal_is_remembered(caplog):
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
    deadline = time.monotonic() + 5
    while not caplog.messages:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("SIGUSR1")


def test_signals_in_another_thread():
    def enter():
        with StopSignal() as stop:
            return signal.getsignal(signal.SIGTERM), stop.received

    assert together([enter]) == [(signal.getsignal(signal.SIGTERM), None)]


def test_second_sigterm_ends_at_once():
    code = ("import os, signal, time\nfrom mlip_jax.distributed import StopSignal\nwith StopSignal() as stop:\n"
            "    os.kill(os.getpid(), signal.SIGTERM)\n    assert stop.received == 'SIGTERM'\n"
            "    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)")
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60).returncode == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_within_a_garbage_collection_is_not_lost(number):
    """Python ignores what is raised there, and JAX has it call Python."""
    def collected(phase, info):
        if phase == "stop" and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # the handler is called in here

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


# --- real processes


@contextlib.contextmanager
def processes(folder, *arguments, count=2):
    port, logs = free_port(), [folder / f"log_{k}" for k in range(count)]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MLIP_JAX", "XLA_FLAGS"))}
    started = []
    try:
        for k in range(count):
            with open(logs[k], "w") as log:
                started.append(subprocess.Popen(
                    [sys.executable, "-m", "tests.distributed_program", f"--workdir={folder}", *arguments],
                    cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, env=env | {
                        "MLIP_JAX_COORDINATOR": f"localhost:{port}", "MLIP_JAX_NUM_PROCESSES": str(count),
                        "MLIP_JAX_PROCESS_ID": str(k)}))
        yield started, logs
    finally:
        for process in started:
            process.kill()
            process.wait()


def wait_for(paths, started):
    deadline = time.monotonic() + 60
    while not all(p.exists() for p in paths):
        assert time.monotonic() < deadline and all(p.poll() is None for p in started), "they do not start"
        time.sleep(0.02)


def test_processes_talk(tmp_path):
    with processes(tmp_path, "--task=words") as (started, logs):
        assert [p.wait(90) for p in started] == [0, 0], "\n".join(log.read_text() for log in logs)
    found = [json.loads((tmp_path / f"words_{k}.json").read_text()) for k in range(2)]
    for k, each in enumerate(found):
        assert each == found[0] | {"after_barrier": each["after_barrier"], "jax": [k, 2]}
    assert found[0] == found[0] | {
        "name": "Ångström", "sizes": list(range(5)), "dtype": "int16", "pair": [1, None], "found": "by the leader",
        "large": float(np.arange(3e6).sum()), "count": 2, "devices": 2}
    assert abs(found[0]["after_barrier"] - found[1]["after_barrier"]) < 0.4  # one came half a second later


@pytest.mark.parametrize("killed", [1, 0])
def test_survivor_of_a_kill_ends_within_seconds(tmp_path, killed):
    with processes(tmp_path) as (started, logs):
        wait_for([tmp_path / f"steps_{k}" for k in range(2)], started)
        assert (tmp_path / "steps_0").read_text() == "2"
        started[killed].kill()
        begin = time.monotonic()
        code = started[1 - killed].wait(15)
        assert time.monotonic() - begin < 5
        text = logs[1 - killed].read_text()
    if killed == 0 and code == -signal.SIGABRT:  # JAX's own watch over the coordinator was quicker
        assert "another task died" in text
        return
    assert code == distributed.EXIT_PEER_FAILED
    assert f"process {1 - killed} ends because process {killed} of this run has died" in text


def test_error_of_one_ends_both(tmp_path):
    """While the other waits for it within a step."""
    with processes(tmp_path, "--config=raise_1") as (started, logs):
        assert [p.wait(60) for p in started] == [distributed.EXIT_PEER_FAILED, 1]
        assert "process 1 of this run has failed: ValueError: the third step went wrong" in logs[0].read_text()
        assert logs[1].read_text().strip().endswith("error: the third step went wrong")


@pytest.mark.parametrize("config, code, word", [("raise", 1, "ValueError: no such file"), ("stop", 75, "exit code 75")])
def test_leader_that_fails_before_the_others(tmp_path, config, code, word):
    with processes(tmp_path, "--task=leader_fails", f"--config={config}") as (started, logs):
        assert [p.wait(60) for p in started] == [code, distributed.EXIT_PEER_FAILED]
        assert f"process 0 of this run has failed: {word}" in logs[1].read_text()
