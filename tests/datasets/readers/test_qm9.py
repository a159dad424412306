"""Tests for the QM9 reader: three formats, units, uncharacterized molecules, corrupted files."""

import base64
import bz2
import importlib.util
import io
import json
import shutil
import sqlite3
import tarfile
import tracemalloc
from pathlib import Path

import ase
import ase.db
import numpy as np
import pytest

from mlip_jax.config import ConfigError
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.readers import qm9

XYZ = Path(__file__).parents[2] / "data" / "readers" / "qm9" / "qm9_first.xyz"
HARTREE, BOHR, CAL_PER_MOL = 27.211386245988, 0.529177210903, 0.0433641153087705 / 1000
DEBYE = 0.20819433442462576  # e·Å

_SPEC = importlib.util.spec_from_file_location(
    "sample_qm9", Path(__file__).parent / "samples" / "qm9.py"
)
sample_files = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sample_files)

WATER = {
    "internal_energy": -76.401867 * HARTREE,
    "enthalpy": -76.400922 * HARTREE,
    "free_energy": -76.422349 * HARTREE,
    "zpve": 0.021375 * HARTREE,
    "homo": -0.2928 * HARTREE,
    "lumo": 0.0687 * HARTREE,
    "gap": 0.3615 * HARTREE,
    "dipole_moment": 1.8511 * DEBYE,
    "polarizability": 6.31 * BOHR**3,
    "electronic_spatial_extent": 19.0002 * BOHR**2,
    "heat_capacity": 6.002 * CAL_PER_MOL,
}
WATER_ATOMS = ase.Atoms(
    "OH2",
    [
        [-0.0343604951, 0.9775395708, 0.0076015923],
        [0.0647664923, 0.0205721989, 0.0015346341],
        [0.8717903737, 1.3007924048, 0.0006931336],
    ],
)
IN_HARTREE = {
    "energy_U0": -76.404702,
    "energy_U": -76.401867,
    "enthalpy_H": -76.400922,
    "free_energy": -76.422349,
    "zpve": 0.021375,
    "homo": -0.2928,
    "lumo": 0.0687,
    "gap": 0.3615,
    "dipole_moment": 1.8511,
    "isotropic_polarizability": 6.31,
    "electronic_spatial_extent": 19.0002,
    "heat_capacity": 6.002,
    "rotational_constant_A": 799.58812,
    "rotational_constant_B": 437.90386,
    "rotational_constant_C": 282.94545,
}
IN_EV = IN_HARTREE | {
    "energy_U0": -76.404702 * HARTREE,
    "energy_U": WATER["internal_energy"],
    "enthalpy_H": WATER["enthalpy"],
    "free_energy": WATER["free_energy"],
    "zpve": WATER["zpve"],
    "homo": WATER["homo"],
    "lumo": WATER["lumo"],
    "gap": WATER["gap"],
    "dipole_moment": WATER["dipole_moment"],
    "isotropic_polarizability": WATER["polarizability"],
    "electronic_spatial_extent": WATER["electronic_spatial_extent"],
}
NAMED = {
    **dict.fromkeys(IN_HARTREE, "Ha"),
    "dipole_moment": "Debye",
    "isotropic_polarizability": "a0 a0 a0",
    "electronic_spatial_extent": "a0 a0",
    "heat_capacity": "cal/mol/K",
    "rotational_constant_A": "GHz",
    "rotational_constant_B": "GHz",
    "rotational_constant_C": "GHz",
}


def read(path, report=None, **options):
    with qm9.Reader(path, **options) as source:
        return list(source.read(range(len(source)), report or ReadReport()))


def archive(folder, molecules=sample_files.MOLECULES):
    return sample_files.write_archive(folder / "dsgdb9nsd.xyz.tar.bz2", molecules)


def database(path, *rows, metadata=None, as_text=False):
    """Write an ASE database of waters. `as_text` stores arrays as in older SchNetPack files."""
    with ase.db.connect(path) as db:
        for values in rows:
            data = {k: np.array([v]) for k, v in values.items()}
            if as_text:
                data = {
                    k: v
                    for name, array in data.items()
                    for k, v in (
                        (name, base64.b64encode(array.tobytes()).decode()),
                        (f"_shape_{name}", [1]),
                        (f"_dtype_{name}", "float64"),
                    )
                }
            db.write(WATER_ATOMS, data=data)
        if metadata:
            db.metadata = metadata
    return path


