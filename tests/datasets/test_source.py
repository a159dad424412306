"""Tests for loading data from config.data: location, conversion and filters."""

import json
import logging
import os
import shutil
from pathlib import Path

import ase.io
import h5py
import numpy as np
import pytest
from ase import units
from ase.data import atomic_numbers

from mlip_jax.datasets import readers, source
from mlip_jax.datasets.quality.filters import CODES, Filters
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.store.store import MANIFEST, Store, is_store

DATA = Path(__file__).parents[1] / "data/gfn2_small.hdf5"
SPICE = Path(__file__).parents[1] / "data/spice_1.1.4_small.hdf5"

FRAMES = """\
3
Properties=species:S:1:pos:R:3:forces:R:3 energy=-2078.25 free=-2078.5
O 0.000 0.000 0.119 0.00 0.00 -0.40
H 0.000 0.763 -0.477 0.00 0.30 0.20
H 0.000 -0.763 -0.477 0.00 -0.30 0.20
2
Properties=species:S:1:pos:R:3:forces:R:3 energy=-31.5 free=-31.75
H 0.0 0.0 0.0 0.0 0.0 0.1
H 0.0 0.0 0.74 0.0 0.0 -0.1
"""


def structures(path=DATA):
    with readers.open_data(path) as opened:
        return list(opened)


def edited(path, change, original=DATA):
    """Write a copy of a file after applying `change` to it."""
    shutil.copy(original, path)
    with h5py.File(path, "a") as file:
        change(file)
    return path


def stores(options):
    return sorted(p.name for p in (Path(options.directory) / "stores").glob("*") if is_store(p))


def test_locate_returns_the_given_path(options):
    data = options("some/where.xyz")
    shutil.copy(SPICE, Path(data.directory) / "SPICE-2.0.1.hdf5")
    assert source.locate(data) == "some/where.xyz"


def test_locate_finds_the_newest_spice_file(options):
    data = options()
    folder = Path(data.directory)
    (folder / "SPICE-9.hdf5").mkdir()  # no file
    (folder / "QM9.hdf5").touch()
    shutil.copy(SPICE, folder / "SPICE-1.1.4.hdf5")
    assert source.locate(data) == str(folder / "SPICE-1.1.4.hdf5")
    shutil.copy(SPICE, folder / "SPICE-2.0.1.hdf5")
    shutil.copy(SPICE, folder / "SPICE-1.1.4-copy.hdf5")
    assert source.locate(data) == str(folder / "SPICE-2.0.1.hdf5")


def test_locate_generates_the_built_in_data_set(options, caplog, monkeypatch):
    """The generation itself is tested elsewhere; this tests its arguments and the log message."""
    calls = []

    def generate(path, *, num_conformations):
        calls.append((path, num_conformations))
        return path

    from mlip_jax.datasets import builtin

    monkeypatch.setattr(builtin, "generate_embedded", generate)
    data = options(num_generated=123)
    with caplog.at_level(logging.INFO):
        path = source.locate(data)
    assert (
        calls == [(Path(path), 123)]
        and Path(path).parent == Path(data.directory)
        and "123" in Path(path).name
    )
    assert "GFN2-xTB labels (NOT SPICE's" in caplog.text
    caplog.clear()
    Path(path).touch()
    assert source.locate(data) == path and not caplog.text


def test_file_is_converted_once(options, caplog):
    data = options(DATA)
    with caplog.at_level(logging.INFO):
        store = source.open_store(data)
    assert store.path.parent == Path(data.directory) / "stores" and "gfn2_small" in store.path.name
    assert "converting" in caplog.text and len(store) == 102
    # Only the lock is touched, not the files of the store.
    files = [p for p in store.path.rglob("*") if p.is_file() and p.suffix != ".lock"]
    times = {p: p.stat().st_mtime_ns for p in files}
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again = source.open_store(data)
    assert again.path == store.path and {p: p.stat().st_mtime_ns for p in files} == times
    assert "converting" not in caplog.text
    for a, b in zip(structures(), (again[s] for s in range(len(again))), strict=True):
        assert a.energy == b.energy and a.molecule == b.molecule
        np.testing.assert_allclose(a.positions, b.positions, atol=1e-6)


