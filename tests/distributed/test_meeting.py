"""Tests for the start of a run of several processes: arguments for JAX, and error messages."""

import socket
import threading

import jax
import pytest

from mlip_jax.distributed import Environment, meeting
from mlip_jax.distributed.meeting import meet


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture
def started(monkeypatch):
    """Arguments of jax.distributed.initialize, a fake that returns when the test allows it."""
    monkeypatch.setattr(meeting, "_wait_before_aborts", lambda: None)
    calls, come = [], threading.Event()
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda **options: (calls.append(options), come.wait(20))
    )
    yield calls, come
    come.set()


def test_missing_processes_are_an_error(started):
    with pytest.raises(RuntimeError, match="within 0.3 s.*that their number is 4,.*firewall"):
        meet(Environment(f"localhost:{free_port()}", 4, 0), 0.3)
    (options,) = started[0]
    assert options["initialization_timeout"] > 30  # JAX would abort this process


def test_a_local_run_accepts_only_local_connections(started):
    started[1].set()
    for host, bound in (("localhost", True), (socket.gethostname(), False)):
        coordinator = f"{host}:{free_port()}"
        meet(Environment(coordinator, 2, 0, (1, 2)), 5)
        options = started[0].pop()
        assert options["coordinator_bind_address"] == (coordinator if bound else None)
        assert (
            options["coordinator_address"],
            options["num_processes"],
            options["process_id"],
            options["local_device_ids"],
        ) == (coordinator, 2, 0, [1, 2])


def test_an_error_of_jax_lists_what_to_check(started, monkeypatch):
    def fail(**options):
        raise RuntimeError("must be called before any JAX calls")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(
        RuntimeError, match="(?s)before any JAX calls.*processes can connect to each other"
    ):
        meet(Environment(), 5)


def test_a_port_in_use_is_an_error(started):
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(RuntimeError, match="cannot listen.*MLIP_JAX_COORDINATOR"):
            meet(Environment(f"localhost:{server.getsockname()[1]}", 2, 0), 2)
