"""Tests for profiler traces: their dispatches, and that they are always stopped."""

import jax
import pytest

from mlip_jax.training.trace import _WARM_UP, Trace


@pytest.fixture
def profiler(monkeypatch):
    """List of calls of a fake profiler, which raises the same errors as JAX's."""
    asked = []

    def start(directory, profiler_options):
        assert profiler_options.python_tracer_level == 0  # the interpreter could loop forever
        assert asked.count("start") == asked.count("stop")
        asked.append("start")

    def stop():
        assert asked.count("start") == asked.count("stop") + 1
        asked.append("stop")

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    return asked


def calls(tmp_path, steps, number, asked):
    with Trace(tmp_path / "trace", steps) as trace:
        for call in range(number):
            asked.append(call)
            trace.step(jax.numpy.zeros(2))


def test_a_trace_contains_the_given_number_of_dispatches(tmp_path, profiler):
    calls(tmp_path, 2, 9, profiler)
    warm_up = list(range(_WARM_UP))
    assert profiler == [*warm_up, "start", _WARM_UP, _WARM_UP + 1, "stop", *range(_WARM_UP + 2, 9)]


@pytest.mark.parametrize(
    "number", [_WARM_UP, _WARM_UP + 1, _WARM_UP + 4, _WARM_UP + 5, _WARM_UP + 20]
)
def test_a_trace_is_stopped_once(tmp_path, profiler, number):
    calls(tmp_path, 5, number, profiler)
    assert profiler.count("start") == profiler.count("stop") == 1


def test_a_trace_is_stopped_after_an_error(tmp_path, profiler):
    with pytest.raises(OSError), Trace(tmp_path, 5) as trace:
        for _ in range(_WARM_UP + 1):
            trace.step(jax.numpy.zeros(2))
        raise OSError
    assert profiler == ["start", "stop"]


def test_no_trace_is_written_by_default(tmp_path, profiler):
    calls(tmp_path, 0, 12, profiler)
    assert "start" not in profiler


def test_a_run_too_short_for_a_trace_logs_a_warning(tmp_path, profiler, caplog):
    calls(tmp_path, 4, _WARM_UP - 1, profiler)
    assert "start" not in profiler and "no trace" in caplog.text


def test_the_trace_is_written_to_its_folder(tmp_path):
    calls(tmp_path, 1, 6, [])
    assert any(p.is_file() and p.stat().st_size for p in (tmp_path / "trace").rglob("*"))
