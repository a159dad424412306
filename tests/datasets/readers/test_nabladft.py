"""Tests for the ∇²DFT reader: total energies, sign of forces, and the table of orbitals."""

import json
import shutil
import sqlite3
from pathlib import Path

import ase.db
import numpy as np
import pytest

from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.readers import nabladft

# Cut from ∇²DFT's test database (MIT): four rows, ids 4, 27, 56 and 72.
GENUINE = Path(__file__).parents[2] / "data" / "readers" / "nabladft" / "test_database.db"
HARTREE, BOHR = 27.211386245988, 0.529177210903
DEBYE = 0.20819433442462576  # e·Å
HEADER = (
    ",MOSES id,CONFORMER id,archive name,DFT TOTAL ENERGY,DFT XC ENERGY,DFT NUCLEAR REPULSION "
    "ENERGY,DFT ONE-ELECTRON ENERGY,DFT TWO-ELECTRON ENERGY,DFT DIPOLE X,DFT DIPOLE Y,DFT DIPOLE "
    "Z,DFT TOTAL DIPOLE,DFT ROT CONSTANT A,DFT ROT CONSTANT B,DFT ROT CONSTANT C,DFT HOMO,DFT "
    "LUMO,DFT HOMO-LUMO GAP,DFT ATOMIC ENERGY,DFT FORMATION ENERGY,SMILES,SPLITS"
)


def read(path, records=None, report=None, **options):
    with nabladft.Reader(path, **options) as source:
        return list(
            source.read(range(len(source)) if records is None else records, report or ReadReport())
        )


def genuine_rows():
    with ase.db.connect(GENUINE) as database:
        return list(database.select()), database.metadata


def rewrite(path, metadata=None, rows=None):
    """Write the original rows with other metadata or rows: (Atoms, key-value pairs, data)."""
    genuine, original = genuine_rows()
    with ase.db.connect(path) as database:
        for row in genuine if rows is None else ():
            database.write(row.toatoms(), **row.key_value_pairs, data=row.data)
        for atoms, pairs, data in rows or ():
            database.write(atoms, **pairs, data=data)
        database.metadata = original if metadata is None else metadata
    return path


def line(index, row, total, *, homo=-0.31, lumo=0.017, dipole=4.2):
    pairs = row.key_value_pairs
    return (
        f"{index},{pairs['moses_id']},{pairs['conformation_id']},data/moses/archive_0.tar,"
        f"{total},-1,2,-3,4,1,2,3,"
        f'{dipole},.1,.2,.3,{homo},{lumo},{lumo - homo},-5,-6,"C,C",train_full'
    )


def total(row, metadata):
    """Return the total energy of a row (hartree)."""
    return float(row.data["energy"][0]) + sum(
        metadata["atomrefs"]["energy"][z] for z in row.numbers
    )


def test_equals_an_independent_parser():
    rows, metadata = genuine_rows()
    report = ReadReport()
    structures = read(GENUINE, report=report)
    assert len(structures) == len(rows) == report.structures == report.records == 4
    for record, (s, row) in enumerate(zip(structures, rows)):
        np.testing.assert_array_equal(s.numbers, row.numbers)
        np.testing.assert_array_equal(s.positions, row.positions)
        assert s.energy == pytest.approx(total(row, metadata) * HARTREE, rel=1e-6)
        np.testing.assert_allclose(s.forces, row.data["forces"] * HARTREE, rtol=1e-6)
        assert (
            s.molecule == s.smiles == row.key_value_pairs["smiles"]
            and s.charge == 0
            and s.cell is None
        )
        assert (
            s.record == record and s.source == f"test_database.db:{row.id}" and s.properties == {}
        )


def test_energies_are_total():
    """One carbon atom has -1029 eV. Energies minus the atoms would be a hundred times too small."""
    for s in read(GENUINE):
        carbons = int((s.numbers == 6).sum())
        assert s.energy < carbons * -1028.5
        atoms = {
            1: -13.674,
            6: -1028.54,
            7: -1483.63,
            8: -2040.22,
            9: -2710.65,
            16: -10829.4,
            17: -12516.9,
        }
        bound = s.energy - sum(atoms[z] for z in s.numbers.tolist())
        assert -8 < bound / len(s) < -2  # eV per atom that hold a molecule together


