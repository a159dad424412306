"""Tests for messages and failures of processes, with threads and a fake store in their place."""

import socket
import threading
import time

import jax
import pytest

from mlip_jax.distributed import jax_internals
from mlip_jax.distributed.coordination import Coordination


class Store:
    """Fake of JAX's key-value store and its monitoring of processes, for threads in their place."""

    def __init__(self):
        self._values, self._changed, self._ended, self.closed = (
            {},
            threading.Condition(),
            set(),
            False,
        )

    def _wait(self, condition, timeout=20_000):
        with self._changed:
            if not self._changed.wait_for(
                lambda: condition() or self.closed, min(timeout, 20_000) / 1000
            ):
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


class ProcessGroup:
    """Processes of a run, as threads."""

    def __init__(self, count):
        self.store, self.failures = Store(), {k: [] for k in range(count)}
        self.port = socket.create_server(("127.0.0.1", 0))
        address = f"127.0.0.1:{self.port.getsockname()[1]}"
        self.processes = [
            Coordination(self.store, address, k, count, self.failures[k].append)
            for k in range(count)
        ]

    def failed(self, k):
        deadline = time.monotonic() + 60
        while not self.failures[k]:
            assert time.monotonic() < deadline, f"process {k} has heard of nothing"
            time.sleep(0.01)
        (text,) = self.failures[k]
        return text


@pytest.fixture
def create_group():
    groups = []
    yield lambda count: groups.append(ProcessGroup(count)) or groups[-1]
    for each in groups:  # ends their threads
        each.store.closed = True
        each.store.end(0)
        each.port.close()


def together(functions):
    """Call functions in parallel and return their results or exceptions."""
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


def test_barrier_waits_for_the_last(create_group):
    run, times = create_group(3), {}

    def come(k):
        time.sleep(0.2 * k)
        times[k] = time.monotonic()
        run.processes[k].barrier("here")
        return time.monotonic()

    passed = together([lambda k=k: come(k) for k in range(3)])
    assert min(passed) >= max(times.values())


def test_disconnecting_is_not_a_failure(create_group, monkeypatch):
    """The leader must disconnect last, because the store ends with it."""
    run, left = create_group(3), []

    def leave():
        left.append(threading.current_thread().name)
        run.store.end(int(left[-1]))
        run.store.closed = left[-1] == "0"

    def close(k):
        threading.current_thread().name = str(k)
        run.processes[k].close()

    monkeypatch.setattr(jax.distributed, "shutdown", leave)
    assert together([lambda k=k: close(k) for k in range(3)]) == [None] * 3
    assert left[-1] == "0" and sorted(left) == ["0", "1", "2"]
    assert run.failures == {0: [], 1: [], 2: []}


@pytest.mark.parametrize("k", [0, 1, 2])
def test_failure_reaches_all_others(create_group, k):
    run = create_group(3)
    run.processes[k].fail("no such file")
    for other in {0, 1, 2} - {k}:
        assert run.failed(other) == f"process {k} of this run has failed: no such file"
    assert run.failures[k] == [] and run.processes[k].failed


@pytest.mark.parametrize("k", [1, 2])
def test_death_reaches_all_others(create_group, k):
    run = create_group(3)
    run.store.end(k)
    for other in {0, 1, 2} - {k}:
        assert f"process {k} of this run has died" in run.failed(other)


def test_death_of_the_leader_reaches_all_others(create_group):
    """It is detected by its port, because calls of the client may never return."""
    run = create_group(3)
    run.port.close()
    for other in (1, 2):
        assert "process 0 of this run has died" in run.failed(other)


def test_the_leader_ends_last(create_group):
    """Otherwise, the others would report the leader instead of the process that failed first."""
    run = create_group(3)
    write, others = run.store.key_value_set_bytes, threading.Event()
    run.store.key_value_set_bytes = lambda key, value: (
        key.endswith("heard/2") and others.wait(10),
        write(key, value),
    )
    run.processes[1].fail("no such file")
    time.sleep(0.2)
    assert not run.failures[0]
    others.set()
    assert "process 1" in run.failed(0) and "process 1" in run.failed(2)


def test_a_missing_process_at_the_end_is_an_error(create_group):
    with pytest.raises(
        RuntimeError, match="process 0 of this run has not reached 'end of the run' within 0.1 s"
    ):
        create_group(2).processes[1].close(0.1)


def test_different_programs_are_an_error(create_group):
    leader, other = create_group(2).processes
    found = together([lambda: leader.barrier("here"), lambda: other.barrier("there", 0.5)])
    assert isinstance(
        found[0], RuntimeError
    ) and "process 1 at 'here', but that process is at 'there'" in str(found[0])


def test_the_private_api_of_jax_exists():
    """Other tests would hang or print pages of C++ errors if it changed."""
    state = type(jax_internals.coordination())
    missing = [
        name
        for name in ("client", "coordinator_address", "process_id", "num_processes")
        if not hasattr(state, name)
    ]
    missing += [
        name
        for name in vars(Store)
        if not name.startswith("_")
        and name != "end"
        and not hasattr(jax_internals.client_type(), name)
    ]
    missing += [
        name
        for name in ("jax_enable_recoverability", "jax_enable_preemption_service")
        if not hasattr(jax.config, name)
    ]
    assert not missing
