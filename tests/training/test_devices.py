"""Tests that a step is the same on any number of devices, with batches from host or device."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.compilation import xla_flags

PROGRAM = Path(__file__).with_name("devices_program.py")
REPOSITORY = PROGRAM.parents[2]


def train(output, devices, resident=False, per_call=1):
    """Return losses and parameters after 20 steps on `devices` devices, in another process."""
    environment = dict(
        os.environ,
        PYTHONPATH=str(REPOSITORY),
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=xla_flags(f"--xla_force_host_platform_device_count={devices}"),
    )
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(output), str(resident), str(per_call)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = np.load(output)
    assert result["devices"] == devices and len(result["losses"]) == 20
    return result


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one") / "one.npz", 1)


@pytest.mark.parametrize(
    ("devices", "resident", "per_call"),
    [
        pytest.param(2, False, 1, marks=pytest.mark.slow),
        (8, False, 1),
        pytest.param(3, False, 1, marks=pytest.mark.slow),  # the last device lacks a micro-batch
        (2, True, 6),
        pytest.param(1, True, 1, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_devices_gives_the_same_parameters(
    on_one, tmp_path, devices, resident, per_call
):
    other = train(tmp_path / "other.npz", devices, resident, per_call)
    np.testing.assert_allclose(other["losses"], on_one["losses"], rtol=1e-6)
    for name in ("params", "ema"):
        np.testing.assert_allclose(other[name], on_one[name], rtol=0, atol=1e-6, err_msg=name)
    assert np.ptp(on_one["losses"]) > 1