def test_atom_energies_are_stated():
    with nabladft.Reader(GENUINE) as source:
        atoms = source.atom_energies
        assert atoms["H"] == pytest.approx(-0.5024932583661139 * HARTREE, rel=1e-6)
        assert atoms["I"] == pytest.approx(-297.7564286148722 * HARTREE, rel=1e-6)
        assert set(atoms) == {"H", "C", "N", "O", "F", "P", "S", "Cl", "Br", "I"}
        assert source.level_of_theory == "ωB97X-D/def2-SVP"


def test_forces_are_forces_and_not_gradients():
    """Forces have the direction of GFN2-xTB's forces, and their size in hartree/Å."""
    tblite = pytest.importorskip("tblite.interface")
    for s in read(GENUINE, range(2)):
        calculator = tblite.Calculator("GFN2-xTB", s.numbers, s.positions / BOHR)
        calculator.set("verbosity", 0)
        other = -np.array(calculator.singlepoint().get("gradient")) * HARTREE / BOHR
        assert (s.forces * other).sum() > 0.8 * np.linalg.norm(s.forces) * np.linalg.norm(other)
        assert (
            0.75 < np.linalg.norm(s.forces) / np.linalg.norm(other) < 1.5
        )  # per bohr it would be half, or twice


def test_published_atom_energies_without_metadata(tmp_path):
    """Some released files state only units. Then the constants of the data set are used."""
    _, metadata = genuine_rows()
    path = rewrite(tmp_path / "a.db", {k: v for k, v in metadata.items() if k != "atomrefs"})
    for a, b in zip(read(path), read(GENUINE), strict=True):
        assert a.energy == pytest.approx(b.energy, rel=1e-12)
    with nabladft.Reader(path) as a, nabladft.Reader(GENUINE) as b:
        assert a.atom_energies == pytest.approx(b.atom_energies)


def test_total_energies_are_not_changed(tmp_path):
    rows, metadata = genuine_rows()
    path = rewrite(
        tmp_path / "a.db",
        rows=[
            (
                row.toatoms(),
                row.key_value_pairs,
                {"energy": [total(row, metadata)], "forces": row.data["forces"]},
            )
            for row in rows
        ],
    )
    for a, b in zip(read(path), read(GENUINE), strict=True):
        assert a.energy == pytest.approx(b.energy, rel=1e-12)


def test_mixed_and_unlikely_energies_are_rejected(tmp_path):
    rows, metadata = genuine_rows()
    for name, energy, message in (
        ("mixed", total(rows[1], metadata), "includes the isolated atoms, unlike the first energy"),
        ("ev", total(rows[1], metadata) * HARTREE, "expected the total energy.*Check its unit"),
    ):
        path = rewrite(
            tmp_path / f"{name}.db",
            rows=[
                (row.toatoms(), row.key_value_pairs, row.data | ({"energy": [energy]} if i else {}))
                for i, row in enumerate(rows[:2])
            ],
        )
        with pytest.raises(DatasetError, match=rf"{name}\.db:2: .*{message}"):
            read(path)


@pytest.mark.parametrize(
    ("name", "unit"), [("energy", "eV"), ("forces", "eV/Ang"), ("distance", "Bohr")]
)
def test_other_units_are_rejected(tmp_path, name, unit):
    metadata = json.loads(json.dumps(genuine_rows()[1]))
    if name == "distance":
        metadata["_distance_unit"] = unit
    else:
        metadata["_property_unit_dict"][name] = unit
    with pytest.raises(DatasetError, match=f"{name} is in '{unit}', expected"):
        nabladft.Reader(rewrite(tmp_path / "a.db", metadata))


def test_element_without_an_atom_energy_is_rejected(tmp_path):
    metadata = json.loads(json.dumps(genuine_rows()[1]))
    metadata["atomrefs"]["energy"][6] = 0.0
    with pytest.raises(
        DatasetError, match=r"a\.db:1: the energy of an isolated C atom is unknown.*H, N, O"
    ):
        nabladft.Reader(rewrite(tmp_path / "a.db", metadata))


