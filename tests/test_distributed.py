"""Processes find each other, tell each other what they must, and none outlives another that has failed."""

import gc
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlip_jax import distributed
from mlip_jax.distributed import Environment, StopSignal, jax_internals, meeting
from mlip_jax.distributed.coordination import Coordination
from mlip_jax.distributed.meeting import meet
from mlip_jax.distributed.values import decode, encode
from tests.distributed_program import LARGE
from tests.forks import Forks

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


# --- messages of processes


class Store:
    """JAX's key-value store and its watch over processes, for threads that stand for processes."""

    def __init__(self):
        self._values, self._changed, self._ended, self.closed = {}, threading.Condition(), set(), False

    def _wait(self, condition, timeout=20_000):
        with self._changed:
            if not self._changed.wait_for(lambda: condition() or self.closed, min(timeout, 20_000) / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
            if self.closed:
                raise RuntimeError("CANCELLED")

    def key_value_set_bytes(self, key, value):
        with self._changed:
            if key in self._values:
                raise RuntimeError(f"ALREADY_EXISTS: {key}")
            self._values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get_bytes(self, key, timeout_in_ms):
        self._wait(lambda: key in self._values, timeout_in_ms)
        return self._values[key]

    def key_value_dir_get_bytes(self, key):
        return [(k, v) for k, v in self._values.items() if k.startswith(key + "/")]

    def get_live_nodes(self, processes):
        with self._changed:
            self._changed.wait_for(lambda: self._ended & set(processes), 20)

    def end(self, k):
        with self._changed:
            self._ended.add(k)
            self._changed.notify_all()


class Party:
    """Processes of a run, as threads."""

    def __init__(self, count):
        self.store, self.failures = Store(), {k: [] for k in range(count)}
        self.port = socket.create_server(("127.0.0.1", 0))
        address = f"127.0.0.1:{self.port.getsockname()[1]}"
        self.places = [Coordination(self.store, address, k, count, self.failures[k].append) for k in range(count)]

    def failed(self, k):
        deadline = time.monotonic() + 5
        while not self.failures[k]:
            assert time.monotonic() < deadline, f"process {k} has heard of nothing"
            time.sleep(0.01)
        text, = self.failures[k]
        return text


@pytest.fixture
def party():
    parties = []
    yield lambda count: parties.append(Party(count)) or parties[-1]
    for each in parties:  # ends their threads
        for place in each.places:
            place._parting.set()
        each.store.closed = True
        each.store.end(0)
        each.port.close()


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


def test_barrier_waits_for_the_last(party):
    run, times = party(3), {}

    def come(k):
        time.sleep(0.2 * k)
        times[k] = time.monotonic()
        run.places[k].barrier("here")
        return time.monotonic()

    passed = together([lambda k=k: come(k) for k in range(3)])
    assert min(passed) >= max(times.values())


def test_to_part_is_no_failure(party, monkeypatch):
    """The leader is the last to leave: the store ends with it."""
    run, left = party(3), []

    def leave():
        left.append(threading.current_thread().name)
        run.store.end(int(left[-1]))
        run.store.closed = left[-1] == "0"

    def close(k):
        threading.current_thread().name = str(k)
        run.places[k].close()

    monkeypatch.setattr(jax.distributed, "shutdown", leave)
    assert together([lambda k=k: close(k) for k in range(3)]) == [None] * 3
    assert left[-1] == "0" and sorted(left) == ["0", "1", "2"]
    assert run.failures == {0: [], 1: [], 2: []}


@pytest.mark.parametrize("k", [0, 1, 2])
def test_failure_reaches_all_others(party, k):
    run = party(3)
    run.places[k].fail("no such file")
    for other in {0, 1, 2} - {k}:
        assert run.failed(other) == f"process {k} of this run has failed: no such file"
    assert run.failures[k] == [] and run.places[k].failed


@pytest.mark.parametrize("k", [1, 2])
def test_death_reaches_all_others(party, k):
    run = party(3)
    run.store.end(k)
    for other in {0, 1, 2} - {k}:
        assert f"process {k} of this run has died" in run.failed(other)


def test_death_of_the_leader_reaches_all_others(party):
    """By its port: the client may have no more to say."""
    run = party(3)
    run.port.close()
    for other in (1, 2):
        assert "process 0 of this run has died" in run.failed(other)


def test_the_leader_ends_last(party):
    """Else the others would hear of its end only, and not of the process that began."""
    run = party(3)
    write, others = run.store.key_value_set_bytes, threading.Event()
    run.store.key_value_set_bytes = lambda key, value: (key.endswith("heard/2") and others.wait(10), write(key, value))
    run.places[1].fail("no such file")
    time.sleep(0.2)
    assert not run.failures[0]
    others.set()
    assert "process 1" in run.failed(0) and "process 1" in run.failed(2)


def test_end_that_only_one_comes_to(party):
    with pytest.raises(RuntimeError, match="process 0 of this run has not come to 'end of the run' within 0.1 s"):
        party(2).places[1].close(0.1)


def test_different_programs_are_an_error(party):
    leader, other = party(2).places
    found = together([lambda: leader.barrier("here"), lambda: other.barrier("there", 0.5)])
    assert isinstance(found[0], RuntimeError) and "process 1 at 'here', which is at 'there'" in str(found[0])


# --- the start of a run


@pytest.fixture
def started(monkeypatch):
    """Arguments of jax.distributed.initialize, which comes back when it is let."""
    monkeypatch.setattr(meeting, "_wait_before_aborts", lambda: None)
    calls, come = [], threading.Event()
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: (calls.append(options), come.wait(20)))
    yield calls, come
    come.set()