def test_same_file_under_another_path_reuses_the_store(options, monkeypatch):
    store = source.open_store(options(DATA))
    monkeypatch.chdir(DATA.parent)
    assert source.open_store(options(DATA.name)).path == store.path


@pytest.mark.parametrize("change", ["touched", "other bytes"])
def test_changed_file_gets_a_new_store(options, tmp_path, change):
    path = tmp_path / "file.hdf5"
    shutil.copy(DATA, path)
    data = options(path)
    first = source.open_store(data)
    if change == "touched":
        os.utime(path, ns=(1, 1))
    else:
        keep = path.stat().st_mtime_ns
        edited(path, lambda file: file.create_dataset("urea/more", data=np.zeros(5000)))
        os.utime(path, ns=(keep, keep))
    second = source.open_store(data)
    assert second.path != first.path and len(stores(data)) == 2
    assert Store(first.path).manifest["source"]["files"] == first.manifest["source"]["files"]


def test_other_reader_options_get_a_new_store(options, tmp_path):
    path = tmp_path / "frames.xyz"
    path.write_text(FRAMES)
    data, other = options(path, reject_invalid=False), options(path, reject_invalid=False)
    other.reader_options = "energy_key=free"
    first, second = source.open_store(data), source.open_store(other)
    assert first.path != second.path and len(stores(data)) == 2
    assert first.index("energy").tolist() == [-2078.25, -31.5] and second.index(
        "energy"
    ).tolist() == [-2078.5, -31.75]


def test_store_is_opened_in_place(options, shared_store):
    data = options(shared_store)
    store = source.open_store(data)
    assert store.path == shared_store and not stores(data)
    assert source.load(data).name == shared_store.name


@pytest.mark.parametrize(
    "damage", ["other bytes", "shorter", "no shard", "no manifest", "manifest cut"]
)
@pytest.mark.parametrize("verify", [None, True, False])
def test_corrupted_store_of_a_file_is_rebuilt(options, damage, verify):
    data = options(DATA, verify=verify)
    store = source.open_store(data)
    shard, manifest = (
        store.path / "shards" / store.manifest["shards"][0]["file"],
        store.path / MANIFEST,
    )
    content, metadata = shard.read_bytes(), json.loads(manifest.read_text())
    other = content[:-10] + bytes(10)
    {
        "other bytes": lambda: shard.write_bytes(other),
        "shorter": lambda: shard.write_bytes(content[:1000]),
        "no shard": shard.unlink,
        "no manifest": manifest.unlink,
        "manifest cut": lambda: manifest.write_text(manifest.read_text()[:300]),
    }[damage]()
    again = source.open_store(data)
    assert again.path == store.path and json.loads(manifest.read_text()) == metadata
    # Files of the right size are compared with their checksums only on request or if the store is
    # small.
    assert shard.read_bytes() == (other if damage == "other bytes" and verify is False else content)


@pytest.mark.parametrize("verify", [None, True, False])
def test_corrupted_store_as_input_is_rejected(options, shared_store, tmp_path, verify):
    copy = Path(shutil.copytree(shared_store, tmp_path / "copy"))
    shard = next((copy / "shards").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10] + bytes(10))
    if verify is False:
        assert len(source.open_store(options(copy, verify=False))) == 102
    else:
        with pytest.raises(DatasetError, match=f"checksums: {shard.name}"):
            source.open_store(options(copy, verify=verify))


def test_large_store_is_not_verified_at_every_start(options, shared_store, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(shared_store, tmp_path / "copy"))
    shard = next((copy / "shards").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10] + bytes(10))
    monkeypatch.setattr(source, "_VERIFY_UP_TO", 1000)
    assert len(source.open_store(options(copy))) == 102
    with pytest.raises(DatasetError, match="checksums"):
        source.open_store(options(copy, verify=True))


def flipped(file):
    for group in file.values():
        group["dft_total_gradient"][:] = -group["dft_total_gradient"][:]


