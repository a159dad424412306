"""A run that is stopped, that cannot write or that loses its data says so, and goes on as if nothing had been."""

import resource
import shutil
import signal
import subprocess

import numpy as np
import pytest

from tests.tasks.runs import (
    assert_alike,
    command,
    environment,
    finish,
    newest,
    run,
    start,
    steps_of,
    stop_at,
    stopped_step,
    wait_for_step,
)

# Long enough to be interrupted: some seconds of training.
LONG = {"model": "schnet", "train__num_steps": 240, "train__log_every": 10, "train__valid_every": 60,
        "train__checkpoint_every": 20}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished run."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    code, output = run(workdir, **LONG)
    assert code == 0, output
    return workdir


def assert_same_parameters(workdir, expected):
    for kind in ("checkpoints", "best"):
        ours, theirs = newest(workdir, kind), newest(expected, kind)
        assert ours.step == theirs.step and ours.arrays.keys() == theirs.arrays.keys()
        for name, value in theirs.arrays.items():
            np.testing.assert_array_equal(ours.arrays[name], value, err_msg=f"{kind} {name}")


@pytest.mark.parametrize("number", [
    signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGUSR1))])
def test_a_signal_saves_and_asks_to_be_started_again(undisturbed, tmp_path, number):
    workdir = tmp_path / "run"
    code, output = stop_at(workdir, 30, number, **LONG)
    step = stopped_step(output)
    assert code == 75 and step is not None and 30 <= step < 240, output
    assert "Traceback" not in output and newest(workdir).step == step
    code, output = run(workdir, **LONG)
    assert code == 0 and f"going on from the checkpoint of step {step}" in output
    assert_same_parameters(workdir, undisturbed)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    code, _ = stop_at(workdir, 90, signal.SIGKILL, **LONG)
    assert code == -signal.SIGKILL
    before, last = steps_of(workdir)[-2:]
    largest = max((p for p in (workdir / "checkpoints" / str(last)).rglob("*") if p.is_file()),
                  key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:largest.stat().st_size // 2])
    code, output = run(workdir, **LONG)
    assert code == 0 and "is damaged" in output and f"going on from the checkpoint of step {before}" in output
    assert_alike(workdir, undisturbed)


def test_full_disk_in_mid_run(undisturbed, tmp_path):
    """A file-size limit stands for the full disk."""
    workdir = tmp_path / "run"
    code, _ = stop_at(workdir, 30, **LONG)
    assert code == 75
    step = newest(workdir).step
    process = subprocess.Popen(
        command(workdir, **LONG), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        env=environment(), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)))
    code, output = finish(process)
    assert code not in (0, 75) and "cannot be written" in output and "free some space" in output, output
    assert "Traceback" not in output and "tensorstore_spec" not in output
    assert newest(workdir).step == step
    code, output = run(workdir, **LONG)
    assert code == 0, output
    assert_same_parameters(workdir, undisturbed)


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_in_mid_run(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, **LONG)
    wait_for_step(workdir, 30, process)
    (workdir / "checkpoints").rename(tmp_path / "checkpoints")
    (workdir / "checkpoints").write_text("a file in the place of the folder")
    code, output = finish(process)
    assert code not in (0, 75) and "cannot be written" in output and "Traceback" not in output, output
    (workdir / "checkpoints").unlink()
    (tmp_path / "checkpoints").rename(workdir / "checkpoints")
    code, output = run(workdir, **LONG)
    assert code == 0, output
    assert_same_parameters(workdir, undisturbed)


def test_data_that_vanish_in_mid_run(undisturbed, tmp_path):
    workdir, long = tmp_path / "run", LONG | {"data__directory": tmp_path / "data"}
    process = start(workdir, **long)
    wait_for_step(workdir, 30, process)
    shards = sorted((tmp_path / "data/stores").glob("*/shards/*"))
    kept = tmp_path / "kept"
    kept.mkdir()
    for shard in shards:
        shutil.copy(shard, kept)
        with open(shard, "r+b") as file:  # those that are open would not miss a file that is unlinked
            file.truncate(1000)
    code, output = finish(process)
    assert code not in (0, 75) and shards[0].name in output and "Traceback" not in output, output
    assert newest(workdir) is not None
    for shard in shards:
        shutil.copy(kept / shard.name, shard)
    code, output = run(workdir, **long)
    assert code == 0, output
    assert_same_parameters(workdir, undisturbed)
