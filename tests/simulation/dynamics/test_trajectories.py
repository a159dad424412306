"""Tests for trajectories on disk: round trips in both formats, also after the writer was killed."""

import os
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator

from mlip_jax.simulation.dynamics import h5md
from mlip_jax.simulation.dynamics.trajectories import FORMS, read_trajectory
from tests.forks import Forks

ABOUT = {"molecule": 7, "name": "water", "charge": -1.0}


def frame(step, pbc=False):
    rng = np.random.default_rng(step)
    atoms = Atoms(
        "OHH",
        rng.normal(0, 5, (3, 3)),
        pbc=pbc,
        info={"step": step, "time_fs": 0.5 * step, **ABOUT},
    )
    if np.any(pbc):
        atoms.set_cell(9 * np.eye(3) + rng.normal(0, 0.1, (3, 3)))
    atoms.set_momenta(rng.normal(size=(3, 3)))
    atoms.calc = SinglePointCalculator(
        atoms, energy=-2000.0 - 1e-9 * step, forces=rng.normal(size=(3, 3))
    )
    return atoms


def assert_same(actual, expected, rtol=1e-6):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        assert a.info == b.info and (a.numbers == b.numbers).all() and (a.pbc == b.pbc).all()
        np.testing.assert_allclose(a.positions, b.positions, rtol=rtol, atol=1e-7)
        np.testing.assert_allclose(a.get_momenta(), b.get_momenta(), rtol=rtol, atol=1e-7)
        np.testing.assert_allclose(a.cell.array, b.cell.array, rtol=1e-12, atol=1e-8)
        assert a.get_potential_energy() == pytest.approx(b.get_potential_energy(), abs=1e-7)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("pbc", [False, True, (True, True, False)])
def test_frames_round_trip(tmp_path, form, pbc):
    path, frames = tmp_path / f"0{form.suffix}", [frame(step, pbc) for step in range(0, 50, 5)]
    assert form.size(path) == 0
    form.append(path, frames[:3])
    short = form.size(path)
    form.append(path, frames[3:])
    assert_same(read_trajectory(path), frames)
    assert_same(read_trajectory(str(path), slice(-1, None)), frames[-1:])
    assert_same(read_trajectory(path, slice(1, 9, 3)), frames[1:9:3])
    form.truncate(path, form.size(path))
    assert_same(read_trajectory(path), frames)
    form.truncate(path, short)
    assert_same(read_trajectory(path), frames[:3])
    form.append(path, frames[3:])
    assert_same(read_trajectory(path), frames)


def test_the_layout_is_that_of_h5md(tmp_path):
    path, frames = tmp_path / "0.h5", [frame(step, True) for step in (0, 5)]
    h5md.append(path, frames)
    with h5py.File(path) as file:
        assert file["h5md"].attrs["version"].tolist() == [1, 1]
        atoms, energy = file["particles/all"], file["observables/all/potential_energy"]
        assert atoms["position/value"].dtype == atoms["velocity/value"].dtype == np.float32
        assert [
            atoms[f"{name}/value"].attrs["unit"] for name in ("position", "velocity", "box/edges")
        ] == ["Angstrom", "Angstrom fs-1", "Angstrom"]
        assert energy["value"].attrs["unit"] == "eV" and atoms["mass"].attrs["unit"] == "u"
        np.testing.assert_allclose(
            atoms["velocity/value"][1], frames[1].get_velocities() * units.fs, rtol=1e-6
        )
        np.testing.assert_array_equal(atoms["species"], [8, 1, 1])
        assert atoms["box"].attrs["dimension"] == 3 and set(atoms["box"].attrs["boundary"]) == {
            b"periodic"
        }
        for group in (atoms["position"], atoms["velocity"], atoms["box/edges"], energy):
            assert group["step"][:].tolist() == [0, 5] and group["time"][:].tolist() == [0, 2.5]
            assert group["time"].attrs["unit"] == "fs"


def test_truncation_keeps_frames_bit_for_bit(tmp_path):
    """A copy on the way would go through ASE's units."""
    path, whole = tmp_path / "0.h5", tmp_path / "whole.h5"
    frames = [frame(step, True) for step in range(600)]
    h5md.append(path, frames)
    h5md.append(whole, frames[:560])
    h5md.truncate(path, 560)
    with h5py.File(path) as a, h5py.File(whole) as b:
        for name in h5md.dataset_names(a):
            np.testing.assert_array_equal(a[name][:], b[name][:])


def test_a_reader_does_not_block_the_writer(tmp_path):
    path, frames = tmp_path / "0.h5", [frame(step) for step in range(3)]
    h5md.append(path, frames[:1])
    look = "import h5py, sys; file = h5py.File(sys.argv[1]); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", look, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as reader:
        reader.stdout.readline()
        h5md.append(path, frames[1:])
        reader.stdin.close()
    assert_same(read_trajectory(path), frames)


PROGRAM = "tests.simulation.dynamics.h5md_program"


def kill_while_writing(forks, path, seconds):
    """Kill a process that appends frames, and return the last frame that it reported."""
    read, write = os.pipe()
    with open(read) as output:
        with open(write, "w") as stdout:
            process = forks.start(f"from {PROGRAM} import main; main()", path, stdout=stdout)
        first = output.readline()
        time.sleep(seconds)
        process.kill()
        reported = [int(line) for line in [first, *output] if line.endswith("\n")]
    process.wait()
    return reported[-1]


def test_a_killed_writer_leaves_a_file_that_can_be_read_and_written(tmp_path):
    path, rng = tmp_path / "0.h5", np.random.default_rng(0)
    with Forks(PROGRAM) as forks:
        for _ in range(4):
            last = kill_while_writing(forks, path, rng.uniform(0, 0.05))
            count = h5md.size(path)
            assert count >= last + 1
            assert_same(read_trajectory(path), [frame(step) for step in range(count)])
            kept = max(last, 1)  # truncating to no frame removes the file
            h5md.truncate(path, kept)
            with h5py.File(path) as file:  # as any program opens it
                assert len(file["particles/all/position/value"]) == kept
    assert [p.name for p in tmp_path.iterdir()] == ["0.h5"]


def test_files_of_another_kind(tmp_path):
    with pytest.raises(ValueError, match="must end with .xyz or .h5"):
        read_trajectory(tmp_path / "a.traj")
    with pytest.raises(OSError):
        read_trajectory(tmp_path / "none.h5")
    with h5py.File(tmp_path / "other.h5", "w", libver="latest") as file:
        file["x"] = 1
    with pytest.raises(ValueError, match="not a trajectory"):
        read_trajectory(tmp_path / "other.h5")
    (tmp_path / "broken.h5").write_bytes(b"nothing")
    with pytest.raises(OSError):
        h5md.size(tmp_path / "broken.h5")
