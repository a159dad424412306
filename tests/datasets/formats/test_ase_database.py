"""Tests for rows of ASE databases against ASE itself, and for corrupted files."""

import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect

from mlip_jax.datasets.formats.ase_database import AseDatabase, decode, is_ase_database
from mlip_jax.datasets.reader import DatasetError

# Cut from ∇²DFT's test database (MIT): four rows, ids 4 to 72 with gaps.
GENUINE = Path(__file__).parents[2] / "data" / "readers" / "nabladft" / "test_database.db"


@pytest.fixture
def database_path(tmp_path):
    """A database written by ASE with everything that a row can have."""
    rng = np.random.default_rng(0)
    path = tmp_path / "made #1?.db"
    with connect(path) as database:
        database.metadata = {"unit": "eV"}
        for n in range(2, 7):
            atoms = Atoms(
                rng.integers(1, 10, n),
                rng.normal(size=(n, 3)),
                cell=rng.normal(size=(3, 3)),
                pbc=[n % 2, 0, 1],
            )
            atoms.set_initial_charges(rng.normal(size=n))
            atoms.calc = SinglePointCalculator(
                atoms,
                energy=rng.normal(),
                forces=rng.normal(size=(n, 3)),
                dipole=rng.normal(size=3),
                stress=rng.normal(size=6),
            )
            database.write(
                atoms,
                name=f"m{n}",
                weight=n / 2,
                data={
                    "table": rng.normal(size=(n, 2)),
                    "counts": np.arange(n),
                    "nested": {"a": [1, 2.5, "x"]},
                    "no": None,
                },
            )
    return path


def test_agrees_with_ase(database_path):
    with AseDatabase(database_path) as database, connect(database_path) as ase_database:
        expected = list(ase_database.select())
        rows = list(database.rows(range(len(database))))
        assert (
            len(rows) == len(expected) == 5
            and database.metadata == {"unit": "eV"}
            and database.version == 9
        )
        for row, ase_row in zip(rows, expected):
            assert row.id == ase_row.id and row.key_value_pairs == ase_row.key_value_pairs
            for name in ("numbers", "positions", "cell", "pbc"):
                np.testing.assert_array_equal(getattr(row, name), getattr(ase_row, name))
            assert row.charge == pytest.approx(ase_row.charge)
            assert row.results.keys() == {"energy", "forces", "dipole", "stress"}
            for name, value in row.results.items():
                np.testing.assert_array_equal(value, ase_row[name])
            assert row.data["nested"] == {"a": [1, 2.5, "x"]} and row.data["no"] is None
            for name in ("table", "counts"):
                np.testing.assert_array_equal(row.data[name], ase_row.data[name])
                assert row.data[name].dtype == ase_row.data[name].dtype


def test_ids_with_gaps_and_ranges():
    with AseDatabase(GENUINE) as database:
        assert [r.id for r in database.rows(range(4))] == [4, 27, 56, 72]
        assert [r.id for r in database.rows(range(1, 3))] == [27, 56]
        assert [r.id for r in database.rows(range(0, 4, 2))] == [4, 56]
        assert list(database.rows(range(2, 2))) == []
        with pytest.raises(IndexError, match="within the 4 rows"):
            list(database.rows(range(3, 5)))


def test_json_data_of_older_files():
    array = np.array([[1.5, -2.0], [0.25, 3.0]])
    text = json.dumps(
        {
            "a": {"__ndarray__": [[2, 2], "float64", array.ravel().tolist()]},
            "z": {"__complex__": [1, 2]},
        }
    )
    decoded = decode(text)
    np.testing.assert_array_equal(decoded["a"], array)
    assert decoded["z"] == 1 + 2j and decode(None) == decode("null") == decode("{}") == {}


def test_arrays_as_base64_of_older_schnetpack_files():
    decoded = decode(
        '{"energy_U0": "CF0+f/M1kcA=", "_shape_energy_U0": [1], "_dtype_energy_U0": "float64"}'
    )
    assert decoded.keys() == {"energy_U0"} and decoded["energy_U0"].shape == (1,)
    assert decoded["energy_U0"][0] == pytest.approx(-1101.48779, abs=1e-5)  # CH4 in eV
    with pytest.raises(ValueError, match="base64"):
        decode('{"e": "!!!", "_shape_e": [1], "_dtype_e": "float64"}')


