"""Tests for the batch size of a device and for the schedule that belongs to it."""

import types

import numpy as np
import pytest

from mlip_jax import config as configs
from mlip_jax.config import ConfigError
from mlip_jax.configs import spice
from mlip_jax.training.device import batch_size
from mlip_jax.training.device.batch_size import choose_factor, with_batch_size

SPICE_EDGES = 570.0


def devices(kind, count=1):
    platform = {"cpu": "cpu", "TPU v5e": "tpu"}.get(kind, "gpu")
    return [types.SimpleNamespace(platform=platform, device_kind=kind)] * count


@pytest.mark.parametrize(
    ("kind", "count", "edges", "factor"),
    [
        ("cpu", 4, SPICE_EDGES, 1),
        ("NVIDIA H200", 1, SPICE_EDGES, 8),
        ("NVIDIA H200", 8, SPICE_EDGES, 8),
        ("NVIDIA A100-SXM4-80GB", 1, SPICE_EDGES, 4),
        ("NVIDIA GeForce RTX 4060", 1, SPICE_EDGES, 2),
        ("NVIDIA GeForce RTX 4060", 1, 20_000.0, 1),
        ("TPU v5e", 1, SPICE_EDGES, 8),
    ],
)
def test_large_batches_are_for_devices_that_need_them(kind, count, edges, factor):
    assert choose_factor(8, edges, devices(kind, count)) == factor


def on(monkeypatch, kind, config, restored=None):
    monkeypatch.setattr(batch_size.jax, "devices", lambda: devices(kind))
    return with_batch_size(config, np.full(4000, SPICE_EDGES), restored)


def test_the_schedule_counts_structures(monkeypatch):
    """Detects a run on a GPU with eight times the structures, and a CPU run that changes."""
    config = spice.get_config()
    on_cpu, on_gpu = (on(monkeypatch, kind, config) for kind in ("cpu", "NVIDIA H200"))
    config.train.batch_size = 8
    assert on_cpu.to_dict() == config.to_dict()
    assert (on_gpu.train.batch_size, on_gpu.train.num_steps) == (64, 1125)
    assert (on_gpu.optimizer.warmup_steps, on_gpu.train.valid_every) == (25, 125)
    assert on_gpu.train.ema_decay == pytest.approx(0.999**8)
    assert on_gpu.optimizer.learning_rate == pytest.approx(2e-3 * 8**0.5)
    config.train.num_steps = 7
    assert on(monkeypatch, "NVIDIA H200", config) is config  # as it is set


@pytest.mark.parametrize("length", ["num_steps", "num_epochs"])
def test_limits_of_unset_values_count_steps_of_the_smaller_batch(monkeypatch, caplog, length):
    """Detects a warm-up that sees eight times the structures, and a log line without a number."""
    config = spice.get_config()
    for name in ("log_every", "valid_every", "checkpoint_every"):
        config.train[name] = None
    config.optimizer.warmup_steps = None
    config.train.num_steps = 40_000
    if length == "num_epochs":  # 4,000 structures in batches of 8
        config.train.num_epochs = 80.0
    with caplog.at_level("INFO"):
        found = on(monkeypatch, "NVIDIA H200", config)
    assert found.optimizer.warmup_steps == 200 / 8
    assert (found.train.valid_every, found.train.log_every) == (125, 13)
    assert found.train.num_epochs == config.train.num_epochs
    assert "5000 steps instead of 40000" in caplog.text


def test_a_run_keeps_the_batch_size_of_its_first_start(monkeypatch):
    """Also a run whose config set 8, the batch size of spice until it was unset."""
    config = spice.get_config()
    for first, steps in ((8, 9000), (64, 1125), (32, 2250)):
        restored = {"config": {"train": {"batch_size": first}}}
        for kind in ("cpu", "NVIDIA H200"):
            train = on(monkeypatch, kind, config, restored).train
            assert (train.batch_size, train.num_steps) == (first, steps)
    identity = configs.identity(config)
    assert identity["train"]["batch_size"] == 8
    assert "schedule_batch_size" not in identity["train"]
    config.train.batch_size = 8
    assert configs.identity(config) == identity
    with pytest.raises(ConfigError, match="batch_size is 8, but this run was started with 32"):
        on(monkeypatch, "cpu", config, restored)
