"""Tests for the task `md`: its files, which do not depend on interruptions."""

import csv
import functools
import json
import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from ase.io import read, write

from mlip_jax import MLIPCalculator
from mlip_jax.config import ConfigError
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.simulation.dynamics import batch as dynamics
from mlip_jax.simulation.dynamics import h5md
from mlip_jax.simulation.dynamics.outputs import DynamicsOutputs, OutputError
from mlip_jax.simulation.dynamics.trajectories import read_trajectory
from mlip_jax.tasks import md
from mlip_jax.workdir import WorkdirError
from tests.simulation.analytic import pairwise
from tests.simulation.dynamics.test_md import cluster
from tests.tasks.md_program import options
from tests.tasks.runs import environment


@pytest.fixture
def run_task(tmp_path, monkeypatch):
    """Function run(workdir="run", **config changes) that simulates two clusters."""
    path = tmp_path / "clusters.xyz"
    write(path, [cluster(0), cluster(1)[:9]])
    monkeypatch.setattr(
        md,
        "load_mean_force_field",
        lambda text: pairwise(depth=0.02 if text == "other" else 0.0104),
    )
    monkeypatch.setattr(dynamics, "DISPATCH_SECONDS", 0.003)

    def run(workdir="run", input=path, drawn=False, **changes):
        if not drawn:
            monkeypatch.setattr(
                md, "write_md_report", lambda workdir, *_, **__: workdir / "report.html"
            )
        return md.run(options(input, **changes), tmp_path / workdir)

    return run


def outputs(workdir):
    paths = [workdir / "thermo.csv", *sorted((workdir / "trajectories").iterdir())]
    return {
        path.name: arrays(path) if path.suffix == ".h5" else path.read_bytes() for path in paths
    }


def arrays(path):
    """Return the arrays of an HDF5 file as bytes, independent of its layout."""
    with h5py.File(path) as file:
        return {name: file[name][:].tobytes() for name in h5md.dataset_names(file)}


def test_results(run_task, tmp_path):
    report = run_task(drawn=True)
    workdir = tmp_path / "run"
    page = report.read_text()
    assert report == workdir / "report.html" and page.count("<img") == 2 and "Ar13" in page
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert (metrics["molecules"], metrics["steps"], metrics["broken"]) == (4, 120, 0)
    assert metrics["picoseconds"] == 0.48 and metrics["nanoseconds_per_day"] > 0
    assert 0 < metrics["each"][3]["mean_temperature_k"] < 200 and metrics["each"][3]["n_atoms"] == 9
    with open(workdir / "thermo.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == [s for s in range(0, 121, 2) for _ in range(4)]
    assert [int(r["molecule"]) for r in rows[:4]] == [0, 1, 2, 3] and rows[0]["volume_ang3"] == ""
    for m in range(4):
        frames = read(workdir / f"trajectories/{m}.xyz", ":")
        assert [f.info["step"] for f in frames] == list(range(0, 121, 10)) and frames[1].info[
            "time_fs"
        ] == 40
        assert frames[-1].get_momenta().any()
        row = next(r for r in rows if r["step"] == "120" and r["molecule"] == str(m))
        assert frames[-1].get_potential_energy() == pytest.approx(
            float(row["potential_ev"]), abs=1e-6
        )
        fresh = MLIPCalculator(pairwise(), "float64")
        np.testing.assert_allclose(frames[-1].get_forces(), fresh.get_forces(frames[-1]), atol=1e-5)
    start = read(workdir / "trajectories/0.xyz", 0).positions
    np.testing.assert_allclose(start, cluster(0).positions, atol=1e-5)
    assert (start == read(workdir / "trajectories/1.xyz", 0).positions).all(), (
        "replicas start identically, except for momenta"
    )


def test_both_trajectory_formats_contain_the_same_frames(run_task, tmp_path):
    report = run_task("hdf5", trajectory_format="hdf5", drawn=True)
    run_task("text")
    assert (
        "<img" in report.read_text()
        and (tmp_path / "hdf5/thermo.csv").read_bytes()
        == (tmp_path / "text/thermo.csv").read_bytes()
    )
    for m in range(4):
        texts, frames = (
            read_trajectory(tmp_path / name)
            for name in (f"text/trajectories/{m}.xyz", f"hdf5/trajectories/{m}.h5")
        )
        assert len(frames) == 13
        for a, b in zip(texts, frames):
            assert a.info == b.info
            np.testing.assert_allclose(a.positions, b.positions, atol=2e-6)
            np.testing.assert_allclose(a.get_momenta(), b.get_momenta(), atol=1e-6)
            assert a.get_potential_energy() == pytest.approx(b.get_potential_energy(), abs=1e-7)


@pytest.mark.parametrize("form", ["extxyz", "hdf5"])
def test_a_stopped_run_writes_the_same_output(run_task, tmp_path, monkeypatch, form):
    run_task = functools.partial(run_task, trajectory_format=form)
    run_task("whole")
    write_files, calls = DynamicsOutputs.write, []

    def fails(self, *arguments):
        calls.append(0)
        write_files(self, *arguments)
        if len(calls) in (3, 5):  # the frames are not in a restart file yet
            raise SystemExit

    monkeypatch.setattr(DynamicsOutputs, "write", fails)
    for _ in range(2):
        with pytest.raises(SystemExit):
            run_task("stopped")
    run_task("stopped", num_steps=100)
    run_task("stopped")
    assert len(calls) > 5 and outputs(tmp_path / "stopped") == outputs(tmp_path / "whole")
    before = len(calls)
    run_task("stopped")
    assert len(calls) == before, "nothing is left to do"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["extxyz", "hdf5"])
