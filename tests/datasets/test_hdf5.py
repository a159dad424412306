"""Tests for hdf5.py: only data in the file itself are read, so private files are not copied."""

import os

import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from mlip_jax.datasets import hdf5
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.readers import ani, qm7x, spice
from mlip_jax.simulation.dynamics import h5md

READERS = {  # reader, group of a molecule, array of positions
    "spice": (spice.Reader, "water", "conformations", {"atomic_numbers": np.array([1])}),
    "ani": (
        ani.Reader,
        "H",
        "coordinates",
        {"atomic_numbers": np.array([1]), "wb97x_dz.energy": np.zeros(1)},
    ),
    "qm7x": (
        qm7x.Reader,
        "1/opt",
        "atXYZ",
        {"atNUM": np.array([1]), "ePBE0+MBD": np.array([-15.0])},
    ),
}
KINDS = ("soft link", "external link", "external storage", "virtual")


def refer(group, name, kind, private, shape=(1, 1, 3)):
    """Add an array to a group whose data are in the file `private`."""
    if kind == "soft link":
        group[name] = h5py.SoftLink("/elsewhere")
    elif kind == "external link":
        group[name] = h5py.ExternalLink(private, "x")
    elif kind == "external storage":
        group.create_dataset(name, shape, "f8", external=[(str(private), 0, h5py.h5f.UNLIMITED)])
    else:
        layout = h5py.VirtualLayout(shape, "f8")
        layout[...] = h5py.VirtualSource(private, "x", shape)
        group.create_virtual_dataset(name, layout)


@pytest.fixture
def private(tmp_path):
    path = tmp_path / "private.hdf5"
    with h5py.File(path, "w") as file:
        file["x"] = np.ones((1, 1, 3))
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_readers_do_not_read_other_files(tmp_path, private, name, kind):
    """Detects stores that contain the bytes of a private file and may be shared."""
    reader, group, positions, arrays = READERS[name]
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for key, values in arrays.items():
            file[f"{group}/{key}"] = values
        refer(file[group], positions, kind, private)
    with pytest.raises(DatasetError, match="is a link|the data of another file"):
        with reader(tmp_path / "a.hdf5") as opened:
            list(opened)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_groups_elsewhere_are_rejected(tmp_path, private, kind):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        refer(file, "x", kind, private)
    with hdf5.Hdf5File(tmp_path / "a.hdf5") as file:
        for get in (lambda: file["x"], lambda: file["x/y"]):
            with pytest.raises((DatasetError, KeyError), match="is a link|data of another|x/y"):
                get()


@pytest.mark.parametrize("kind", KINDS)
def test_trajectories_are_not_appended_to_other_files(tmp_path, private, kind):
    """Detects a trajectory of other people that redirects writes into the user's files."""
    frame = Atoms("H", info={"step": 0, "time_fs": 0.0})
    frame.calc = SinglePointCalculator(frame, energy=0.0)
    h5md.append(tmp_path / "0.h5", [frame])
    with h5py.File(tmp_path / "0.h5", "a") as file:
        del file["particles/all/position/value"]
        refer(file["particles/all/position"], "value", kind, private)
    before = private.read_bytes()
    for use in (h5md.read, lambda path: h5md.append(path, [frame])):
        with pytest.raises(ValueError, match="is a link|the data of another file"):
            use(tmp_path / "0.h5")
    assert private.read_bytes() == before


def test_a_pipe_is_not_a_data_file(tmp_path):
    """Detects an endless wait for the writer of a named pipe."""
    os.mkfifo(tmp_path / "a.hdf5")
    with pytest.raises(DatasetError, match="a pipe or a device"):
        spice.Reader(tmp_path / "a.hdf5")


def test_circles_of_groups_end(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        group = file.create_group("a/b")
        group["circle"] = file["a"]
    with hdf5.Hdf5File(tmp_path / "a.hdf5") as file:
        assert list(file.groups()) == ["a", "a/b"]


def test_large_arrays_can_be_allowed(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["x"] = np.zeros(10)
    monkeypatch.setenv("MLIP_JAX_MAX_ARRAY_BYTES", "79")
    with hdf5.Hdf5File(tmp_path / "a.hdf5") as file:
        with pytest.raises(DatasetError, match="a.hdf5:x: 80 bytes of one array.*MAX_ARRAY_BYTES"):
            file["x"]
        monkeypatch.setenv("MLIP_JAX_MAX_ARRAY_BYTES", "80")
        assert len(file["x"].read()) == 10
