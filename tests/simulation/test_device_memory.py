"""Tests for the memory of programs and devices."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.simulation import device_memory
from mlip_jax.simulation.device_memory import (
    ProgramTooLarge,
    available_bytes,
    check_fits,
    largest_size,
    needed_bytes,
    predict_bytes,
)


def device(platform, **statistics):
    return SimpleNamespace(platform=platform, memory_stats=lambda: statistics or None)


def test_memory_of_devices(monkeypatch, tmp_path):
    gpu = device("gpu", bytes_limit=1000, bytes_in_use=200)
    assert available_bytes(gpu) == 720
    assert available_bytes(device("tpu")) is None
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 4000 kB\nMemAvailable:   2000 kB\n")
    monkeypatch.setattr(device_memory, "_MEMINFO", info)
    monkeypatch.setattr(device_memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(device_memory, "_GROUPS_OF_PROCESS", tmp_path / "groups")
    shares = len(jax.local_devices(backend="cpu"))
    assert available_bytes(device("cpu")) == int(0.9 * 2000 * 1024 / shares)
    # a container with a limit; its cached files can be freed
    for name, text in (
        ("max", "900000"),
        ("current", "800000"),
        ("stat", "anon 1\ninactive_file 2\nactive_file 3"),
    ):
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    assert available_bytes(device("cpu")) == int(0.9 * 100_005 / shares)
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(device("cpu")) == int(0.9 * 2000 * 1024 / shares)
    info.unlink()
    assert available_bytes(device("cpu")) is None


@pytest.mark.parametrize(
    "group, root, names",
    [
        ("0::", "", ("max", "current")),
        ("4:memory:", "memory", ("limit_in_bytes", "usage_in_bytes")),
    ],
)
def test_limits_of_jobs_are_those_of_any_group_above(monkeypatch, tmp_path, group, root, names):
    """The memory of a job of Slurm used to be that of the whole computer."""
    (tmp_path / "meminfo").write_text("MemAvailable: 1000 kB\n")
    (tmp_path / "groups").write_text(f"1:name=systemd:/else\n{group}/slurm/job_1/step_0\n")
    monkeypatch.setattr(device_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(device_memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(device_memory, "_GROUPS_OF_PROCESS", tmp_path / "groups")
    shares = len(jax.local_devices(backend="cpu"))
    step = tmp_path / root / "slurm/job_1/step_0"
    step.mkdir(parents=True)
    for folder, limit in ((step, 10**15), (step.parent, 9000)):
        for name, number in zip(names, (limit, 2000)):
            (folder / f"memory.{name}").write_text(f"{number}\n")
    assert available_bytes(device("cpu")) == int(0.9 * 7000 / shares)
    (step.parent / f"memory.{names[0]}").write_text("1000\n")  # pages beyond a new limit
    assert available_bytes(device("cpu")) == 0


def test_memory_of_programs_is_compiled_once():
    """A product of n x n matrices has one temporary and one output in addition to its argument."""
    traces = []

    @jax.jit
    def program(x):
        traces.append(1)
        return jnp.sin(x @ x) @ x

    x = np.ones((64, 64), np.float32)
    needed = needed_bytes(program, x)
    program(x)
    assert len(traces) == 1 and 2 * x.nbytes <= needed <= 4 * x.nbytes
    limited = device("gpu", bytes_limit=x.nbytes)
    with pytest.raises(ProgramTooLarge, match="the program needs .* GiB in addition to") as error:
        check_fits(program, x, device=limited)
    assert error.value.needed == needed and error.value.available == int(0.9 * x.nbytes)
    assert check_fits(program, x, device=device("tpu")) == needed


def test_sizes_are_predicted_from_larger_ones():
    assert predict_bytes([(10, 200)], 5) == 100
    assert predict_bytes([(10, 200), (6, 140)], 2) == 80  # 50 bytes for any size
    assert largest_size([(100, 1000)], 500) == 45  # nine tenths of the memory are aimed at
    assert largest_size([(10, 200), (6, 140)], 90) == 2
    assert largest_size([(10, 200)], 1) == 1
    assert largest_size([(16, 160)], 160) == 14  # fits as predicted; a smaller one is tried still
    assert largest_size([(100, 1000)], 500, multiple=8) == 40
