"""Tests for training on several devices and in several processes."""

import os
import signal
import subprocess
import time

import numpy as np
import pytest

from tests.tasks.runs import (
    REPOSITORY,
    assert_alike,
    environment,
    finish,
    flags,
    newest,
    run,
    stopped_step,
)
from tests.tasks.runs import stop_at as stop

# Squares: the gradient of absolute errors is a sum of signs, whose zeros rounding decides.
RUN = {
    "model": "schnet",
    "loss__penalty": "mse",
    "train__num_steps": 20,
    "train__batch_size": 16,
    "train__log_every": 1,
    "train__valid_every": 10,
    "train__checkpoint_every": 5,
}


def launch(workdir, *, changes, processes=2, **options):
    """Start launch/local.sh with `count` processes."""
    arguments = [
        str(REPOSITORY / "launch/local.sh"),
        "-n",
        str(processes),
        "--",
        *flags(workdir, **changes),
    ]
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=workdir.parent,
        env=environment(1),
        start_new_session=True,
        **options,
    )


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    run_of_two = RUN | {"train__micro_batches": 2}
    code, output = run(tmp_path / "one", env=environment(1), **run_of_two)
    assert code == 0, output
    code, output = finish(launch(tmp_path / "two", changes=run_of_two))
    assert code == 0 and "in 2 process(es)" in output, output
    assert_alike(tmp_path / "two", tmp_path / "one", atol=1e-6)
    a, b = (np.load(tmp_path / w / "predictions_test.npz") for w in ("one", "two"))
    np.testing.assert_allclose(b["energy_predicted"], a["energy_predicted"], atol=1e-4)
    np.testing.assert_allclose(b["forces_predicted"], a["forces_predicted"], atol=1e-4)
    assert len(a["energy_predicted"]) > 5 and np.isfinite(a["forces_predicted"]).all()
    only = {p.name for p in (tmp_path / "two").iterdir()} - {
        p.name for p in (tmp_path / "one").iterdir()
    }
    assert only == {"process_1.log"}


@pytest.mark.slow
def test_a_run_on_eight_devices_resumes_on_two(tmp_path):
    code, output = run(tmp_path / "eight", env=environment(8), **RUN)
    assert code == 0 and "8 micro-batch(es)" in output, output
    code, output = stop(tmp_path / "run", 6, env=environment(8), **RUN)
    assert code == 75 and 6 <= stopped_step(output) < 20, output
    code, output = run(tmp_path / "run", env=environment(2), **RUN)
    assert code == 0 and "8 micro-batch(es)" in output and "2 device(s)" in output, output
    ours, theirs = newest(tmp_path / "run"), newest(tmp_path / "eight")
    assert ours.step == theirs.step == 20
    for name, value in theirs.arrays.items():
        np.testing.assert_allclose(ours.arrays[name], value, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_all_processes_end_if_one_ends(tmp_path):
    changes = RUN | {
        "train__num_steps": 20_000,
        "train__checkpoint_every": 50,
        "train__valid_every": 20_000,
    }
    workdir = tmp_path / "run"
    process = launch(workdir, changes=changes)
    deadline = time.monotonic() + 240
    while not (newest(workdir) if (workdir / "checkpoints").is_dir() else None):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(process_one(workdir), signal.SIGKILL)
    begin = time.monotonic()
    code, output = finish(process, timeout=60)
    assert time.monotonic() - begin < 15
    assert code not in (0, 75) and "process 1" in output, output
    step = newest(workdir).step
    process = launch(workdir, changes=changes)
    while newest(workdir).step <= step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline + 240
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    code, output = finish(process, timeout=90)
    assert code == 75 and f"resuming from the checkpoint at step {step}" in output, output


def process_one(workdir):
    """Return the process ID of the second process of a run."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                with open(f"/proc/{entry}/environ", "rb") as file:
                    variables = file.read().split(b"\0")
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
            except OSError:
                continue
            if (
                b"MLIP_JAX_PROCESS_ID=1" in variables
                and f"--workdir={workdir}".encode() in words
                and b"-m" in words
            ):
                return int(entry)
    raise AssertionError("there is no second process")
