"""Tests for the QM7-X reader: both formats, units, padding, sign of forces, and invalid files."""

import importlib.util
from pathlib import Path

import h5py
import numpy as np
import pytest

from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.readers import qm7x

PADDED = (
    Path(__file__).parents[2] / "data" / "readers" / "qm7x" / "qm7x_small.npz"
)  # rows 2i and 2i + 1 are similar
BOHR = 0.529177210903

_SPEC = importlib.util.spec_from_file_location(
    "sample_qm7x", Path(__file__).parent / "samples" / "qm7x.py"
)
sample_files = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sample_files)


def read(path, report=None, **options):
    with qm7x.Reader(path, **options) as source:
        return list(source.read(range(len(source)), report or ReadReport()))


def one(path, key="7/Geom-m7-i1-c1-opt", mode="w", **changes):
    """Write a file with one structure of water."""
    with h5py.File(path, mode) as file:
        sample_files.write_structure(
            file, key, *sample_files.WATER, np.random.default_rng(0), **changes
        )
    return path


def padded(path, **changes):
    raw = np.load(PADDED)
    np.savez(path, **({k: raw[k] for k in raw.files} | changes))
    return path


def test_equals_an_independent_parser(tmp_path):
    path, _ = sample_files.make(tmp_path)
    report = ReadReport()
    structures = read(path, report)
    assert report.records == 3 and report.structures == len(structures) == 9
    keys = [(s.record, s.source, s.molecule, s.conformer, s.subset) for s in structures]
    assert keys == [
        *(
            (
                0,
                f"1000.hdf5:2/Geom-m2-i{i}-c1-{k}",
                "m2",
                c + 3 * (i - 1),
                "equilibrium" if k == "opt" else "displaced",
            )
            for i in (1, 2)
            for c, k in enumerate(("opt", "d2", "d10"))
        ),
        *(
            (
                1,
                f"1000.hdf5:10/Geom-m10-i1-c1-{k}",
                "m10",
                c,
                "equilibrium" if k == "opt" else "displaced",
            )
            for c, k in enumerate(("opt", "1"))
        ),
        (2, "2000.hdf5:1001/Geom-m1001-i1-c1-opt", "m1001", 0, "equilibrium"),
    ]
    for s in structures:
        file, key = s.source.split(":")
        with h5py.File(path / file) as opened:
            raw = {k: v[()] for k, v in opened[key].items()}
        np.testing.assert_array_equal(s.numbers, raw["atNUM"])
        np.testing.assert_array_equal(s.positions, raw["atXYZ"])
        assert s.energy == raw["ePBE0+MBD"][0]
        np.testing.assert_array_equal(s.forces, raw["totFOR"])
        np.testing.assert_array_equal(s.properties["dipole"], raw["vDIP"])
        expected = {
            "homo": -8.0,
            "lumo": 1.5,
            "gap": 9.5,
            "dipole_moment": 0.4,
            "polarizability": 17.0 * BOHR**3,
            "dispersion_energy": -0.02,
        }
        assert {k: s.properties[k] for k in expected} == pytest.approx(expected, rel=1e-7)
        np.testing.assert_array_equal(s.atom_properties["hirshfeld_charges"], raw["hCHG"][:, 0])
        np.testing.assert_allclose(
            s.atom_properties["hirshfeld_volumes"], 20.0 * BOHR**3, rtol=1e-7
        )
        np.testing.assert_array_equal(s.atom_properties["hirshfeld_ratios"], 0.9)
        np.testing.assert_allclose(
            s.atom_properties["atomic_polarizabilities"], 6.0 * BOHR**3, rtol=1e-7
        )


def test_isolated_atoms_and_other_options(tmp_path):
    path, _ = sample_files.make(tmp_path)
    with qm7x.Reader(path, properties=False) as source:
        assert source.atom_energies["C"] == -1027.592489146 and len(source.atom_energies) == 6
        first = next(iter(source))
        assert (
            not first.properties and not first.atom_properties and np.isfinite(first.forces).all()
        )
        assert [f.name for f in source.files()] == ["1000.hdf5", "2000.hdf5"]


