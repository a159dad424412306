"""Tests for the Molecule3D reader: SDF records, table, splits, and inconsistent files."""

import json

import numpy as np
import pytest

from mlip_jax.config import ConfigError
from mlip_jax.datasets.formats import molecule3d_files
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.readers import molecule3d

HARTREE, BOHR = 27.211386245988, 0.529177210903
DEBYE = 0.20819433442462576  # e·Å
FIRST, SECOND = "combined_mols_0_to_5.sdf", "combined_mols_5_to_8.sdf"
SPLITS = ["random_split_inds.json", "scaffold_split_inds.json"]


def read(path, records=None, report=None, **options):
    with molecule3d.Reader(path, **options) as source:
        return list(
            source.read(range(len(source)) if records is None else records, report or ReadReport())
        )


@pytest.fixture
def raw(sample, tmp_path):
    """Return a copy of the folder raw of the sample that tests can change."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for path in (sample("molecule3d")[0] / "raw").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def blocks(folder):
    return [
        b + "$$$$\n"
        for name in (FIRST, SECOND)
        for b in (folder / name).read_text().split("$$$$\n")[:-1]
    ]


def test_equals_an_independent_parser(raw):
    chem = pytest.importorskip("rdkit.Chem")
    supplied = [
        m
        for name in (FIRST, SECOND)
        for m in chem.SDMolSupplier(str(raw / name), removeHs=False, sanitize=False)
    ]
    table = [line.split(",") for line in (raw / "properties.csv").read_text().splitlines()[1:]]
    report = ReadReport()
    structures = read(raw, report=report)
    assert (
        len(structures) == len(supplied) == len(table) == report.records == report.structures == 8
    )
    for record, (s, molecule, cells) in enumerate(zip(structures, supplied, table)):
        x, y, z, homo, lumo, gap, energy = (float(c) for c in cells[1:])
        assert (
            s.record == record and s.conformer == 0 and s.molecule == cells[0] and s.forces is None
        )
        assert s.source == f"{FIRST if record < 5 else SECOND}:{record}"
        assert s.numbers.tolist() == [a.GetAtomicNum() for a in molecule.GetAtoms()]
        np.testing.assert_allclose(s.positions, molecule.GetConformer().GetPositions(), rtol=1e-6)
        assert s.charge == chem.GetFormalCharge(molecule)
        assert s.energy == pytest.approx(energy, rel=1e-12)
        assert s.properties["homo"] == pytest.approx(homo) and s.properties[
            "lumo"
        ] == pytest.approx(lumo)
        assert s.properties["gap"] == pytest.approx(gap) == pytest.approx(lumo - homo, abs=1e-5)
        np.testing.assert_allclose(s.properties["dipole"], np.array([x, y, z]) * DEBYE, rtol=1e-6)


def test_parsed_record_equals_the_file(raw):
    water = read(raw, range(1))[0]
    assert (
        water.numbers.tolist() == [8, 1, 1]
        and water.molecule == "962"
        and water.energy == -2079.104512
    )
    assert water.positions[1].tolist() == [-0.7670, -0.1849, 0.0]
    assert np.linalg.norm(water.properties["dipole"]) == pytest.approx(
        2.093417 * 0.2081943, rel=1e-6
    )


def test_charges(raw):
    assert {s.molecule: s.charge for s in read(raw) if s.molecule in ("750", "283", "297")} == {
        "750": 0,
        "283": -1,
        "297": 0,
    }
    # Without M  CHG the codes of the atom lines count: 3 is +1, 5 is -1.
    change(raw / FIRST, " O   0  0  0", " O   0  3  0")
    change(raw / FIRST, " N   0  0  0", " N   0  6  0")
    assert [s.charge for s in read(raw, range(2))] == [1, -2]


def test_units_are_options(raw):
    lines = (raw / "properties.csv").read_text().splitlines()
    rows = [
        [
            c if i in (0, 1, 2, 3) else repr(float(c) / HARTREE)
            for i, c in enumerate(line.split(","))
        ]
        for line in lines[1:]
    ]
    atomic = raw.parent / "atomic"
    atomic.mkdir()
    for path in raw.iterdir():
        (atomic / path.name).write_bytes(path.read_bytes())
    (atomic / "properties.csv").write_text("\n".join([lines[0], *(",".join(r) for r in rows)]))
    other = read(atomic, energy_unit="hartree", orbital_unit="hartree", dipole_unit="e*bohr")
    for a, b in zip(other, read(raw)):
        assert a.energy == pytest.approx(b.energy, rel=1e-7)
        assert a.properties["gap"] == pytest.approx(b.properties["gap"], rel=1e-6)
        np.testing.assert_allclose(
            a.properties["dipole"], b.properties["dipole"] / DEBYE * BOHR, rtol=1e-6
        )
    with pytest.raises(
        DatasetError, match="a total energy of .* does not fit these atoms.*energy_unit"
    ):
        read(atomic)
    with pytest.raises(ConfigError, match="energy_unit.*'Hartre'.*hartree"):
        read(raw, energy_unit="Hartre")


def test_files_are_in_the_order_of_their_numbers(raw):
    """2_to_10 comes before 10_to_12, unlike in alphabetical order."""
    folder = raw.parent / "many"
    folder.mkdir()
    records = (blocks(raw) * 2)[:12]
    rows = (raw / "properties.csv").read_text().splitlines()
    (folder / "properties.csv").write_text("\n".join([rows[0], *(rows[1:] * 2)[:12]]))
    for a, b in ((0, 2), (2, 10), (10, 12)):
        (folder / f"combined_mols_{a}_to_{b}.sdf").write_text("".join(records[a:b]))
    structures = read(folder)
    assert [s.molecule for s in structures] == [r.split(",")[0] for r in (rows[1:] * 2)[:12]]
    assert [s.source.split(":")[0] for s in structures][2:10] == ["combined_mols_2_to_10.sdf"] * 8
    with molecule3d.Reader(folder) as source:
        (last,) = source.read(range(11, 12), ReadReport())
        (first,) = source.read(range(0, 1), ReadReport())
    assert (last.record, first.record) == (11, 0) and last.source == "combined_mols_10_to_12.sdf:11"


@pytest.mark.parametrize("block", [100, 300, 1000])
def test_offsets_do_not_depend_on_the_block_size(raw, monkeypatch, block):
    """Records and end marks can extend across blocks."""
    whole = read(raw)
    monkeypatch.setattr(molecule3d_files, "_BLOCK", block)
    for records in (range(8), range(3, 4), range(7, 8)):
        for a, b in zip(read(raw, records), whole[records.start :]):
            assert a.source == b.source and a.energy == b.energy
            np.testing.assert_array_equal(a.positions, b.positions)


def test_carriage_returns_and_a_last_line_without_end(raw):
    whole = read(raw)
    for name in (FIRST, SECOND, "properties.csv"):
        (raw / name).write_bytes(
            (raw / name).read_bytes().replace(b"\n", b"\r\n").removesuffix(b"\r\n")
        )
    for a, b in zip(read(raw), whole, strict=True):
        assert (a.energy, a.molecule, a.charge) == (b.energy, b.molecule, b.charge)
        np.testing.assert_array_equal(a.positions, b.positions)


def test_only_what_is_needed_is_scanned(raw, monkeypatch):
    folder = raw.parent / "many"
    folder.mkdir()
    rows = (raw / "properties.csv").read_text().splitlines()
    (folder / "properties.csv").write_text("\n".join([rows[0], *rows[1:] * 10]))
    path = folder / "combined_mols_0_to_80.sdf"
    text = "".join(blocks(raw) * 10)
    path.write_text(
        text[: len(text) // 2]
    )  # whoever scans the second half notices that it is missing
    monkeypatch.setattr(molecule3d_files, "_BLOCK", 400)
    with molecule3d.Reader(folder) as source:
        assert [s.molecule for s in source.read(range(20, 22), ReadReport())] == ["750", "283"]
        with pytest.raises(DatasetError, match="truncated"):
            list(source.read(range(79, 80), ReadReport()))


def test_official_splits(raw):
    expected = {
        "random": {"train": [7, 0, 3, 5], "valid": [1, 6], "test": [2, 4]},
        "scaffold": {"train": [0, 1, 2, 3], "valid": [4, 5], "test": [6, 7]},
    }
    for split in expected:
        with molecule3d.Reader(raw, split=split) as source:
            assert {k: v.tolist() for k, v in source.official_split().items()} == expected[split]
    with pytest.raises(ConfigError, match="'scafold'"):
        molecule3d.Reader(raw, split="scafold")
    (raw / SPLITS[0]).write_text('{"train": [0')
    with (
        molecule3d.Reader(raw) as source,
        pytest.raises(DatasetError, match=f"{SPLITS[0]}: cannot be read"),
    ):
        source.official_split()
    (raw / SPLITS[0]).unlink()
    with (
        molecule3d.Reader(raw) as source,
        pytest.raises(DatasetError, match=f"{SPLITS[0]}: cannot be read"),
    ):
        source.official_split()
    (raw / SPLITS[1]).unlink()
    with molecule3d.Reader(raw) as source:
        assert source.official_split() is None


def test_missing_sdf_files(raw):
    """Rows of the table and of the splits keep the numbers of the whole data set."""
    whole = read(raw)
    (raw / FIRST).unlink()
    structures = read(raw)
    assert [(s.molecule, s.source, s.energy) for s in structures] == [
        (s.molecule, s.source, s.energy) for s in whole[5:]
    ]
    assert [s.record for s in structures] == [0, 1, 2]
    with (
        molecule3d.Reader(raw) as source,
        pytest.raises(DatasetError, match="are in none of.*5_to_8"),
    ):
        source.official_split()
    (raw / SPLITS[0]).write_text(json.dumps({"train": [7, 5], "valid": [], "test": [6]}))
    with molecule3d.Reader(raw) as source:
        assert {k: v.tolist() for k, v in source.official_split().items()} == {
            "train": [2, 0],
            "valid": [],
            "test": [1],
        }
    change(raw / SPLITS[0], "7", "8")
    with (
        molecule3d.Reader(raw) as source,
        pytest.raises(DatasetError, match="1 of its 2 molecules"),
    ):
        source.official_split()


def test_path_can_be_raw_or_its_parent(raw):
    assert [s.source for s in read(raw.parent)] == [s.source for s in read(raw)]
    assert molecule3d.Reader.matches(raw) and molecule3d.Reader.matches(raw.parent)
    assert {p.name for p in molecule3d.Reader(raw).files()} == {
        FIRST,
        SECOND,
        "properties.csv",
        *SPLITS,
    }


def test_smiles(raw):
    pytest.importorskip("rdkit")
    assert [s.smiles for s in read(raw, smiles=True)] == [
        "O",
        "N",
        "C",
        "CO",
        "[NH3+]CC(=O)[O-]",
        "O=C[O-]",
        "Cl",
        "CC",
    ]
    assert {s.smiles for s in read(raw)} == {""}


def test_table_in_another_order_is_rejected(raw):
    rows = (raw / "properties.csv").read_text().splitlines(keepends=True)
    rows[1], rows[2] = rows[2], rows[1]
    (raw / "properties.csv").write_text("".join(rows))
    with pytest.raises(
        DatasetError, match=rf"{FIRST}:0: the SDF file has compound 962, but line 2.*compound 222"
    ):
        read(raw)


def test_short_table_is_rejected(raw):
    rows = (raw / "properties.csv").read_text().splitlines(keepends=True)
    (raw / "properties.csv").write_text("".join(rows[:-1]))
    with pytest.raises(DatasetError, match=r"properties\.csv: has 7 molecules.*ends at 8"):
        read(raw)


def test_inconsistent_gap_is_rejected(raw):
    change(raw / "properties.csv", "homo,lumo,homolumogap", "lumo,homo,homolumogap")
    with pytest.raises(DatasetError, match=r":0: the gap is 9\.63.*columns"):
        read(raw)


def test_missing_labels_are_nan(raw):
    change(raw / "properties.csv", "-7.913214,1.720031,9.633245,-2079.104512", ",1.720031,,")
    water = read(raw)[0]
    assert np.isnan([water.energy, water.properties["homo"], water.properties["gap"]]).all()
    assert water.properties["lumo"] == 1.720031 and np.isfinite(water.properties["dipole"]).all()


def test_cells_that_are_not_numbers_are_rejected(raw):
    change(raw / "properties.csv", "-8.701121", "n/a")
    with pytest.raises(DatasetError, match=r"properties\.csv: line 8: expected 8 numbers.*n/a"):
        read(raw)


def test_columns_are_found_by_name(raw):
    whole = read(raw)
    text = (raw / "properties.csv").read_text().splitlines()
    swapped = [",".join([str(i), *reversed(line.split(","))]) for i, line in enumerate(text)]
    (raw / "properties.csv").write_text("\n".join(swapped))
    for a, b in zip(read(raw), whole):
        assert (a.energy, a.molecule, a.properties["homo"]) == (
            b.energy,
            b.molecule,
            b.properties["homo"],
        )
    change(raw / "properties.csv", "homolumogap", "gap")
    with pytest.raises(DatasetError, match="has no column 'homolumogap'"):
        read(raw)


@pytest.mark.parametrize("keep", [0, 5, 300, 1000, -1, -6, -40])
def test_truncated_sdf_is_rejected(raw, keep):
    (raw / SECOND).write_bytes((raw / SECOND).read_bytes()[:keep].removesuffix(b"$$$$"))
    with pytest.raises(DatasetError, match=rf"{SECOND}.*truncated"):
        read(raw)


@pytest.mark.parametrize("block", [400, 1 << 24])
def test_record_counts_must_match_the_file_names(raw, monkeypatch, block):
    """This includes a surplus in a later block than the last requested record."""
    monkeypatch.setattr(molecule3d_files, "_BLOCK", block)
    (raw / SECOND).write_text("".join(blocks(raw)[5:7]))
    with pytest.raises(
        DatasetError, match=rf"{SECOND}: ends after 2 records, but its name states 3"
    ):
        read(raw)
    (raw / SECOND).write_text("".join(blocks(raw)[5:] * 4))
    with pytest.raises(DatasetError, match=rf"{SECOND}: has more than the 3 records"):
        read(raw, range(5, 8))


def test_end_marks_count_only_at_the_start_of_a_line(raw):
    whole = read(raw)
    change(raw / FIRST, "000000222\n", "price $$$$ 5\n")
    for a, b in zip(read(raw), whole, strict=True):
        assert a.source == b.source and a.energy == b.energy
        np.testing.assert_array_equal(a.positions, b.positions)


def test_overlapping_files_are_rejected(raw):
    (raw / SECOND).rename(raw / "combined_mols_4_to_7.sdf")
    with pytest.raises(DatasetError, match="begins at molecule 4, but .* extends to 4"):
        read(raw)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("999 V2000", "999 V3000", "expected a V2000 mol block.*V3000"),
        (" C   0", " Xx  0", "corrupted.*KeyError.*Xx"),
        ("  5  4  0", " 70  4  0", "corrupted.*70 atoms"),
        ("  5  4  0", "  x  4  0", "corrupted"),
        ("-0.0000 C", "-0.0x00 C", "corrupted"),
        ("-0.0000 C", "    nan C", "not finite"),
    ],
)
def test_corrupted_blocks_are_identified(raw, old, new, message):
    methane = blocks(raw)[2]
    assert old in methane
    change(raw / FIRST, methane, methane.replace(old, new, 1))
    with pytest.raises(DatasetError, match=f"{FIRST}:2: .*{message}"):
        read(raw)


def test_deuterium_is_hydrogen(raw):
    change(raw / FIRST, " H   0", " D   0")
    assert read(raw, range(1))[0].numbers.tolist() == [8, 1, 1]


def test_other_folder_is_rejected(tmp_path):
    (tmp_path / "properties.csv").write_text("a,b\n1,2\n")
    (tmp_path / "mols.sdf").write_text("$$$$\n")
    assert not molecule3d.Reader.matches(tmp_path)
    with pytest.raises(DatasetError, match=r"expected a folder with combined_mols.*mols\.sdf"):
        molecule3d.Reader(tmp_path)