def test_a_killed_run_writes_the_same_output(tmp_path, form):
    path = tmp_path / "clusters.xyz"
    write(path, [cluster(0), cluster(1)[:9]])

    def start(workdir):
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.tasks.md_program",
                path,
                tmp_path / workdir,
                "3000",
                form,
            ],
            cwd=md.__file__.rsplit("/", 4)[0],
            env=environment(),
            stderr=subprocess.DEVNULL,
        )

    assert start("whole").wait(600) == 0
    for _ in range(3):
        process = start("killed")
        restart, deadline = tmp_path / "killed/restart.npz", time.monotonic() + 300
        before = restart.stat().st_mtime_ns if restart.exists() else 0
        while (
            process.poll() is None
            and time.monotonic() < deadline
            and not (restart.exists() and restart.stat().st_mtime_ns > before)
        ):
            time.sleep(0.01)
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        # a text may end within a frame
        for file in (tmp_path / "killed/trajectories").glob("*.h5"):
            steps = [a.info["step"] for a in read_trajectory(file)]
            assert steps and steps == list(range(0, 10 * len(steps), 10))
    assert start("killed").wait(600) == 0
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole")


def test_other_settings_than_those_of_the_run_are_errors(run_task, tmp_path):
    run_task(num_steps=4)
    with pytest.raises(WorkdirError, match="temperature: 60.0 -> 70.0"):
        run_task(num_steps=4, temperature=70.0)
    with pytest.raises(WorkdirError, match="force_field"):
        run_task(num_steps=4, force_field="other")
    restart = tmp_path / "run/restart.npz"
    content = restart.read_bytes()
    restart.write_bytes(content[:200])
    with pytest.raises(OutputError, match="corrupted .* Remove it"):
        run_task(num_steps=8)
    restart.write_bytes(content)
    (tmp_path / "run/thermo.csv").write_text("step")
    with pytest.raises(OutputError, match="thermo.csv: contains 4 bytes"):
        run_task(num_steps=8)


def test_a_truncated_trajectory_is_an_error(run_task, tmp_path):
    run_task(num_steps=20, trajectory_format="hdf5")
    path = tmp_path / "run/trajectories/2.h5"
    h5md.truncate(path, 1)
    with pytest.raises(OutputError, match="2.h5: contains 1 frames, but contained 3"):
        run_task(trajectory_format="hdf5")
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(OutputError, match="2.h5: cannot be read or truncated to 3 frames"):
        run_task(trajectory_format="hdf5")


def test_invalid_input_is_an_error(run_task, tmp_path):
    for changes, error, words in [
        ({"num_steps": 0}, ConfigError, "num_steps must be at least 1"),
        ({"input": ""}, ConfigError, "input is required"),
        ({"force_field": ""}, ConfigError, "force_field is required"),
        ({"ensemble": "nvt"}, ConfigError, "unknown ensemble 'nvt'"),
        ({"trajectory_format": "hdf"}, ConfigError, "Did you mean 'hdf5'"),
        ({"ensemble": "npt"}, ValueError, "periodic in all directions"),
        ({"input": tmp_path / "none.xyz"}, DatasetError, "no such file"),
        ({"timestep": -1.0}, ConfigError, "timestep must be positive"),
    ]:
        with pytest.raises(error, match=words):
            run_task(**changes)
    empty = tmp_path / "broken.xyz"
    empty.write_text("2\n\nAr 0 0 0\nXx 0 0 zero\n")
    with pytest.raises(DatasetError, match="molecule 0 cannot be simulated"):
        run_task(input=empty)