def test_padded_format_equals_an_independent_parser():
    report = ReadReport()
    structures, raw = read(PADDED, report), np.load(PADDED)
    assert len(structures) == report.structures == report.records == len(raw["E"]) == 16
    assert min(len(s) for s in structures) < raw["z"].shape[1] == 23
    for i, s in enumerate(structures):
        n = int((raw["z"][i] > 0).sum())
        np.testing.assert_array_equal(s.numbers, raw["z"][i, :n])
        np.testing.assert_array_equal(s.positions, raw["R"][i, :n])
        np.testing.assert_array_equal(s.forces, raw["F"][i, :n])
        assert s.energy == raw["E"][i, 0] and s.source == f"qm7x_small.npz:{i}" and s.record == i
    pairs = list(zip(structures[::2], structures[1::2]))
    assert (
        all(a.molecule == b.molecule for a, b in pairs) and len({a.molecule for a, _ in pairs}) > 4
    )


def test_padded_format_notes_that_molecules_are_not_identified():
    with qm7x.Reader(PADDED) as source:
        assert any("equal formulas count as one molecule" in note for note in source.notes)


def test_forces_point_downhill():
    structures = read(PADDED)
    slopes = []
    for a, b in zip(structures[::2], structures[1::2]):
        step = b.positions - a.positions
        work = (0.5 * (a.forces + b.forces) * (step - step.mean(0))).sum()
        slopes.append((b.energy - a.energy) / -work)
    assert np.median(slopes) == pytest.approx(1.0, abs=0.1)


def test_energies_are_total():
    """Total energies in eV are a few eV per atom below those of the isolated atoms."""
    atoms = {
        1: -13.641404161,
        6: -1027.592489146,
        7: -1484.274819088,
        8: -2039.734879322,
        16: -10828.707468187,
        17: -12516.444619523,
    }
    for s in read(PADDED):
        assert -6.5 < (s.energy - sum(atoms[int(z)] for z in s.numbers)) / len(s) < -3


@pytest.mark.parametrize("factor", [1 / 27.211386245988, 23.0605])
def test_energies_in_another_unit_are_rejected(tmp_path, factor):
    raw = np.load(PADDED)
    path = padded(tmp_path / "a.npz", E=raw["E"] * factor)
    assert not qm7x.Reader.matches(path)
    with pytest.raises(DatasetError, match="a.npz:0: the energy .* not a total PBE0 energy in eV"):
        read(path)
    with pytest.raises(
        DatasetError, match="a.hdf5:7/Geom-m7-i1-c1-opt: the energy .* not a total PBE0 energy"
    ):
        read(one(tmp_path / "a.hdf5", **{"ePBE0+MBD": np.array([-2079.0 * factor])}))


def test_missing_labels_are_nan(tmp_path):
    path = one(
        tmp_path / "a.hdf5",
        totFOR=None,
        eH=None,
        vDIP=None,
        hCHG=None,
        **{"ePBE0+MBD": np.array([np.nan])},
    )
    one(path, "8/Geom-m8-i1-c1-opt", "a")
    first, second = read(path)
    assert (
        np.isnan(first.energy)
        and np.isnan(first.forces).all()
        and np.isnan(first.properties["homo"])
    )
    assert (
        np.isnan(first.properties["dipole"]).all()
        and np.isnan(first.atom_properties["hirshfeld_charges"]).all()
    )
    assert first.properties["lumo"] == 1.5 and second.properties["homo"] == -8.0
    assert set(first.properties) == set(second.properties)


