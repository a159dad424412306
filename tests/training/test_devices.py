"""Tests that a step is the same on any number of devices, with batches from host or device."""

import functools

import numpy as np
import pytest

from tests.compilation import xla_flags
from tests.forks import Forks

PROGRAM = "tests.training.devices_program"


@pytest.fixture(scope="module")
def forks():
    with Forks(PROGRAM) as started:
        yield started


def train(forks, output, devices, num_buckets, resident=False, per_call=1):
    """Return losses and parameters after 20 steps on `devices` devices, in another process."""
    flags = xla_flags(f"--xla_force_host_platform_device_count={devices}")
    with open(output.with_suffix(".log"), "w+") as log:
        process = forks.start(
            f"import sys; from {PROGRAM} import main; main(*sys.argv[1:])",
            output,
            resident,
            per_call,
            num_buckets,
            stdout=log,
            XLA_FLAGS=flags,
        )
        code = process.wait(timeout=300)
        log.seek(0)
        assert code == 0, log.read()[-3000:]
    result = np.load(output)
    assert result["devices"] == devices and len(result["losses"]) == 20
    return result


@pytest.fixture(scope="module")
def on_one(forks, tmp_path_factory):
    """Results on one device, by the number of size buckets."""
    folder = tmp_path_factory.mktemp("one")
    return functools.cache(lambda buckets: train(forks, folder / f"{buckets}.npz", 1, buckets))


@pytest.mark.parametrize(
    ("devices", "resident", "per_call", "buckets"),
    [
        (8, False, 1, 1),
        (2, True, 6, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (8, False, 1, 2),
                (2, False, 1, 2),
                (3, False, 1, 2),  # the last device lacks a micro-batch
                (2, True, 6, 2),
                (1, True, 1, 2),
            )
        ),
    ],
)
def test_any_number_of_devices_gives_the_same_parameters(
    forks, on_one, tmp_path, devices, resident, per_call, buckets
):
    expected = on_one(buckets)
    other = train(forks, tmp_path / "other.npz", devices, buckets, resident, per_call)
    np.testing.assert_allclose(other["losses"], expected["losses"], rtol=1e-6)
    for name in ("params", "ema"):
        np.testing.assert_allclose(other[name], expected[name], rtol=0, atol=1e-6, err_msg=name)
    assert np.ptp(expected["losses"]) > 0.5 * np.mean(expected["losses"])