def test_missing_labels_are_nan(tmp_path):
    rows, _ = genuine_rows()
    path = rewrite(
        tmp_path / "a.db",
        rows=[
            (
                rows[0].toatoms(),
                {k: v for k, v in rows[0].key_value_pairs.items() if k != "smiles"},
                {"energy": [float("nan")]},
            ),
            (rows[1].toatoms(), rows[1].key_value_pairs, rows[1].data),
        ],
    )
    first, second = read(path)
    assert (
        np.isnan(first.energy)
        and np.isnan(first.forces).all()
        and first.forces.shape == first.positions.shape
    )
    assert first.smiles == "" and first.molecule == f"moses {rows[0].key_value_pairs['moses_id']}"
    assert np.isfinite(second.energy)


def test_positions_that_are_not_finite_are_skipped(tmp_path):
    rows, _ = genuine_rows()
    broken = rows[1].toatoms()
    broken.positions[0, 0] = np.nan
    path = rewrite(
        tmp_path / "a.db",
        rows=[
            (rows[0].toatoms(), rows[0].key_value_pairs, rows[0].data),
            (broken, rows[1].key_value_pairs, rows[1].data),
        ],
    )
    report = ReadReport()
    assert [s.record for s in read(path, report=report)] == [0]
    assert report.records == 2 and report.identities == [("positions not finite", "a.db:2")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forces": np.zeros((2, 3))}, "forces have shape"),
        ({"energy": [1.0, 2.0]}, "energy has 2 values"),
        ({"energy": "low"}, "energy is not numeric"),
    ],
)
def test_invalid_labels_are_rejected(tmp_path, change, message):
    rows, _ = genuine_rows()
    path = rewrite(
        tmp_path / "a.db",
        rows=[
            (rows[0].toatoms(), rows[0].key_value_pairs, rows[0].data),
            (rows[1].toatoms(), rows[1].key_value_pairs, rows[1].data | change),
        ],
    )
    with pytest.raises(DatasetError, match=rf"a\.db:2: {message}"):
        read(path)


def test_other_databases_are_not_detected(tmp_path):
    rows, _ = genuine_rows()
    path = rewrite(
        tmp_path / "a.db",
        metadata={},
        rows=[(rows[0].toatoms(), {"name": "x"}, {"energy_U0": [1.0]})],
    )
    assert not nabladft.Reader.matches(path) and nabladft.Reader.matches(GENUINE)
    with pytest.raises(
        DatasetError, match=r"a\.db:1: expected 'moses_id'.*found keys \['name'\].*energy_U0"
    ):
        nabladft.Reader(path)


@pytest.mark.parametrize("keep", [0, 50, 3000, 12000])
def test_truncated(tmp_path, keep):
    path = tmp_path / "cut.db"
    path.write_bytes(GENUINE.read_bytes()[:keep])
    assert not nabladft.Reader.matches(path)
    with pytest.raises(DatasetError, match=r"cut\.db"):
        read(path)


@pytest.fixture
def with_summary(tmp_path):
    """The original database with a table that lacks its third row and has other rows around it."""
    path = tmp_path / "a.db"
    shutil.copyfile(GENUINE, path)
    rows, metadata = genuine_rows()
    lines = [
        line(
            i, row, total(row, metadata), homo=-0.31 - i / 100, lumo=0.017 + i / 100, dipole=4.2 + i
        )
        for i, row in enumerate(rows)
        if i != 2
    ]
    near = rows[2].key_value_pairs
    rest = "a,-1,,,,,,,,,,,,-9,-9,0,,,C,train_full"
    lines += [
        f"9,{near['moses_id']},{near['conformation_id'] + 1},{rest}",
        f"8,{near['moses_id'] + 1},{near['conformation_id']},{rest}",
    ]
    (tmp_path / "summary.csv").write_text("\n".join([HEADER, *lines[::-1]]) + "\n")
    return path


def test_orbitals_from_the_summary(with_summary):
    structures = read(with_summary)
    for i in (0, 1, 3):
        p = structures[i].properties
        assert p["homo"] == pytest.approx((-0.31 - i / 100) * HARTREE, rel=1e-6)
        assert p["lumo"] == pytest.approx((0.017 + i / 100) * HARTREE, rel=1e-6)
        assert p["gap"] == pytest.approx((0.327 + i / 50) * HARTREE, rel=1e-6)
        assert p["dipole_moment"] == pytest.approx((4.2 + i) * DEBYE, rel=1e-6)
    assert structures[2].properties.keys() == structures[0].properties.keys()
    assert np.isnan(list(structures[2].properties.values())).all()
    with nabladft.Reader(with_summary) as source:
        assert [p.name for p in source.files()] == ["a.db", "summary.csv"]