def test_duplicates_are_skipped_and_counted(tmp_path):
    path, _ = sample_files.make(tmp_path)
    listed = tmp_path / "DupMols.dat"
    listed.write_text("Geom-m2-i2-c1-opt\n")
    report = ReadReport()
    structures = read(path, report, duplicates=listed)
    assert report.skipped == {"duplicate": 3} and report.structures == len(structures) == 6
    assert not any("m2-i2" in s.source for s in structures)
    with qm7x.Reader(path, duplicates=listed) as source:
        assert listed in source.files()
    with pytest.raises(DatasetError, match="nowhere.dat: the list of duplicates"):
        qm7x.Reader(path, duplicates=tmp_path / "nowhere.dat")


def test_positions_that_are_not_finite_are_skipped_and_counted(tmp_path):
    positions = sample_files.WATER[1].copy()
    positions[0, 0] = np.nan
    path = one(tmp_path / "a.hdf5", atXYZ=positions)
    one(path, "7/Geom-m7-i1-c1-d1", "a")
    report = ReadReport()
    assert [s.conformer for s in read(path, report)] == [1]
    assert report.skipped == {"positions not finite": 1} and report.structures == 1
    raw = np.load(PADDED)["R"].copy()
    raw[3, 0, 0] = np.inf
    report = ReadReport()
    assert len(read(padded(tmp_path / "b.npz", R=raw), report)) == 15
    assert report.identities == [("positions not finite", "b.npz:3")]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("atXYZ", np.zeros((4, 3))),
        ("totFOR", np.zeros((3, 2))),
        ("vDIP", np.zeros(2)),
        ("hCHG", np.zeros(4)),
        ("ePBE0+MBD", np.zeros(2)),
    ],
)
def test_invalid_shapes_are_reported(tmp_path, field, value):
    with pytest.raises(DatasetError, match="a.hdf5:7/Geom-m7-i1-c1-opt: .* has shape .*expected"):
        read(one(tmp_path / "a.hdf5", **{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("E", np.zeros((16, 2))),
        ("R", np.zeros((16, 22, 3))),
        ("F", np.zeros((15, 23, 3))),
        ("z", np.ones(23, int)),
    ],
)
def test_invalid_padded_shapes_are_reported(tmp_path, field, value):
    with pytest.raises(DatasetError, match=f"a.npz: {field} has shape .*expected"):
        read(padded(tmp_path / "a.npz", **{field: value}))


def test_other_layouts_are_rejected(tmp_path):
    with h5py.File(tmp_path / "flat.hdf5", "w") as file:
        file["energies"] = np.zeros(3)
    assert not qm7x.Reader.matches(tmp_path / "flat.hdf5")
    with pytest.raises(DatasetError, match="flat.hdf5:energies: expected a group of structures"):
        read(tmp_path / "flat.hdf5")
    with pytest.raises(DatasetError, match="a.hdf5:7/.*: expected 'atNUM', as in QM7-X; found"):
        read(one(tmp_path / "a.hdf5", atNUM=None))
    with h5py.File(tmp_path / "empty.hdf5", "w"):
        pass
    with pytest.raises(DatasetError, match="empty.hdf5: the file contains no molecules"):
        read(tmp_path / "empty.hdf5")
    np.savez(tmp_path / "b.npz", R=np.zeros(3))
    with pytest.raises(DatasetError, match=r"b.npz: expected the arrays z, R, E, F .*missing"):
        read(tmp_path / "b.npz")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DatasetError, match="folder: contains no .hdf5 files"):
        qm7x.Reader(tmp_path / "folder")


@pytest.mark.parametrize(
    ("name", "keep"), [("a.hdf5", 0), ("a.hdf5", 5000), ("a.npz", 0), ("a.npz", 20_000)]
)
def test_truncated_file_is_rejected(tmp_path, name, keep):
    whole = PADDED if name.endswith("npz") else one(tmp_path / "whole.hdf5")
    path = tmp_path / name
    path.write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(DatasetError, match=f"{name}.*truncated"):
        read(path)


def test_arrays_of_python_objects_are_rejected(tmp_path):
    energies = np.array([[-1.0]] * 16, dtype=object)
    with pytest.raises(DatasetError, match="a.npz: E is an array of Python objects"):
        read(padded(tmp_path / "a.npz", E=energies))
