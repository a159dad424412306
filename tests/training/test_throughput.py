"""Tests for throughput and time breakdown between two log lines."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlip_jax.graphs.shapes import Sizes
from mlip_jax.training import throughput as module
from mlip_jax.training.data import StepPlan
from mlip_jax.training.losses import LossSums
from mlip_jax.training.throughput import ACTIVITIES, ThroughputMeter

SIZES = Sizes(np.array([3, 5, 2, 7]), np.array([6, 20, 2, 30]))


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(module, "time", fake_clock := Clock())
    return fake_clock


def plan(*members):
    return StepPlan([np.array(p, np.int64) for p in members], 0)


def sums(values):
    """Return sums of several steps, in which each field is another multiple of `values`."""
    return LossSums(
        *(np.asarray(values, np.float32) * k for k in range(1, len(LossSums._fields) + 1))
    )


def pass_time(meter, clock, part, seconds, **options):
    with meter.clock(part, **options):
        clock.now += seconds


def test_rates_exclude_validation_and_checkpoints(clock):
    meter = ThroughputMeter(SIZES)
    meter.add([plan([0, 1], [2])], sums([1.0]), np.array([True]))
    meter.add([plan([3], []), plan([0])], sums([2.0, 3.0, 99.0]), np.array([True, True]))
    for part, seconds in (("input", 2.0), ("validation", 3.0), ("checkpoint", 1.0)):
        pass_time(meter, clock, part, seconds)
    clock.now += 4.0
    total, row = meter.next_line()
    # of ten seconds, six trained, waits for input among them
    assert row == pytest.approx(
        {
            "structures_per_second": 5 / 6,
            "atoms_per_second": 20 / 6,
            "edges_per_second": 64 / 6,
            "input_share": 0.2,
            "checkpoint_share": 0.1,
        }
    )
    # a step that was not performed (99) is not counted
    assert total == sums(6.0)
    assert meter.summary() == pytest.approx({"input": 0.2, "validation": 0.3, "checkpoint": 0.1})


def test_a_log_line_begins_at_the_end_of_the_previous_one(clock):
    meter = ThroughputMeter(SIZES)
    pass_time(meter, clock, "input", 5.0)
    meter.add([plan([0])], sums([1.0]), np.array([True]))
    meter.next_line()
    clock.now += 2.0
    meter.add([plan([1])], sums([4.0]), np.array([True]))
    total, row = meter.next_line()
    assert (
        total.energy_loss == 4.0
        and row["input_share"] == 0.0
        and row["structures_per_second"] == 0.5
    )
    assert meter.summary()["input"] == pytest.approx(5 / 7)


def test_input_time_counts_only_if_devices_wait(clock):
    meter = ThroughputMeter(SIZES)
    pass_time(meter, clock, "input", 3.0, unless=lambda: True)
    pass_time(meter, clock, "input", 1.0, unless=lambda: False)
    assert meter.seconds == {"input": 1.0, "checkpoint": 0.0, "validation": 0.0}


def test_time_is_counted_despite_an_error(clock):
    meter = ThroughputMeter(SIZES)
    with pytest.raises(OSError), meter.clock("checkpoint"):
        clock.now += 2.0
        raise OSError
    assert meter.seconds["checkpoint"] == 2.0


def test_time_before_the_start_is_not_counted(clock):
    meter = ThroughputMeter(SIZES)
    pass_time(meter, clock, "input", 5.0)
    meter.add([plan([0])], sums([1.0]), np.array([True]))
    meter.start()
    clock.now += 1.0
    assert meter.summary() == dict.fromkeys(ACTIVITIES, 0.0)
    assert meter.next_line()[1]["structures_per_second"] == 0.0


@given(
    st.lists(
        st.lists(st.tuples(st.floats(0, 100, width=32), st.booleans()), min_size=1, max_size=5),
        min_size=1,
        max_size=6,
    )
)
def test_skipped_steps_are_not_in_the_sums(calls):
    meter = ThroughputMeter(SIZES)
    for call in calls:
        values = [value if finite else np.nan for value, finite in call]
        meter.add([plan([0])] * len(call), sums(values), np.array([finite for _, finite in call]))
    total, row = meter.next_line()
    kept = [value for call in calls for value, finite in call if finite]
    if kept:
        np.testing.assert_allclose(total.energies, 5 * sum(kept), rtol=1e-6, atol=1e-6)
    else:
        assert all(np.isnan(value) for value in total)
    assert row["structures_per_second"] > 0


def test_utilization_of_the_peak_flops(clock, monkeypatch):
    monkeypatch.setattr(module, "peak_flops", lambda: 100.0)
    meter = ThroughputMeter(SIZES, flops_per_step=60.0)
    meter.add([plan([0]), plan([1])], sums([1.0, 1.0]), np.array([True, False]))
    clock.now += 4.0
    assert meter.next_line()[1]["mfu"] == pytest.approx(60 * 2 / 4 / 100)
    assert "mfu" not in ThroughputMeter(SIZES).next_line()[1]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 2 * 67e12),
        ("NVIDIA A100-SXM4-80GB", 2 * 19.5e12),
        ("NVIDIA L40S", 2 * 91.6e12),
        ("NVIDIA L4", 2 * 30.3e12),
        ("cpu", None),
    ],
)
def test_peak_flops_of_devices(monkeypatch, kind, expected):
    device = type("Device", (), {"device_kind": kind})()
    monkeypatch.setattr(module.jax, "local_devices", lambda: [device, device])
    monkeypatch.setattr(module.jax, "local_device_count", lambda: 2)
    assert module.peak_flops() == expected