def check_water(s, molecule):
    np.testing.assert_array_equal(s.numbers, [8, 1, 1])
    np.testing.assert_allclose(s.positions, WATER_ATOMS.positions, atol=1e-8)
    assert (
        s.energy == pytest.approx(-76.404702 * HARTREE, rel=1e-7)
        and s.forces is None
        and s.charge == 0
    )
    assert {k: s.properties[k] for k in WATER} == pytest.approx(WATER, rel=1e-6)
    np.testing.assert_allclose(
        s.properties["rotational_constants"], [799.58812, 437.90386, 282.94545]
    )
    assert s.molecule == molecule and set(s.properties) == {*WATER, "rotational_constants"}


def test_archive(tmp_path):
    path, _ = sample_files.make(tmp_path)
    report = ReadReport()
    structures = read(path, report)
    assert [s.molecule for s in structures] == ["C", "O", "[CH]=[CH]", "C#N"]
    assert (
        report.records == 5 and report.structures == 4 and report.skipped == {"uncharacterized": 1}
    )
    assert report.identities == [("uncharacterized", "dsgdb9nsd.xyz.tar.bz2:dsgdb9nsd_000002.xyz")]
    methane, water, acetylene, _ = structures
    check_water(water, "O")
    assert water.source == "dsgdb9nsd.xyz.tar.bz2:dsgdb9nsd_000003.xyz" and water.record == 2
    np.testing.assert_array_equal(
        water.atom_properties["mulliken_charges"], [-0.589706, 0.294853, 0.294853]
    )
    assert methane.energy == pytest.approx(-1101.48779, abs=1e-4) and methane.smiles == "C"
    # numbers as Mathematica writes them
    np.testing.assert_allclose(acetylene.positions[:, 1], [1.2e-6, 0, -3e-7, 0])
    assert acetylene.properties["dipole_moment"] == pytest.approx(1.5e-4 * DEBYE, rel=1e-6)
    assert acetylene.atom_properties["mulliken_charges"][3] == pytest.approx(0.207019)
    assert acetylene.smiles == "[CH]=[CH]"  # that of the minimum, not that it was started from


def test_level_of_theory_and_atom_energies(tmp_path):
    path, _ = sample_files.make(tmp_path)
    with qm9.Reader(path) as source:
        assert source.sequential and not source.notes
        assert [f.name for f in source.files()] == [path.name, "uncharacterized.txt"]
        assert source.atom_energies == pytest.approx(
            {
                "H": -0.500273 * HARTREE,
                "C": -37.846772 * HARTREE,
                "N": -54.583861 * HARTREE,
                "O": -75.064579 * HARTREE,
                "F": -99.718730 * HARTREE,
            },
            rel=1e-7,
        )


def test_uncharacterized_molecules(tmp_path):
    path, _ = sample_files.make(tmp_path)
    with qm9.Reader(path, keep_uncharacterized=True) as source:
        assert len(list(source)) == 5 and not source.notes
    listed = (tmp_path / "uncharacterized.txt").rename(tmp_path / "other.txt")
    with qm9.Reader(path) as source:
        assert (
            len(list(source)) == 5
            and "uncharacterized.txt is missing next to the data" in source.notes[0]
        )
    assert len(read(path, uncharacterized=listed)) == 4
    with pytest.raises(
        DatasetError, match="nowhere.txt: the list of uncharacterized molecules cannot be read"
    ):
        qm9.Reader(path, uncharacterized=tmp_path / "nowhere.txt")
    listed.write_text("3 molecules\n")
    with pytest.raises(DatasetError, match="other.txt: contains no rows"):
        qm9.Reader(path, uncharacterized=listed)


def test_text_in_the_list_is_ignored(tmp_path):
    path, _ = sample_files.make(tmp_path)  # the header of its list has a line that begins with 5
    assert "\n5 different" in sample_files.UNCHARACTERIZED
    assert "C#N" in {s.molecule for s in read(path)}


def test_archive_is_read_in_order_and_can_restart(tmp_path):
    path = archive(tmp_path)
    with qm9.Reader(path) as source:
        actual = [
            s.record
            for r in (range(0, 2), range(2, 3), range(4, 5), range(1, 3))
            for s in source.read(r, ReadReport())
        ]
        assert actual == [0, 1, 2, 4, 1, 2] and len(source) == 5
        with pytest.raises(DatasetError, match="ends after 5 molecules"):
            list(source.read(range(4, 7), ReadReport()))


