"""Tests for several files of one format as one source."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from mlip_jax.config import ConfigError
from mlip_jax.datasets import readers
from mlip_jax.datasets.reader import DatasetError, MultiFileReader, ReadReport
from mlip_jax.datasets.store.conversion import ConversionSpec, convert
from mlip_jax.datasets.store.store import Store

DATA = Path(__file__).parents[2] / "data"
MOLECULES, SPICE = DATA / "gfn2_small.hdf5", DATA / "spice_1.1.4_small.hdf5"
ETHANOL = DATA / "readers" / "md17" / "rmd17_ethanol.npz"


def part(path, first, last):
    """Write the molecules first:last of the data set to a separate file."""
    with h5py.File(MOLECULES) as source, h5py.File(path, "w") as file:
        for name in list(source)[first:last]:
            source.copy(name, file)
        file.attrs["level_of_theory"] = source.attrs["level_of_theory"]
    return path


@pytest.fixture
def folder(tmp_path):
    """The data set in three files."""
    for name, first, last in (("a", 0, 5), ("b", 5, 6), ("c", 6, 17)):
        part(tmp_path / f"{name}.hdf5", first, last)
    return tmp_path


def identities(structures):
    return [
        (s.molecule, s.conformer, s.record, s.energy, s.positions.tobytes()) for s in structures
    ]


def all_of(path, *options):
    with readers.open_data(path, *options) as source:
        return identities(source)


@pytest.mark.parametrize(
    "path",
    [
        "{0}/*.hdf5",
        "{0}/[ab].hdf5,{0}/c.hdf5",
        "{0}/a.hdf5,{0}/b.hdf5,{0}/c.hdf5",
        "{0}/a.hdf5, {0}/b.hdf5 , {0}/?.hdf5",
        "{0}/**/*.hdf5",
    ],
)
def test_record_ranges_equal_the_whole(folder, path):
    """Record numbers continue across files. A file that matches two patterns is read once."""
    assert all_of(path.format(folder)) == all_of(MOLECULES)


def test_lists_keep_their_order_and_patterns_are_sorted(folder):
    with readers.open_data(f"{folder}/c.hdf5,{folder}/a.hdf5") as source:
        assert [f.name for f in source.files()] == ["c.hdf5", "a.hdf5"] and len(source) == 16
        records = [(s.record, s.source.partition(":")[0]) for s in source]
    assert [r for r, _ in records] == sorted(r for r, _ in records)
    assert {r for r, file in records if file == "c.hdf5"} == set(range(11))
    assert {r for r, file in records if file == "a.hdf5"} == set(range(11, 16))
    with readers.open_data(f"{folder}/*.hdf5") as source:
        assert [f.name for f in source.files()] == ["a.hdf5", "b.hdf5", "c.hdf5"]


def test_any_range_of_records(folder):
    whole = all_of(MOLECULES)
    with readers.open_data(f"{folder}/*.hdf5") as source:
        assert (
            isinstance(source, MultiFileReader) and source.format == "spice" and len(source) == 17
        )
        for first, last in ((0, 5), (4, 7), (5, 6), (6, 6), (16, 17), (3, 17), (17, 17)):
            report = ReadReport()
            actual = list(source.read(range(first, last), report))
            assert identities(actual) == [s for s in whole if first <= s[2] < last]
            assert report.records == last - first and report.structures == len(actual)


def test_skipped_records_are_reported(folder):
    for name in "ac":
        with h5py.File(folder / f"{name}.hdf5", "a") as file:
            next(iter(file.values()))["conformations"][1, 0, 0] = np.nan
    with readers.open_data(f"{folder}/*.hdf5") as source:
        report = ReadReport()
        assert len(list(source.read(range(17), report))) == 100
    assert report.skipped == {"positions not finite": 2}
    assert [s.split(":")[0] for _, s in report.identities] == ["a.hdf5", "c.hdf5"]


def test_one_file_needs_no_wrapper(folder):
    assert not isinstance(readers.open_data(f"{folder}/b*.hdf5"), MultiFileReader)
    assert not isinstance(readers.open_data(str(folder / "b.hdf5")), MultiFileReader)


def test_file_name_with_a_comma(folder):
    for name in ("x,y.hdf5", "[ab].hdf5", "what?.hdf5"):
        shutil.copy(folder / "b.hdf5", folder / name)
        with readers.open_data(folder / name) as source:
            assert [f.name for f in source.files()] == [name] and len(source) == 1


def test_pattern_without_matches_is_rejected(folder):
    for path in (f"{folder}/*.h5", f"{folder}/a.hdf5,{folder}/*.h5"):
        with pytest.raises(
            DatasetError, match=r"/\*.h5: no file matches this pattern.*config.data.path"
        ):
            readers.open_data(path)


def test_missing_file_of_a_list_is_reported(folder):
    with pytest.raises(DatasetError, match="nowhere.hdf5: no such file"):
        readers.open_data(f"{folder}/a.hdf5,{folder}/nowhere.hdf5")


def test_two_formats_are_rejected(folder):
    with pytest.raises(DatasetError, match=r"different formats \(md17, spice\).*its own store"):
        readers.open_data(f"{folder}/a.hdf5,{ETHANOL}")
    with pytest.raises(DatasetError, match="rmd17_ethanol.npz: cannot be opened as HDF5"):
        readers.open_data(f"{folder}/a.hdf5,{ETHANOL}", "spice")


def test_corrupted_file_is_identified(folder):
    (folder / "b.hdf5").write_bytes((folder / "b.hdf5").read_bytes()[:500])
    with pytest.raises(DatasetError, match="b.hdf5"):
        readers.open_data(f"{folder}/*.hdf5")


def test_unknown_option_is_rejected(folder):
    with pytest.raises(ConfigError, match="'spice' has no options; received 'split'"):
        readers.open_data(f"{folder}/*.hdf5", split=1)


def test_levels_of_theory_are_joined(folder):
    with readers.open_data(f"{folder}/*.hdf5") as source:
        assert source.level_of_theory == "GFN2-xTB (tblite 0.8.0)"
        assert source.UNITS["positions"] == "bohr" and not source.sequential
    with readers.open_data(f"{folder}/a.hdf5,{SPICE}") as source:
        assert source.level_of_theory == "GFN2-xTB (tblite 0.8.0) / ωB97M-D3(BJ)/def2-TZVPPD"


def test_official_splits_of_single_files_are_ignored(tmp_path):
    shutil.copy(ETHANOL, tmp_path / "other.npz")
    with readers.open_data(ETHANOL) as source:
        assert source.official_split() is not None
        half = len(source)
    with readers.open_data(f"{ETHANOL},{tmp_path}/other.npz") as source:
        assert source.official_split() is None and len(source) == 2 * half
        assert len(source.files()) == 4  # with those of the split


def test_different_atom_energies_are_rejected():
    first, second = readers.open_data(MOLECULES), readers.open_data(SPICE)
    first.atom_energies, second.atom_energies = {"H": -13.6}, {"H": -13.7}
    with pytest.raises(
        DatasetError, match="gfn2_small.*spice_1.1.4_small.*different energies of isolated atoms"
    ):
        MultiFileReader([first, second])
    second.atom_energies = {"H": -13.6}
    assert MultiFileReader([first, second]).atom_energies == {"H": -13.6}


def open_hdf5_files():
    return h5py.h5f.get_obj_ids(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE)


def test_close_closes_all_files(folder):
    before = {file.id for file in open_hdf5_files()}
    with readers.open_data(f"{folder}/*.hdf5"):
        files = [file for file in open_hdf5_files() if file.id not in before]
        assert len(files) == 3
    assert not any(file.valid for file in files)


def test_several_files_in_one_store(folder, tmp_path):
    spec = ConversionSpec(f"{folder}/*.hdf5", atoms_per_shard=60)
    store = Store(convert(spec, tmp_path / "store", num_processes=2, progress=False))
    with readers.open_data(MOLECULES) as source:
        whole = list(source)
    assert store.index("record").tolist() == [s.record for s in whole]
    assert store.index("energy").tolist() == [s.energy for s in whole]
    assert [f["name"] for f in store.manifest["source"]["files"]] == ["a.hdf5", "b.hdf5", "c.hdf5"]
    assert (
        store.manifest["source"]["reader"] == "spice" and store.manifest["source"]["records"] == 17
    )
    part(folder / "d.hdf5", 0, 1)  # the pattern fits one more now
    with pytest.raises(DatasetError, match=r"(?s)another source.*source.files: 3 -> 4"):
        convert(spec, tmp_path / "store", num_processes=1, progress=False)