def test_rejected_data_are_rejected_again_after_a_conversion(options, tmp_path):
    path = edited(tmp_path / "flipped.hdf5", flipped)
    with pytest.raises(
        DatasetError, match="(?s)rejected by the data checks.*gradients.*data.reject_invalid=False"
    ):
        source.open_store(options(path))
    assert len(source.open_store(options(path, reject_invalid=False))) == 102
    with pytest.raises(
        DatasetError, match="(?s)rejected by the data checks.*gradients.*data.reject_invalid=False"
    ):
        source.open_store(options(path))
    assert any(
        "gradients" in note for note in source.load(options(path, reject_invalid=False)).notes
    )


def test_missing_file_is_reported(options, tmp_path):
    with pytest.raises(DatasetError, match="nowhere.hdf5: no such file"):
        source.load(options(tmp_path / "nowhere.hdf5"))


def test_filters_count_excluded_structures(options, shared_store, caplog):
    data = options(shared_store, elements=("H", "C", "N", "O", "S"), charge=0.0)
    loaded = source.load(data)
    allowed = {atomic_numbers[e] for e in data.elements}
    expected = [s.charge == 0 and set(s.numbers.tolist()) <= allowed for s in structures()]
    np.testing.assert_array_equal(loaded.indices, np.flatnonzero(expected))
    assert loaded.counts == {
        "structures read": 102,
        "skipped by the reader": {},
        "in the store": 102,
        "left out": {"charge": 12, "elements": 6},
        "used": 84,
    }
    # A user's molecules with charges or halogens are not dropped silently.
    assert (
        "11.8 % of the structures (12) are not used because of data.charge (charges" in caplog.text
    )
    assert (
        "5.88 % of the structures (6) are not used because of data.elements (with Cl)"
        in caplog.text
    )
    assert "To keep them: --config.data.elements=None" in caplog.text


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("min_atoms", 10, lambda s: len(s) >= 10),
        ("max_atoms", 8, lambda s: len(s) <= 8),
        ("max_force", 6.0, lambda s: np.abs(s.forces).max() <= 6.0),
        ("min_distance", 1.0, lambda s: shortest(s.positions) >= 1.0),
        ("charge", 1.0, lambda s: s.charge == 1),
    ],
)
def test_each_filter(options, shared_store, field, value, kept):
    expected = np.flatnonzero([kept(s) for s in structures()])
    assert 0 < len(expected) < 102
    np.testing.assert_array_equal(
        source.load(options(shared_store, **{field: value})).indices, expected
    )


def shortest(x):
    d = np.linalg.norm(x[:, None] - x[None], axis=-1)
    return d[np.triu_indices(len(x), 1)].min()


def test_no_structure_passes(options, shared_store):
    with pytest.raises(
        DatasetError, match=r"none of 102 structures.*'elements': 102.*Change data.elements"
    ):
        source.load(options(shared_store, elements=("He",)))


def test_outliers_within_a_molecule_are_excluded(options, tmp_path):
    """An outlier in energy, one in forces, and one in a molecule that other filters make small."""

    def plant(file):
        file["glycine/dft_total_energy"][4] += 5 / units.Hartree
        file["urea/dft_total_gradient"][2] *= 50

    path = edited(tmp_path / "planted.hdf5", plant)
    energy, force = (
        next(
            i
            for i, s in enumerate(structures(path))
            if (s.source.split(":")[1], s.conformer) == where
        )
        for where in (("glycine", 4), ("urea", 2))
    )
    everything = np.arange(102)
    for filters, left_out in (
        ({}, []),
        ({"max_energy_z": 10.0}, [energy]),
        ({"max_force_z": 10.0}, [force]),
        ({"max_energy_z": 10.0, "max_force_z": 10.0}, [energy, force]),
        ({"max_energy_deviation": 0.4}, [energy]),
    ):
        loaded = source.load(options(path, reject_invalid=False, **filters))
        np.testing.assert_array_equal(
            loaded.indices, np.setdiff1d(everything, left_out), err_msg=str(filters)
        )
    assert loaded.counts["left out"] == {"energy outlier": 1}
    # Outliers are determined among the structures that pass the other filters.
    store = source.open_store(options(path, reject_invalid=False))
    reasons = source.select(store, Filters(max_atoms=9, max_energy_z=10.0))
    assert (
        reasons[energy] == CODES["too many atoms"]
        and not (reasons == CODES["energy outlier"]).any()
    )