def test_folder(tmp_path):
    with tarfile.open(archive(tmp_path)) as tar:
        tar.extractall(tmp_path / "qm9", filter="data")
    (tmp_path / "qm9" / "readme.txt").write_text("see the paper")
    (tmp_path / "uncharacterized.txt").write_text(sample_files.UNCHARACTERIZED)
    assert qm9.Reader.matches(tmp_path / "qm9")
    structures = read(tmp_path / "qm9")
    assert [s.molecule for s in structures] == ["C", "O", "[CH]=[CH]", "C#N"]
    check_water(structures[1], "O")
    with qm9.Reader(tmp_path / "qm9") as source:
        assert len(source) == 5 and not source.sequential and len(source.files()) == 6


def test_extended_xyz():
    assert qm9.Reader.matches(XYZ)
    structures = read(XYZ)
    assert [len(s) for s in structures] == [5, 4, 3, 4] and [s.record for s in structures] == [
        0,
        1,
        2,
        3,
    ]
    check_water(structures[2], "qm9_first.xyz:2")
    assert structures[3].properties["rotational_constants"][0] == 0
    with qm9.Reader(XYZ) as source:
        assert "does not contain the indices" in source.notes[0]
    with pytest.raises(DatasetError, match="does not contain the indices.*Give the archive"):
        qm9.Reader(XYZ, uncharacterized="uncharacterized.txt")


def test_extended_xyz_with_other_columns_and_missing_labels(tmp_path):
    path = tmp_path / "a.xyz"
    path.write_text(
        '2\nProperties=charges:R:1:species:S:1:pos:R:3 U0=-1.17 alpha=1. zpve=0.01 Cv=5. x="a b"\n'
        "0.5 H 0 0 0\n0.5 H 0 0 0.74\n"
    )
    (only,) = read(path)
    np.testing.assert_array_equal(only.positions, [[0, 0, 0], [0, 0, 0.74]])
    assert only.energy == pytest.approx(-1.17 * HARTREE) and np.isnan(only.properties["homo"])
    assert np.isnan(only.properties["rotational_constants"]).all()


@pytest.mark.parametrize(
    ("values", "metadata", "as_text"),
    [
        (IN_EV, None, True),
        (IN_EV, None, False),
        (IN_HARTREE, None, False),
        (IN_HARTREE, None, True),
        (IN_HARTREE, {"_property_unit_dict": NAMED, "_distance_unit": "Ang"}, False),
    ],
)
def test_database(tmp_path, values, metadata, as_text):
    path = database(tmp_path / "qm9.db", values, values, metadata=metadata, as_text=as_text)
    assert qm9.Reader.matches(path)
    first, second = read(path)
    check_water(first, "qm9.db:1")
    check_water(second, "qm9.db:2")


def test_database_with_few_labels(tmp_path):
    first, second = read(
        database(tmp_path / "qm9.db", {"energy_U0": np.nan}, {"energy_U0": -76.404702 * HARTREE})
    )
    assert np.isnan(first.energy) and second.energy == pytest.approx(-76.404702 * HARTREE, rel=1e-9)
    assert (
        np.isnan(second.properties["homo"])
        and np.isnan(second.properties["rotational_constants"]).all()
    )


def test_units_of_a_database_by_option(tmp_path):
    path = database(tmp_path / "qm9.db", IN_HARTREE)
    check_water(read(path, db_units="hartree")[0], "qm9.db:1")
    with pytest.raises(
        DatasetError, match="qm9.db:1: U0 of -76.4047 eV is .* relative to the isolated atoms"
    ):
        read(path, db_units="eV")
    for value in ("kcal", 1.0):
        with pytest.raises(ConfigError, match="db_units.*(hartree|'hartree')"):
            read(path, db_units=value)
    for option, value in (
        ("keep_uncharacterized", "yes"),
        ("keep_uncharacterized", 1),
        ("uncharacterized", 7),
    ):
        with pytest.raises(ConfigError, match=f"reader option {option} must be"):
            read(path, **{option: value})
    named = database(tmp_path / "named.db", IN_HARTREE, metadata={"_property_unit_dict": NAMED})
    with pytest.raises(DatasetError, match="states its units.*remove db_units='eV'"):
        read(named, db_units="eV")


