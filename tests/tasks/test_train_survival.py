"""Tests for runs that are stopped, cannot write or lose their data."""

import csv
import re
import resource
import shutil
import signal
import subprocess
import time

import h5py
import numpy as np
import pytest

from mlip_jax.datasets.selection.split_files import load_split
from mlip_jax.datasets.store.store import Store
from mlip_jax.distributed import EXIT_REQUEUE
from tests.tasks.runs import (
    DATA,
    assert_alike,
    command,
    environment,
    finish,
    metrics,
    newest,
    run,
    start,
    steps_of,
    stop_at,
    stopped_step,
    wait_for,
    wait_for_step,
)

# Long enough to be interrupted: some seconds of training.
LONG = {
    "model": "schnet",
    "train__num_steps": 240,
    "train__log_every": 10,
    "train__valid_every": 60,
    "train__checkpoint_every": 20,
    "optimizer__learning_rate": 5e-3,
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Workdir of a finished run."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, output = run(workdir, **LONG)
    assert code == 0, output
    return workdir


def test_training_lowers_the_error(uninterrupted):
    force = metrics(uninterrupted)["train_force_mae_mev_per_ang"]
    force = force[np.isfinite(force)]
    assert force[-3:].mean() < 0.7 * force[:3].mean()


def assert_same_parameters(workdir, expected):
    for kind in ("checkpoints", "best"):
        ours, theirs = newest(workdir, kind), newest(expected, kind)
        assert ours.step == theirs.step and ours.arrays.keys() == theirs.arrays.keys()
        for name, value in theirs.arrays.items():
            np.testing.assert_array_equal(ours.arrays[name], value, err_msg=f"{kind} {name}")


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGUSR1)),
    ],
)
def test_a_signal_saves_a_checkpoint_and_requests_a_restart(uninterrupted, tmp_path, number):
    workdir = tmp_path / "run"
    code, output = stop_at(workdir, 30, number, **LONG)
    step = stopped_step(output)
    assert code == 75 and step is not None and 30 <= step < 240, output
    assert "Traceback" not in output and newest(workdir).step == step
    code, output = run(workdir, **LONG)
    assert code == 0 and f"resuming from the checkpoint at step {step}" in output
    assert_same_parameters(workdir, uninterrupted)


@pytest.mark.slow
def test_a_second_interrupt_ends_the_run_immediately(tmp_path):
    # many updates in a call: the run could not stop by itself between the two signals
    fields = LONG | {
        "train__num_steps": 100_000,
        "train__log_every": 50,
        "train__valid_every": 100_000,
        "train__checkpoint_every": 100_000,
        "train__resident": True,
        "train__steps_per_dispatch": 50,
        "train__batch_size": 32,
        "model__options__num_features": 64,
    }
    workdir, log = tmp_path / "run", tmp_path / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            command(workdir, **fields), stdout=file, stderr=file, cwd=tmp_path, env=environment()
        )
    wait_for_step(workdir, 50, process)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "stopping after this step" in " ".join(log.read_text().split()), process)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    code = process.wait(timeout=60)
    output = log.read_text()
    assert time.monotonic() - begin < 15
    assert (
        code == 1
        and "interrupted" in output
        and stopped_step(output) is None
        and "Traceback" not in output
    ), output
    assert newest(workdir) is None


def test_an_interrupt_before_the_first_step_requests_a_restart(tmp_path):
    process = start(tmp_path / "run", **LONG)
    # the data are read, nothing is compiled
    wait_for(lambda: "structures of" in process.written(), process)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == EXIT_REQUEUE, output
    assert "Traceback" not in output and newest(tmp_path / "run") is None


def test_a_corrupted_checkpoint_falls_back_to_the_previous_one(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    code, _ = stop_at(workdir, 90, signal.SIGKILL, **LONG)
    assert code == -signal.SIGKILL
    before, last = steps_of(workdir)[-2:]
    # all files of arrays: some hold copies that are not read
    for file in (workdir / "checkpoints" / str(last) / "arrays").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    code, output = run(workdir, **LONG)
    assert (
        code == 0
        and "corrupted checkpoint" in output
        and f"resuming from the checkpoint at step {before}" in output
    )
    assert_alike(workdir, uninterrupted)


@pytest.mark.slow
def test_a_full_disk_during_a_run(uninterrupted, tmp_path):
    """A limit of the file size simulates a full disk."""
    workdir = tmp_path / "run"
    code, _ = stop_at(workdir, 30, **LONG)
    assert code == 75
    step = newest(workdir).step
    process = subprocess.Popen(
        command(workdir, **LONG),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)),
    )
    code, output = finish(process)
    assert (
        code not in (0, 75) and "cannot be written" in output and "Free up disk space" in output
    ), output
    assert "Traceback" not in output and "tensorstore_spec" not in output
    assert newest(workdir).step == step
    code, output = run(workdir, **LONG)
    assert code == 0, output
    assert_same_parameters(workdir, uninterrupted)