def test_processes_that_do_not_come(started):
    with pytest.raises(RuntimeError, match="within 0.3 s.*that they are 4,.*firewall"):
        meet(Environment(f"localhost:{free_port()}", 4, 0), 0.3)
    options, = started[0]
    assert options["initialization_timeout"] > 30  # JAX would abort this process


def test_only_this_machine_reaches_a_run_on_it(started):
    started[1].set()
    for host, bound in (("localhost", True), (socket.gethostname(), False)):
        coordinator = f"{host}:{free_port()}"
        meet(Environment(coordinator, 2, 0, (1, 2)), 5)
        options = started[0].pop()
        assert options["coordinator_bind_address"] == (coordinator if bound else None)
        assert (options["coordinator_address"], options["num_processes"], options["process_id"],
                options["local_device_ids"]) == (coordinator, 2, 0, [1, 2])


def test_error_of_jax_says_what_to_check(started, monkeypatch):
    def fail(**options):
        raise RuntimeError("must be called before any JAX calls")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(RuntimeError, match="(?s)before any JAX calls.*processes reach each other"):
        meet(Environment(), 5)


def test_port_in_use(started):
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(RuntimeError, match="cannot listen.*MLIP_JAX_COORDINATOR"):
            meet(Environment(f"localhost:{server.getsockname()[1]}", 2, 0), 2)


def test_what_jax_keeps_private_is_still_there():
    """What has gone is named; other tests would hang or end in pages of C++."""
    state = type(jax_internals.coordination())
    missing = [name for name in ("client", "coordinator_address", "process_id", "num_processes")
               if not hasattr(state, name)]
    missing += [name for name in vars(Store) if not name.startswith("_") and name != "end"
                and not hasattr(jax_internals.client_type(), name)]
    missing += [name for name in ("jax_enable_recoverability", "jax_enable_preemption_service")
                if not hasattr(jax.config, name)]
    assert not missing


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


@pytest.fixture(scope="module")
def forks():
    with Forks("tests.distributed_program") as forks:
        yield forks


@pytest.fixture
def processes(forks, tmp_path, monkeypatch):
    """Start two processes of a run in `tmp_path`, whose logs are log_0 and log_1."""
    started = []

    def start(*arguments):
        port = str(free_port())
        for k in range(2):
            with open(tmp_path / f"log_{k}", "w") as log:
                started.append(forks.start(
                    "from tests import distributed_program\ndistributed_program.main()", f"--workdir={tmp_path}",
                    *arguments, stdout=log, MLIP_JAX_COORDINATOR=f"localhost:{port}", MLIP_JAX_NUM_PROCESSES="2",
                    MLIP_JAX_PROCESS_ID=str(k)))
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(paths, started):
    deadline = time.monotonic() + 60
    while not all(p.exists() for p in paths):
        assert time.monotonic() < deadline and all(p.poll() is None for p in started), "they do not start"
        time.sleep(0.02)


def test_processes_talk(tmp_path, monkeypatch):
    """Started by launch/local.sh."""
    for name in [n for n in os.environ if n.startswith(("SLURM", "MLIP_JAX", "XLA_FLAGS"))]:
        monkeypatch.delenv(name)
    done = subprocess.run(
        [REPOSITORY / "launch/local.sh", "-n", "2", "--devices-per-process", "2", "-m", "tests.distributed_program",
         "--", "--task=words", f"--workdir={tmp_path}"], capture_output=True, text=True, timeout=90,
        env=os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"words_{k}.json").read_text()) for k in range(2)]
    for k, each in enumerate(found):
        assert each == found[0] | {"come": each["come"], "after_barrier": each["after_barrier"], "jax": [k, 2]}
    assert found[0] == found[0] | {
        "name": "Ångström", "sizes": list(range(5)), "dtype": "int16", "pair": [1, None], "found": "by the leader",
        "large": hashlib.sha256(LARGE).hexdigest(), "count": 2, "devices": 4}
    # one came half a second later
    assert min(each["after_barrier"] for each in found) >= max(each["come"] for each in found)


@pytest.mark.parametrize("killed", [1, 0])
def test_survivor_of_a_kill_ends_within_seconds(processes, tmp_path, killed):
    """JAX finds the death of process 1 within eleven seconds; that of process 0 shows at its port."""
    started = processes()
    wait_for([tmp_path / f"steps_{k}" for k in range(2)], started)
    assert (tmp_path / "steps_0").read_text() == "2"
    started[killed].kill()
    assert started[1 - killed].wait(15) == distributed.EXIT_PEER_FAILED
    assert (f"process {1 - killed} ends because process {killed} of this run has died"
            in (tmp_path / f"log_{1 - killed}").read_text())


def test_error_of_one_ends_both(processes, tmp_path):
    """While the other waits for it within a step."""
    assert [p.wait() for p in processes("--config=raise_1")] == [distributed.EXIT_PEER_FAILED, 1]
    assert ("process 1 of this run has failed: ValueError: the third step went wrong"
            in (tmp_path / "log_0").read_text())
    assert (tmp_path / "log_1").read_text().strip().endswith("error: the third step went wrong")


@pytest.mark.parametrize("config, code, word", [("raise", 1, "ValueError: no such file"), ("stop", 75, "exit code 75")])
def test_leader_that_fails_before_the_others(processes, tmp_path, config, code, word):
    started = processes("--task=leader_fails", f"--config={config}")
    assert [p.wait() for p in started] == [code, distributed.EXIT_PEER_FAILED]
    assert f"process 0 of this run has failed: {word}" in (tmp_path / "log_1").read_text()