def test_invalid_units_of_a_database_are_rejected(tmp_path):
    atomisation = database(tmp_path / "a.db", {"energy_U0": -9.24})
    with pytest.raises(
        DatasetError,
        match="a.db: states no units, and energy_U0 of row 1, -9.24, is not a total energy",
    ):
        read(atomisation)
    lying = database(tmp_path / "b.db", IN_EV, metadata={"_property_unit_dict": NAMED})
    with pytest.raises(DatasetError, match="b.db:1: U0 of .* relative to the isolated atoms"):
        read(lying)
    mixed = database(tmp_path / "c.db", IN_EV, IN_HARTREE)
    with pytest.raises(
        DatasetError, match="c.db:2: U0 of .* another unit than the rest of the file"
    ):
        read(mixed)
    unknown = database(
        tmp_path / "d.db", IN_EV, metadata={"_property_unit_dict": {"energy_U0": "furlong"}}
    )
    with pytest.raises(
        DatasetError, match="d.db: the unit of energy_U0 is 'furlong', expected one of ev"
    ):
        read(unknown)
    partly = database(
        tmp_path / "e.db", IN_EV, metadata={"_property_unit_dict": {"energy_U0": "eV"}}
    )
    with pytest.raises(
        DatasetError, match="e.db:1: the database has .*, but its metadata state no unit for it"
    ):
        read(partly)
    nothing = database(tmp_path / "f.db", {"energy_U0": np.nan})
    with pytest.raises(
        DatasetError, match="f.db: states no units, and its first rows have no energy_U0.*db_units"
    ):
        read(nothing)


def test_distances_of_a_database_in_bohr(tmp_path):
    path = database(
        tmp_path / "a.db",
        IN_HARTREE,
        metadata={"_property_unit_dict": NAMED, "_distance_unit": "Bohr"},
    )
    np.testing.assert_allclose(read(path)[0].positions, WATER_ATOMS.positions * BOHR, rtol=1e-7)


def test_other_databases_and_files_are_rejected(tmp_path):
    other = tmp_path / "other.db"
    with ase.db.connect(other) as db:
        db.write(WATER_ATOMS, data={"energy": np.array([-76.0])}, moses_id=1)
    plain = tmp_path / "plain.xyz"
    plain.write_text("1\nenergy=-1.0 U0=3\nH 0 0 0\n")
    foreign = tmp_path / "foreign.tar.bz2"
    with tarfile.open(foreign, "w:bz2") as tar:
        tar.add(plain, "plain.xyz")
    for path in (other, plain, foreign, tmp_path):
        assert not qm9.Reader.matches(path)
        with pytest.raises(DatasetError, match=f"{path.name}: has none of QM9's formats"):
            qm9.Reader(path)


@pytest.mark.parametrize("keep", [3, 60, 0.5, 0.99])
def test_truncated_archive_is_rejected(tmp_path, keep):
    rng = np.random.default_rng(
        0
    )  # noise in a field that is not read, so that the archive has several blocks
    many = [
        sample_files.WATER.replace("gdb 3\t", f"gdb {i}\t")
        + "".join(map(chr, rng.integers(48, 122, 20_000)))
        for i in range(1, 101)
    ]
    path = archive(tmp_path, many)
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep > 1 else int(keep * len(content))])
    with pytest.raises(
        DatasetError, match=r"dsgdb9nsd\.xyz\.tar\.bz2.*(truncated|none of QM9's formats)"
    ):
        read(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gdb 3", "gdb 4", "line 2 begins with 'gdb' '4', expected 'gdb' and the index 3"),
        ("\t6.002", "", "expected 17 columns, found 16"),
        ("0.0205721989", "0.02o5", "'0.02o5' is not a number"),
        ("O\t-0.03", "Q\t-0.03", "'Q' is not the symbol"),
        ("3\ngdb", "30\ngdb", "has 9 lines, expected 35"),
        ("3\ngdb", "three\ngdb", "expected a number of atoms"),
        ("-76.404702", "-2079.08", "relative to the isolated atoms"),
    ],
)
def test_corrupted_molecules_are_identified(tmp_path, old, new, message):
    folder = tmp_path / "qm9"
    folder.mkdir()
    assert sample_files.WATER.count(old) == 1
    (folder / "dsgdb9nsd_000001.xyz").write_text(sample_files.METHANE)
    (folder / "dsgdb9nsd_000003.xyz").write_text(sample_files.WATER.replace(old, new))
    with pytest.raises(DatasetError, match=f"qm9:dsgdb9nsd_000003.xyz: .*{message}"):
        read(folder)


def test_positions_that_are_not_finite_are_skipped_and_counted(tmp_path):
    report = ReadReport()
    path = archive(
        tmp_path, [sample_files.METHANE, sample_files.WATER.replace("0.0205721989", "nan")]
    )
    assert len(read(path, report)) == 1 and report.skipped == {"positions not finite": 1}