@pytest.mark.slow
def test_a_folder_that_becomes_unwritable_during_a_run(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, **LONG)
    wait_for_step(workdir, 30, process)
    (workdir / "checkpoints").rename(tmp_path / "checkpoints")
    (workdir / "checkpoints").write_text("a file in the place of the folder")
    code, output = finish(process)
    assert code not in (0, 75) and "cannot be written" in output and "Traceback" not in output, (
        output
    )
    (workdir / "checkpoints").unlink()
    (tmp_path / "checkpoints").rename(workdir / "checkpoints")
    code, output = run(workdir, **LONG)
    assert code == 0, output
    assert_same_parameters(workdir, uninterrupted)


@pytest.mark.slow
def test_data_that_disappear_during_a_run(uninterrupted, tmp_path):
    workdir, long = tmp_path / "run", LONG | {"data__directory": tmp_path / "data"}
    process = start(workdir, **long)
    wait_for_step(workdir, 30, process)
    shards = sorted((tmp_path / "data/stores").glob("*/shards/*.safetensors"))
    kept = tmp_path / "kept"
    kept.mkdir()
    for shard in shards:
        shutil.copy(shard, kept)
        # not unlinked, because a process that has a file open would not miss it
        with open(shard, "r+b") as file:
            file.truncate(1000)
    code, output = finish(process)
    assert code not in (0, 75) and shards[0].name in output and "Traceback" not in output, output
    assert newest(workdir) is not None
    for shard in shards:
        shutil.copy(kept / shard.name, shard)
    code, output = run(workdir, **long)
    assert code == 0, output
    assert_same_parameters(workdir, uninterrupted)


@pytest.fixture(scope="module")
def with_absurd_energy(uninterrupted, tmp_path_factory):
    """Fields of a run and name of a structure whose energy is finite, but its square is not."""
    parts, meta = load_split(uninterrupted / "splits.npz")
    bad = Store(uninterrupted.parent / meta["store"])[int(parts["train"][7])]
    path = tmp_path_factory.mktemp("absurd") / "absurd.hdf5"
    shutil.copy(DATA, path)
    group = bad.source.rpartition("/")[2].rpartition(":")[2]
    with h5py.File(path, "a") as file:
        file[group]["dft_total_energy"][bad.conformer] = 1e28
    # clipping would make zeros of such a gradient
    fields = LONG | {
        "data__path": path,
        "data__refuse": False,
        "data__reference_energies": "none",
        "loss__penalty": "mse",
        "train__num_steps": 48,
        "train__checkpoint_every": 4,
        "optimizer__clip_norm": 0.0,
    }
    return fields, f"{group}#{bad.conformer}"


def recorded(workdir):
    """Return the rows of nonfinite.csv as {step: names}."""
    with open(workdir / "nonfinite.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({tuple(r.values()) for r in rows}) == len(rows)
    return {int(r["step"]): [s["structure"] for s in rows if s["step"] == r["step"]] for r in rows}


def assert_finished(workdir, output, num_steps):
    last = newest(workdir)
    assert last.step == num_steps and all(np.isfinite(v).all() for v in last.arrays.values()), (
        output
    )
    rows = metrics(workdir)
    assert np.isfinite(rows["train_loss"]).any() and not np.isinf(rows["train_loss"]).any()


@pytest.mark.parametrize("choice", ["skip", pytest.param("rollback", marks=pytest.mark.slow)])
def test_a_nonfinite_loss_in_a_whole_run(with_absurd_energy, tmp_path, choice):
    fields, name = with_absurd_energy
    workdir = tmp_path / "run"
    code, output = run(workdir, train__on_nonfinite="stop", **fields)
    step = int(re.search(r"gradient in step (\d+)", output)[1])
    assert code == 1 and name in output and "Traceback" not in output, output
    ((at, names),) = recorded(workdir).items()
    assert at == step and sum(n.endswith(name) for n in names) == 1
    before = newest(workdir)
    assert (0 if before is None else before.step) == (step - 1) // 4 * 4
    assert before is None or all(np.isfinite(v).all() for v in before.arrays.values())

    code, output = run(workdir, train__on_nonfinite=choice, **fields)
    assert code == 0, output
    assert_finished(workdir, output, 48)
    met = recorded(workdir)
    assert step in met and 3 <= len(met) <= 4  # in each epoch of 16 updates
    assert all(sum(n.endswith(name) for n in names) >= 1 for names in met.values())
    said = "Skipping this step" if choice == "skip" else "Rolling back to the last checkpoint"
    assert output.count(said) >= 3
    assert (output.count("resuming from the checkpoint at step") >= 3) == (choice == "rollback")