def test_notes_state_that_labels_are_not_those_of_spice(options, shared_store, caplog, monkeypatch):
    """The advice to download SPICE is for built-in molecules, not for a file that the user chose."""
    data = options(shared_store)
    chosen = [note for note in source.load(data).notes if "semi-empirical" in note]
    assert chosen == [
        f"The labels of this run are {Store(shared_store).level_of_theory}: a fast "
        "semi-empirical method."
    ]
    data.path = ""
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(source, "locate", lambda data: shared_store)
        loaded = source.load(data)
    assert loaded.level_of_theory.startswith("GFN2-xTB")
    note = next(n for n in loaded.notes if "semi-empirical" in n)
    assert (
        loaded.level_of_theory in note
        and "ωB97M" in note
        and "Zenodo" in note
        and note in caplog.text
    )
    spice = source.load(options(SPICE, reject_invalid=False))
    assert spice.level_of_theory == source.SPICE_LEVEL and not any(
        "semi-empirical" in n for n in spice.notes
    )


def test_notes_of_other_xtb_data_do_not_mention_spice(options, tmp_path):
    from ase.build import molecule
    from ase.calculators.singlepoint import SinglePointCalculator

    frames = []
    for name in ("CH3OH", "H2O", "CH4"):
        atoms = molecule(name)
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((len(atoms), 3)))
        frames.append(atoms)
    ase.io.write(tmp_path / "some.xyz", frames)
    loaded = source.load(
        options(
            tmp_path / "some.xyz", reject_invalid=False, reader_options="level_of_theory=GFN1-xTB"
        )
    )
    note = next(n for n in loaded.notes if "semi-empirical" in n)
    assert note == "The labels of this run are GFN1-xTB: a fast semi-empirical method."


def test_copies_in_given_splits_are_no_warning(options, tmp_path):
    """Detects advice on the split of structures that a task repeats on purpose."""
    lines = "3\nProperties=species:S:1:pos:R:3 energy=-138.0\nO 0 0 0\nH 0 0 0.96\nH 0 0.93 -0.24\n"
    (tmp_path / "twice.xyz").write_text(10 * lines)
    data = options(tmp_path / "twice.xyz", reject_invalid=False)
    assert any("exact copies" in note for note in source.load(data).notes)
    data.split_files = "split.json"
    assert not any("exact copies" in note for note in source.load(data).notes)


def test_isolated_atoms_implied_by_formation_energies(options, shared_store):
    with h5py.File(DATA) as file:
        expected = {
            s: e * units.Hartree
            for s, e in json.loads(file.attrs["energies_of_isolated_atoms"]).items()
        }
    actual = source.isolated_atoms(source.load(options(shared_store)))
    occurring = {"H", "C", "N", "O", "S", "Cl"}
    for symbol in occurring:
        np.testing.assert_allclose(actual[atomic_numbers[symbol]], expected[symbol], atol=1e-5)
    assert {z for z in range(len(actual)) if np.isfinite(actual[z])} == {
        atomic_numbers[s] for s in occurring
    }
    # Chlorine occurs in one molecule only, which is excluded.
    actual = source.isolated_atoms(
        source.load(options(shared_store, elements=("H", "C", "N", "O", "S")))
    )
    assert np.isnan(actual[17]) and np.isfinite(actual[16])