@pytest.mark.parametrize(
    ("stored", "problem"),
    [
        (b"\xff" * 20, "end at byte"),
        ((8).to_bytes(8, "little") + b"[1]", "mapping"),
        ((8).to_bytes(8, "little") + b'{"a": {"__ndarray__": [[4], "float64", 8]}}', "is outside"),
        ('{"a": {"__ndarray__": [[1], "object", ["x"]]}}', "not an array of numbers"),
        ("{", "Expecting"),
    ],
)
def test_corrupted_data_are_rejected(stored, problem):
    with pytest.raises((ValueError, TypeError), match=problem):
        decode(stored)


def test_other_ase_objects_are_not_created():
    """ASE would look up a class by the name in the file."""
    value = {"a": {"__ase_objtype__": "cell", "array": [1]}}
    assert decode(json.dumps(value)) == value


@pytest.mark.parametrize("keep", [0, 10, 50, 100, 512, 5000, 12799])
def test_truncated(tmp_path, keep):
    path = tmp_path / "cut.db"
    path.write_bytes(GENUINE.read_bytes()[:keep])
    with pytest.raises(DatasetError, match=r"cut\.db: .*(truncated|not an SQLite)"):
        AseDatabase(path)


@pytest.mark.parametrize("start", [1024, 4096, 8192])
def test_overwritten_pages_are_detected(tmp_path, start):
    path = tmp_path / "bad.db"
    content = bytearray(GENUINE.read_bytes())
    content[start : start + 2048] = b"\xee" * 2048
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"bad\.db"):
        with AseDatabase(path) as database:
            list(database.rows(range(len(database))))


def test_inconsistent_row_is_identified(tmp_path):
    path = tmp_path / "a.db"
    shutil.copyfile(GENUINE, path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE systems SET natoms = natoms + 1 WHERE id = 27")
    connection.close()
    with AseDatabase(path) as database:
        rows = database.rows(range(4))
        assert next(rows).id == 4
        with pytest.raises(
            DatasetError, match=r"a\.db:27: the row is corrupted \(\d+ numbers and \d+ positions"
        ):
            next(rows)


def test_other_sqlite_files_are_rejected(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE systems (a)")
    connection.close()
    assert not is_ase_database(path) and not is_ase_database(tmp_path) and is_ase_database(GENUINE)
    with pytest.raises(
        DatasetError,
        match=r"other\.db: .*without the tables of an ASE database; found \['systems'\]",
    ):
        AseDatabase(path)


def test_other_versions_are_rejected(tmp_path):
    path = tmp_path / "new.db"
    shutil.copyfile(GENUINE, path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE information SET value = '10' WHERE name = 'version'")
    connection.close()
    with pytest.raises(DatasetError, match="version 10, expected 5 to 9"):
        AseDatabase(path)


@pytest.fixture
def connections(monkeypatch):
    """Return a list that receives each new connection of SQLite."""
    opened, connect = [], sqlite3.connect

    def recorded(*args, **kwargs):
        opened.append(connect(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", recorded)
    return opened


def test_nothing_is_written(tmp_path, connections):
    """A file on a read-only medium gets no lock, no journal and no change."""
    path = tmp_path / "a.db"
    shutil.copyfile(GENUINE, path)
    before = path.read_bytes()
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        with AseDatabase(path) as database:
            list(database.rows(range(4)))
            (connection,) = connections
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                connection.execute("DELETE FROM systems")
            assert [p.name for p in tmp_path.iterdir()] == ["a.db"]
    finally:
        tmp_path.chmod(0o755)
    assert path.read_bytes() == before


def test_rows_in_a_write_ahead_log_are_read(tmp_path, connections):
    path = tmp_path / "a.db"
    shutil.copyfile(GENUINE, path)
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("DELETE FROM systems WHERE id = 4")
    try:
        assert (tmp_path / "a.db-wal").stat().st_size
        with AseDatabase(path) as database:
            assert [r.id for r in database.rows(range(len(database)))] == [27, 56, 72]
            _, connection = connections
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                connection.execute("DELETE FROM systems")
    finally:
        writer.close()
