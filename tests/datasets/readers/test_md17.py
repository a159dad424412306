"""Tests for the MD17 reader: both layouts, units, sign of forces, splits, and invalid files."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mlip_jax.config import ConfigError
from mlip_jax.datasets.formats import npz
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.readers import md17

DATA = Path(__file__).parents[2] / "data" / "readers" / "md17"
GENUINE = DATA / "rmd17_ethanol.npz"  # frames i and i + 10 are similar
KCAL_PER_MOL = 0.0433641153087705


def read(path, report=None, **options):
    with md17.Reader(path, **options) as source:
        return list(source.read(range(len(source)), report or ReadReport()))


def original(path, save=np.savez, **changes):
    """Write five frames of water in the layout of MD17. `changes` are arrays; None omits one."""
    rng = np.random.default_rng(0)
    water = np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.48], [0.0, -0.76, -0.48]])
    arrays = {
        "z": np.array([8, 1, 1]),
        "R": water + 0.05 * rng.normal(size=(5, 3, 3)),
        "E": -47900.0 + rng.normal(size=(5, 1)),
        "F": rng.normal(size=(5, 3, 3)),
        "name": np.array(b"water"),
        "theory": np.array("ccsd(t)"),
        "type": np.array(b"d"),
    } | changes
    save(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def test_equals_an_independent_parser():
    report = ReadReport()
    structures, raw = read(GENUINE, report), np.load(GENUINE)
    assert len(structures) == report.structures == report.records == len(raw["energies"]) == 20
    for i, s in enumerate(structures):
        np.testing.assert_array_equal(s.numbers, [6, 6, 8, 1, 1, 1, 1, 1, 1])
        np.testing.assert_array_equal(s.positions, raw["coords"][i])
        assert s.energy == pytest.approx(raw["energies"][i] * KCAL_PER_MOL, rel=1e-6)
        np.testing.assert_allclose(s.forces, raw["forces"][i] * KCAL_PER_MOL, rtol=1e-6)
        assert (s.molecule, s.record, s.conformer, s.source) == (
            "ethanol",
            i,
            0,
            f"rmd17_ethanol.npz:{i}",
        )
    assert structures[0].energy == pytest.approx(
        -4209, abs=3
    )  # ethanol's PBE energy, about -154.7 hartree


def test_forces_point_downhill():
    structures = read(GENUINE)
    slopes = []
    for a, b in zip(structures[:10], structures[10:]):
        work = (0.5 * (a.forces + b.forces) * (b.positions - a.positions)).sum()
        slopes.append((b.energy - a.energy) / -work)
    assert np.median(slopes) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_original_layout(tmp_path, save):
    path = original(tmp_path / "md17_water.npz", save)
    raw = np.load(path)
    assert md17.Reader.matches(path)
    with md17.Reader(path) as source:
        assert (
            source.level_of_theory == "ccsd(t)"
            and source.official_split() is None
            and not source.sequential
        )
    structures = read(path)
    assert [s.molecule for s in structures] == ["water"] * 5
    np.testing.assert_allclose(
        [s.energy for s in structures], raw["E"][:, 0] * KCAL_PER_MOL, rtol=1e-6
    )
    np.testing.assert_allclose(structures[3].forces, raw["F"][3] * KCAL_PER_MOL, rtol=1e-6)
    np.testing.assert_array_equal(structures[3].positions, raw["R"][3])


def test_level_of_theory_defaults_to_the_published_one(tmp_path):
    assert md17.Reader(original(tmp_path / "a.npz", theory=None)).level_of_theory == "PBE+vdW-TS"
    assert md17.Reader(GENUINE).level_of_theory == "PBE/def2-SVP"


def test_missing_labels_are_nan(tmp_path):
    energy = np.full((5, 1), -47900.0)
    energy[2] = np.nan
    structures = read(original(tmp_path / "a.npz", E=energy, F=None))
    assert [np.isnan(s.energy) for s in structures] == [False, False, True, False, False]
    assert all(np.isnan(s.forces).all() and s.forces.shape == (3, 3) for s in structures)


def test_positions_that_are_not_finite_are_skipped_and_counted(tmp_path):
    positions = np.load(original(tmp_path / "a.npz"))["R"].copy()
    positions[1, 0, 0] = np.inf
    report = ReadReport()
    structures = read(original(tmp_path / "b.npz", R=positions), report)
    assert [s.record for s in structures] == [0, 2, 3, 4]
    assert (
        report.skipped == {"positions not finite": 1}
        and report.records == 5
        and report.structures == 4
    )


def test_stated_units_are_used(tmp_path):
    path = original(
        tmp_path / "a.npz", E=np.full(5, -2077.0), e_unit=np.array("eV"), r_unit=np.array("Ang")
    )
    first, raw = read(path)[0], np.load(path)
    assert first.energy == -2077.0
    np.testing.assert_array_equal(first.forces, raw["F"][0])
    with pytest.raises(DatasetError, match="e_unit is 'fortnights'"):
        read(original(tmp_path / "b.npz", e_unit=np.array("fortnights")))
    with pytest.raises(DatasetError, match="r_unit is 'bohr'"):
        read(original(tmp_path / "c.npz", r_unit=np.array("bohr")))


@pytest.mark.parametrize(("energy", "unit"), [(-2077.0, "eV"), (-76.3, "hartree")])
def test_energies_in_another_unit_are_rejected(tmp_path, energy, unit):
    with pytest.raises(
        DatasetError, match=f"a.npz: the first energy, .* in {unit}, but MD17 has kcal/mol"
    ):
        read(original(tmp_path / "a.npz", E=np.full((5, 1), energy)))


def test_official_split():
    with md17.Reader(GENUINE) as source:
        split = source.official_split()
        assert [f.name for f in source.files()] == [
            GENUINE.name,
            "ethanol_train_01.csv",
            "ethanol_test_01.csv",
        ]
    np.testing.assert_array_equal(split["train"], np.arange(10))
    np.testing.assert_array_equal(split["test"], np.arange(10, 20))


def test_official_split_in_the_folders_of_the_release(tmp_path):
    (tmp_path / "npz_data").mkdir()
    (tmp_path / "splits").mkdir()
    path = shutil.copy(GENUINE, tmp_path / "npz_data")
    for number in (1, 2):
        (tmp_path / "splits" / f"index_train_0{number}.csv").write_text(f"{number}\n7\n")
        (tmp_path / "splits" / f"index_test_0{number}.csv").write_text("19\n3\n")
    assert md17.Reader(path).official_split()["train"].tolist() == [1, 7]
    assert md17.Reader(path, split_number=2).official_split()["train"].tolist() == [2, 7]
    with pytest.raises(DatasetError, match="split 3, such as splits/index_train_03.csv, are miss"):
        md17.Reader(path, split_number=3)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            "0\n20\n",
            "1\n",
            "train.csv: 1 of its 2 rows, such as 20, are not among the 20 of .*another or a larger",
        ),
        ("-1\n", "1\n", "train.csv: 1 of its 1 rows, such as -1"),
        ("0\n1\n", "1\n2\n", "1 rows are in both.* is 1"),
        ("0\n0\n", "1\n", "1 rows occur more than once"),
        ("a\n", "1\n", "train.csv: expected row numbers"),
        ("", "1\n", "train.csv: contains no row numbers"),
        ("1\n", None, "test.csv: expected row numbers"),
    ],
)
def test_invalid_splits_are_rejected(tmp_path, train, test, message):
    for name, text in (("train", train), ("test", test)):
        if text is not None:
            (tmp_path / f"{name}.csv").write_text(text)
    files = (str(tmp_path / "train.csv"), str(tmp_path / "test.csv"))
    with pytest.raises(DatasetError, match=message):  # when it is opened, not after a conversion
        md17.Reader(GENUINE, split_files=files)


def test_split_files_must_be_two():
    for files in ("train.csv", ("a", "b", "c"), 5, (1, 2)):
        with pytest.raises(ConfigError, match="split_files must be"):
            md17.Reader(GENUINE, split_files=files)


def test_splits_of_a_larger_file_are_rejected(tmp_path):
    """The rows refer to the larger file. The message explains how to omit the split."""
    (tmp_path / "splits").mkdir()
    path = shutil.copy(GENUINE, tmp_path / "rmd17_ethanol.npz")
    (tmp_path / "splits" / "index_train_01.csv").write_text("1\n70\n")
    (tmp_path / "splits" / "index_test_01.csv").write_text("19\n3\n")
    with pytest.raises(
        DatasetError, match="train_01.csv: 1 of its 2 rows.*reader_options=\"split_files=''\""
    ):
        md17.Reader(path)
    for none in ("", (), []):
        assert len(read(path, split_files=none)) == 20
        assert md17.Reader(path, split_files=none).official_split() is None
        assert md17.Reader(path, split_files=none).files() == [tmp_path / "rmd17_ethanol.npz"]


@pytest.mark.parametrize("value", ["one", 1.5, True, 0])
def test_split_number_must_be_an_integer(value):
    with pytest.raises(
        ConfigError, match="reader option split_number must be an integer of 1 or more, or None"
    ):
        md17.Reader(GENUINE, split_number=value)


@pytest.mark.parametrize("keep", [0, 50, 4000, 9000])
def test_truncated_file_is_rejected(tmp_path, keep):
    path = tmp_path / "rmd17_cut.npz"
    path.write_bytes(GENUINE.read_bytes()[:keep])
    assert not md17.Reader.matches(path)
    with pytest.raises(DatasetError, match=r"rmd17_cut\.npz.*truncated"):
        read(path)


def test_corrupted_bytes_are_detected(tmp_path):
    content = bytearray(GENUINE.read_bytes())
    with zipfile.ZipFile(GENUINE) as archive:
        info = archive.getinfo("forces.npy")
    content[info.header_offset + info.compress_size // 2] ^= 255
    path = tmp_path / "rmd17_bad.npz"
    path.write_bytes(content)
    with pytest.raises(
        DatasetError, match=r"rmd17_bad\.npz: (forces cannot be read|cannot be opened).*"
    ):
        read(path)


def test_arrays_of_python_objects_are_rejected(tmp_path):
    path = original(tmp_path / "a.npz", E=np.array([{}] * 5, dtype=object))
    with pytest.raises(DatasetError, match="a.npz: E is an array of Python objects.*not loaded"):
        read(path)
    path = original(tmp_path / "b.npz", theory=np.array({"a": 1}, dtype=object))
    assert md17.Reader(path).level_of_theory == "PBE+vdW-TS"  # unused texts are not read


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("R", np.zeros((5, 4, 3))),
        ("E", np.zeros(4)),
        ("F", np.zeros((5, 3, 2))),
        ("E", np.array(["a"] * 5)),
    ],
)
def test_invalid_shapes_are_reported(tmp_path, field, value):
    with pytest.raises(DatasetError, match=f"a.npz: {field} has shape .*expected"):
        read(original(tmp_path / "a.npz", **{field: value}))


def test_other_layouts_are_rejected(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    padded = original(tmp_path / "padded.npz", z=np.ones((5, 3), int))
    for path in (tmp_path / "a.npz", padded):
        assert not md17.Reader.matches(path)
        with pytest.raises(DatasetError, match="expected the layout of rMD17 .*found"):
            read(path)
    with pytest.raises(DatasetError, match="is not an atomic number"):
        read(original(tmp_path / "b.npz", z=np.array([8, 1, 0])))
    with pytest.raises(DatasetError, match="contains no frames"):
        read(
            original(
                tmp_path / "c.npz", R=np.zeros((0, 3, 3)), E=np.zeros(0), F=np.zeros((0, 3, 3))
            )
        )


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_large_members_are_streamed(tmp_path, monkeypatch, save):
    """Rows do not depend on how and in which order a member is read."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(3000, 2, 3)).astype(np.float32)
    save(tmp_path / "a.npz", x=values, columns=np.asfortranarray(values[:, :, 0]))
    monkeypatch.setattr(npz, "LOAD", 1000)
    with npz.NpzFile(tmp_path / "a.npz") as file:
        assert file.streamed("x") == (save is np.savez_compressed)
        for start, stop in ((0, 10), (10, 20), (2500, 2600), (5, 7), (2990, 4000)):
            np.testing.assert_array_equal(file.rows("x", start, stop), values[start:stop])
        if save is np.savez:
            np.testing.assert_array_equal(file.rows("columns", 3, 9), values[3:9, :, 0])
        else:
            with pytest.raises(DatasetError, match="columns"):
                file.rows("columns", 3, 9)


def test_streamed_files_are_sequential(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "LOAD", 100)
    with md17.Reader(GENUINE) as source:
        assert source.sequential
        parts = [
            s
            for r in (range(0, 7), range(7, 20), range(3, 5))
            for s in source.read(r, ReadReport())
        ]
    monkeypatch.undo()
    whole = read(GENUINE)
    for a, b in zip(parts, whole + whole[3:5], strict=True):
        np.testing.assert_array_equal(a.forces, b.forces)
        assert a.energy == b.energy


def test_fractional_atomic_numbers_are_rejected(tmp_path):
    """6.5 used to become carbon."""
    with pytest.raises(DatasetError, match="a.npz: z: 6.5 is not an atomic number"):
        read(original(tmp_path / "a.npz", z=np.array([8, 1, 6.5])))


def test_the_unit_is_checked_although_the_first_energy_is_missing(tmp_path):
    energies = np.full((5, 1), -2078.0)  # eV of water
    energies[0] = np.nan
    with pytest.raises(DatasetError, match="that of this molecule in eV"):
        read(original(tmp_path / "a.npz", z=np.array([8, 1, 1]), E=energies))