def test_isolated_atoms_stated_by_the_data(options, tmp_path):
    with h5py.File(tmp_path / "1000.hdf5", "w") as file:
        for name, x in (("i1-c1-opt", 0.96), ("i1-c1-1", 0.97)):
            group = file.create_group(f"10/Geom-m10-{name}")
            group["atNUM"] = np.array([8, 1, 1])
            group["atXYZ"] = np.array([[0.0, 0.0, 0.0], [x, 0.0, 0.0], [-0.24, 0.93, 0.0]])
            group["ePBE0+MBD"], group["totFOR"] = np.array([-2078.0 - x]), np.zeros((3, 3))
    loaded = source.load(options(tmp_path / "1000.hdf5", reader="qm7x", reject_invalid=False))
    stated = loaded.store.manifest["atom_energies"]
    assert len(stated) > 3
    actual = source.isolated_atoms(loaded)
    for symbol, energy in stated.items():
        assert actual[atomic_numbers[symbol]] == energy
    assert np.isfinite(actual).sum() == len(stated)


def test_unknown_isolated_atoms_give_none(options, tmp_path):
    (tmp_path / "frames.xyz").write_text(FRAMES)
    assert (
        source.isolated_atoms(source.load(options(tmp_path / "frames.xyz", reject_invalid=False)))
        is None
    )

    def without(file):
        for group in file.values():
            del group["formation_energy"]

    loaded = source.load(options(edited(tmp_path / "bare.hdf5", without)))
    assert source.isolated_atoms(loaded) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("least_squares", "least_squares"),
        ("isolated_atoms", "isolated_atoms"),
        ("none", "none"),
        ("H=-13.6", {"H": -13.6}),
        (" H = -13.6 , C=-1.0294e3 ", {"H": -13.6, "C": -1029.4}),
    ],
)
def test_reference_energies_are_parsed(text, expected):
    assert source.parse_reference(text) == expected


@pytest.mark.parametrize("text", ["H=", "H=a", "H=1=2", "H=-13.6;C=-1029", "H=-13.6,C", "H=-13.6,"])
def test_invalid_reference_energies_are_rejected(text):
    with pytest.raises(ValueError, match="expected 'H=-13.6,C=-1029.4,...' in eV, received"):
        source.parse_reference(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        (" ; ", {}),
        ("stride=4", {"stride": 4}),
        ("stages=('pm3', 'DFT_1st'); stride=4;", {"stages": ["pm3", "DFT_1st"], "stride": 4}),
        ("level=PBE0", {"level": "PBE0"}),
        ("keep=True; x=None; y=1.5", {"keep": True, "x": None, "y": 1.5}),
    ],
)
def test_reader_options_are_parsed(text, expected):
    assert source.reader_options(text) == expected


def test_excluded_structures_are_listed(options, tmp_path):
    loaded = source.load(options(DATA, charge=0.0, max_atoms=8))
    source.write_excluded(tmp_path / "left_out.csv", loaded)
    rows = [
        line.rsplit(",", 1) for line in (tmp_path / "left_out.csv").read_text().splitlines()[1:]
    ]
    expected = [
        (f"{s.source}#{s.conformer}", "charge" if s.charge else "too many atoms")
        for s in structures()
        if s.charge or len(s) > 8
    ]
    assert [tuple(row) for row in rows] == expected and len(rows) == 102 - len(loaded.indices) > 10


def test_isolated_atoms_in_the_file_are_found(options, tmp_path):
    """reference_energies=isolated_atoms used to find no atoms that are structures of the file."""
    frames = "".join(
        f"{n}\nenergy={energy}\n{rows}"
        for n, energy, rows in ((1, -13.5, "H 0 0 0\n"), (2, -31.7, "H 0 0 0\nH 0 0 0.74\n"))
    )
    (tmp_path / "frames.xyz").write_text(frames)
    loaded = source.load(options(tmp_path / "frames.xyz", reject_invalid=False, min_atoms=2))
    assert len(loaded.indices) == 1
    energies = source.isolated_atoms(loaded)
    assert energies[1] == -13.5 and np.isnan(energies[6])


def test_property_runs_do_not_note_missing_energies(options, tmp_path):
    path = tmp_path / "gaps.csv"
    path.write_text("smiles,gap\nC,10.0\nCC,9.0\n")
    given = {"elements": None, "charge": None}
    assert not source.load(options(path, require="none", **given)).notes
    with pytest.raises(DatasetError, match="no structure has an energy|passes the filters"):
        source.load(options(path, **given))