def test_summary_is_an_option(with_summary, tmp_path):
    assert read(with_summary, summary="")[0].properties == {}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = (tmp_path / "summary.csv").rename(elsewhere / "table.csv")
    assert read(with_summary)[0].properties == {}
    assert read(with_summary, summary=str(moved))[0].properties["homo"] < -8
    for wrong in ("nowhere.csv", "summary.csv.gz"):
        with pytest.raises(DatasetError, match=f"{wrong}: no such uncompressed table"):
            nabladft.Reader(with_summary, summary=wrong)


def test_steps_of_an_optimization_have_no_orbitals(with_summary, tmp_path):
    rows, _ = genuine_rows()
    folder = tmp_path / "steps"
    folder.mkdir()
    path = rewrite(
        folder / "a.db",
        rows=[
            (
                rows[0].toatoms(),
                rows[0].key_value_pairs | ({"iteration": 1} if i else {}),
                rows[0].data,
            )
            for i in range(2)
        ],
    )
    first, second = read(path, summary=str(tmp_path / "summary.csv"))
    assert np.isfinite(first.properties["homo"]) and np.isnan(second.properties["homo"])


def test_summary_with_other_energies_is_rejected(with_summary, tmp_path):
    """The total energies of the table check the atom energies that are added."""
    rows, metadata = genuine_rows()
    (tmp_path / "summary.csv").write_text(
        f"{HEADER}\n{line(0, rows[0], total(rows[0], metadata) + 0.01)}\n"
    )
    with pytest.raises(
        DatasetError, match=r"a\.db:4: the total energy is .* but summary\.csv has .*MOSES id"
    ):
        read(with_summary)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no column 'MOSES id'"),
        ("a,b\n1,2\n", "no column 'MOSES id'.*'a', 'b'"),
        (HEADER.replace("DFT HOMO,", "HOMO,"), "no column 'DFT HOMO'"),
        (f"{HEADER}\n0,x,1,a\n", "line 2: expected the numbers"),
        (f"{HEADER}\n0,1\n", "line 2: expected the numbers"),
        (f"{HEADER}\n0,5,1,a\n1,5,1,a\n", "MOSES id 5, CONFORMER id 1 occurs twice"),
    ],
)
def test_corrupted_summaries_are_rejected(with_summary, tmp_path, content, message):
    (tmp_path / "summary.csv").write_text(content)
    with pytest.raises(DatasetError, match=rf"summary\.csv: .*{message}"):
        read(with_summary)


def test_truncated_line_of_the_summary(with_summary, tmp_path):
    rows, metadata = genuine_rows()
    (tmp_path / "summary.csv").write_text(
        f"{HEADER}\n{line(0, rows[0], total(rows[0], metadata))[:90]}"
    )
    with pytest.raises(
        DatasetError, match=r"summary\.csv: the line of a\.db:4 has no number for 'DFT"
    ):
        read(with_summary)


def test_rows_are_found_by_keys(with_summary):
    with sqlite3.connect(with_summary) as connection:
        connection.execute("UPDATE systems SET id = 100 - id")
    connection.close()
    homo = [s.properties["homo"] for s in read(with_summary)]
    assert homo[3] > homo[2] > homo[0] and np.isnan(homo[1])


def test_the_first_energy_decides_whether_atoms_are_subtracted(tmp_path):
    """A first row without energy used to be taken for one with subtracted atoms."""
    rows, metadata = genuine_rows()
    changed = []
    for i, row in enumerate(rows):
        energy = np.array([np.nan if i == 0 else total(row, metadata)])
        changed.append((row.toatoms(), row.key_value_pairs, row.data | {"energy": energy}))
    structures = read(rewrite(tmp_path / "a.db", rows=changed))
    assert np.isnan(structures[0].energy)
    assert structures[1].energy == pytest.approx(total(rows[1], metadata) * HARTREE, rel=1e-6)