@pytest.mark.parametrize(
    ("keep", "message"),
    [(-60, "truncated within the molecule"), (350, "(truncated within|none of)")],
)
def test_truncated_extended_xyz_is_rejected(tmp_path, keep, message):
    path = tmp_path / "cut.xyz"
    path.write_text(XYZ.read_text()[:keep])
    with pytest.raises(DatasetError, match=f"cut.xyz.*{message}"):
        read(path)


def test_corrupted_extended_xyz_is_rejected(tmp_path):
    path = tmp_path / "bad.xyz"
    path.write_text(XYZ.read_text().replace("\n4\n", "\nfour\n", 1))
    with pytest.raises(DatasetError, match="bad.xyz:1: expected a number of atoms, found b'four"):
        read(path)
    path.write_text(XYZ.read_text().replace("O       -0.03", "O  1.0  -0.03"))
    with pytest.raises(DatasetError, match="bad.xyz:2: expected 4 columns, found 5"):
        read(path)


def test_corrupted_database_is_rejected(tmp_path):
    path = database(tmp_path / "a.db", IN_EV, IN_EV)
    shutil.copy(path, tmp_path / "cut.db")
    (tmp_path / "cut.db").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DatasetError, match="cut.db"):
        read(tmp_path / "cut.db")
    connection = sqlite3.connect(path)
    connection.execute(
        "UPDATE systems SET data = ? WHERE id = 2", (json.dumps({"energy_U0": [1.0, 2.0]}),)
    )
    connection.commit()
    connection.close()
    with pytest.raises(DatasetError, match="a.db:2: energy_U0 has shape .*expected one number"):
        read(path)


def write_members(path, *members):
    with tarfile.open(path, "w:bz2") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_decompression_bombs_are_rejected(tmp_path):
    """A few kB can expand to a header or a molecule of many MB."""
    first = ("dsgdb9nsd_000001.xyz", sample_files.METHANE.encode())
    long = tarfile.TarInfo("x")
    long.type, long.size = tarfile.XHDTYPE, 2**31
    path = tmp_path / "a.tar.bz2"
    path.write_bytes(bz2.compress(long.tobuf() + bytes(2**25)))
    huge = write_members(tmp_path / "b.tar.bz2", ("dsgdb9nsd_000001.xyz", bytes(2**25)))
    later = write_members(tmp_path / "c.tar.bz2", first, ("dsgdb9nsd_000002.xyz", bytes(2**25)))
    comment = b"60000 comment=" + b"x" * (60_000 - 15) + b"\n"
    long.size = len(comment)
    between = tmp_path / "d.tar.bz2"
    sound = bz2.decompress(write_members(tmp_path / "e.tar.bz2", first).read_bytes())[: 512 * 3]
    between.write_bytes(
        bz2.compress(
            sound + long.tobuf() + comment + bytes(-len(comment) % 512) + sound + bytes(1024)
        )
    )
    tracemalloc.start()
    try:
        for file in (path, huge):
            assert qm9.Reader.matches(file) is False
            with pytest.raises(
                DatasetError, match=f"{file.name}: (cannot be read|has none of QM9's formats)"
            ):
                qm9.Reader(file)
        with (
            qm9.Reader(later) as source,
            pytest.raises(DatasetError, match="c.tar.bz2.*33554432 bytes, more than any mol"),
        ):
            list(source.read(range(2), ReadReport()))
        with (
            qm9.Reader(between) as source,
            pytest.raises(DatasetError, match="d.tar.bz2: .*bytes of headers before a"),
        ):
            list(source.read(range(2), ReadReport()))
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_other_members_of_the_archive_are_skipped(tmp_path):
    """Their size does not matter."""
    path = write_members(
        tmp_path / "a.tar.bz2",
        ("dsgdb9nsd_000001.xyz", sample_files.METHANE.encode()),
        ("notes", bytes(10**6)),
        ("dsgdb9nsd_000002.xyz", sample_files.AMMONIA.encode()),
    )
    assert [s.molecule for s in read(path)] == ["C", "N"]


@pytest.mark.parametrize("number", [0, 119])
def test_invalid_elements_are_rejected(tmp_path, number):
    path = database(tmp_path / "a.db", IN_HARTREE)
    with sqlite3.connect(path) as connection:
        connection.execute(
            "UPDATE systems SET numbers = ?", (np.array([number, 1, 1], np.int32).tobytes(),)
        )
    with pytest.raises(DatasetError, match=f"a.db:1: {number} is not an atomic number"):
        read(path, db_units="hartree")
