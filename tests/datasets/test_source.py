"""From config.data to structures: found, converted once, selected, split."""

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
from rdkit import Chem
from rdkit.DataStructs import TanimotoSimilarity

from mlip_jax import defaults
from mlip_jax.datasets import readers, source
from mlip_jax.datasets.molecules.fingerprints import morgan_fingerprint
from mlip_jax.datasets.quality.filters import CODES, Filters
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection.scaffolds import murcko_scaffold
from mlip_jax.datasets.store.conversion import ConversionSpec, convert
from mlip_jax.datasets.store.store import MANIFEST, Store, is_store

DATA = Path(__file__).parents[1] / "data/gfn2_small.hdf5"
SPICE = Path(__file__).parents[1] / "data/spice_1.1.4_small.hdf5"
CONFORMERS = 6  # of every molecule of DATA

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


@pytest.fixture
def options(tmp_path):
    """options(path, ...) -> config.data of a training run that keeps its data in tmp_path/data; no filters set."""
    (tmp_path / "data").mkdir()

    def make(path=None, **changes):
        data = defaults.train_defaults().data
        data.directory = str(tmp_path / "data")
        data.elements = None
        if path is not None:
            data.path = str(path)
        data.update(changes)
        return data

    return make


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of DATA in several shards."""
    return convert(
        ConversionSpec(str(DATA), atoms_per_shard=300),
        tmp_path_factory.mktemp("made") / "store",
        num_processes=1,
        progress=False,
    )


def structures(path=DATA):
    with readers.open_data(path) as opened:
        return list(opened)


def edited(path, change, original=DATA):
    """A copy of a file where `change` was applied to it."""
    shutil.copy(original, path)
    with h5py.File(path, "a") as file:
        change(file)
    return path


def stores(options):
    return sorted(p.name for p in (Path(options.directory) / "stores").glob("*") if is_store(p))


def test_locate_takes_the_path_that_is_given(options):
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


def test_locate_makes_the_embedded_data_set_where_there_is_nothing(options, caplog, monkeypatch):
    """Making it is tested with it; here, that it is asked for by the right name and said what it is."""
    asked = []

    def generate(path, *, num_conformations):
        asked.append((path, num_conformations))
        return path

    from mlip_jax.datasets import builtin

    monkeypatch.setattr(builtin, "generate_embedded", generate)
    data = options(num_generated=123)
    with caplog.at_level(logging.WARNING):
        path = source.locate(data)
    assert (
        asked == [(Path(path), 123)]
        and Path(path).parent == Path(data.directory)
        and "123" in Path(path).name
    )
    assert "GFN2-xTB" in caplog.text and "Zenodo" in caplog.text
    caplog.clear()
    Path(path).touch()
    assert source.locate(data) == path and not caplog.text


def test_a_file_is_converted_once(options, caplog):
    data = options(DATA)
    with caplog.at_level(logging.INFO):
        store = source.open_store(data)
    assert store.path.parent == Path(data.directory) / "stores" and "gfn2_small" in store.path.name
    assert "converting" in caplog.text and len(store) == 102
    # The lock is touched, what the store consists of is not.
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


def test_the_same_file_under_another_path_is_the_same_store(options, monkeypatch):
    store = source.open_store(options(DATA))
    monkeypatch.chdir(DATA.parent)
    assert source.open_store(options(DATA.name)).path == store.path


@pytest.mark.parametrize("change", ["touched", "other bytes"])
def test_a_changed_file_is_another_store(options, tmp_path, change):
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


def test_other_reader_options_are_another_store(options, tmp_path):
    path = tmp_path / "frames.xyz"
    path.write_text(FRAMES)
    data, other = options(path, refuse=False), options(path, refuse=False)
    other.reader_options = "energy_key=free"
    first, second = source.open_store(data), source.open_store(other)
    assert first.path != second.path and len(stores(data)) == 2
    assert first.index("energy").tolist() == [-2078.25, -31.5] and second.index(
        "energy"
    ).tolist() == [-2078.5, -31.75]


def test_a_store_is_used_where_it_is(options, made):
    data = options(made)
    store = source.open_store(data)
    assert store.path == made and not stores(data)
    assert source.load(data).name == made.name


@pytest.mark.parametrize(
    "damage", ["other bytes", "shorter", "no shard", "no manifest", "manifest cut"]
)
@pytest.mark.parametrize("verify", [None, True, False])
def test_a_damaged_store_that_was_made_of_a_file_is_mended(options, damage, verify):
    data = options(DATA, verify=verify)
    store = source.open_store(data)
    shard, manifest = (
        store.path / "shards" / store.manifest["shards"][0]["file"],
        store.path / MANIFEST,
    )
    sound, told = shard.read_bytes(), json.loads(manifest.read_text())
    other = sound[:-10] + bytes(10)
    {
        "other bytes": lambda: shard.write_bytes(other),
        "shorter": lambda: shard.write_bytes(sound[:1000]),
        "no shard": shard.unlink,
        "no manifest": manifest.unlink,
        "manifest cut": lambda: manifest.write_text(manifest.read_text()[:300]),
    }[damage]()
    again = source.open_store(data)
    assert again.path == store.path and json.loads(manifest.read_text()) == told
    # What has the right size is compared with its checksum only where that is asked for, or the store is small.
    assert shard.read_bytes() == (other if damage == "other bytes" and verify is False else sound)


@pytest.mark.parametrize("verify", [None, True, False])
def test_a_damaged_store_that_is_given_is_refused(options, made, tmp_path, verify):
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    shard = next((copy / "shards").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10] + bytes(10))
    if verify is False:
        assert len(source.open_store(options(copy, verify=False))) == 102
    else:
        with pytest.raises(DatasetError, match=f"checksums: {shard.name}"):
            source.open_store(options(copy, verify=verify))


def test_a_large_store_is_not_verified_at_every_start(options, made, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    shard = next((copy / "shards").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10] + bytes(10))
    monkeypatch.setattr(source, "_VERIFY_UP_TO", 1000)
    assert len(source.open_store(options(copy))) == 102
    with pytest.raises(DatasetError, match="checksums"):
        source.open_store(options(copy, verify=True))


def flipped(file):
    for group in file.values():
        group["dft_total_gradient"][:] = -group["dft_total_gradient"][:]


def test_what_the_checks_refuse_is_refused_also_if_it_was_converted_before(options, tmp_path):
    path = edited(tmp_path / "flipped.hdf5", flipped)
    with pytest.raises(
        DatasetError, match="(?s)refused by the checks.*gradients.*data.refuse=False"
    ):
        source.open_store(options(path))
    assert len(source.open_store(options(path, refuse=False))) == 102
    with pytest.raises(
        DatasetError, match="(?s)refused by the checks.*gradients.*data.refuse=False"
    ):
        source.open_store(options(path))
    assert any("gradients" in note for note in source.load(options(path, refuse=False)).notes)


def test_what_is_not_there(options, tmp_path):
    with pytest.raises(DatasetError, match="nowhere.hdf5: no such file"):
        source.load(options(tmp_path / "nowhere.hdf5"))


def test_filters_count_what_they_leave_out(options, made):
    data = options(made, elements=("H", "C", "N", "O", "S"), charge=0.0)
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
def test_each_filter(options, made, field, value, kept):
    expected = np.flatnonzero([kept(s) for s in structures()])
    assert 0 < len(expected) < 102
    np.testing.assert_array_equal(source.load(options(made, **{field: value})).indices, expected)


def shortest(x):
    d = np.linalg.norm(x[:, None] - x[None], axis=-1)
    return d[np.triu_indices(len(x), 1)].min()


def test_nothing_passes(options, made):
    with pytest.raises(
        DatasetError, match=r"none of 102 structures.*'elements': 102.*Change data.elements"
    ):
        source.load(options(made, elements=("He",)))


def test_outliers_among_the_conformations_of_a_molecule(options, tmp_path):
    """One conformation far off in energy, one in forces, and one whose molecule is small once others are left out."""

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
        loaded = source.load(options(path, refuse=False, **filters))
        np.testing.assert_array_equal(
            loaded.indices, np.setdiff1d(everything, left_out), err_msg=str(filters)
        )
    assert loaded.counts["left out"] == {"energy outlier": 1}
    # Outliers are sought among what the other filters leave.
    store = source.open_store(options(path, refuse=False))
    reasons = source.select(store, Filters(max_atoms=9, max_energy_z=10.0))
    assert (
        reasons[energy] == CODES["too many atoms"]
        and not (reasons == CODES["energy outlier"]).any()
    )


def test_notes_say_when_labels_are_not_those_of_spice(options, made, caplog):
    with caplog.at_level(logging.WARNING):
        loaded = source.load(options(made))
    assert loaded.level_of_theory.startswith("GFN2-xTB")
    note = next(n for n in loaded.notes if "semi-empirical" in n)
    assert (
        loaded.level_of_theory in note
        and "ωB97M" in note
        and "Zenodo" in note
        and note in caplog.text
    )
    spice = source.load(options(SPICE, refuse=False))
    assert spice.level_of_theory == source.SPICE_LEVEL and not any(
        "semi-empirical" in n for n in spice.notes
    )


def test_other_data_with_xtb_labels_are_not_told_where_spice_is(options, tmp_path):
    from ase.build import molecule
    from ase.calculators.singlepoint import SinglePointCalculator

    frames = []
    for name in ("CH3OH", "H2O", "CH4"):
        atoms = molecule(name)
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((len(atoms), 3)))
        frames.append(atoms)
    ase.io.write(tmp_path / "some.xyz", frames)
    loaded = source.load(
        options(tmp_path / "some.xyz", refuse=False, reader_options="level_of_theory=GFN1-xTB")
    )
    note = next(n for n in loaded.notes if "semi-empirical" in n)
    assert note == "The labels of this run are GFN1-xTB: a fast semi-empirical method."


def check_parts(parts, loaded):
    assert set(parts) == {"train", "valid", "test"}
    together = np.concatenate(list(parts.values()))
    assert len(np.unique(together)) == len(together) and np.isin(together, loaded.indices).all()


def labels_of(parts, values):
    return [set(np.asarray(values)[parts[name]].tolist()) for name in ("train", "valid", "test")]


def disjoint(sets):
    return all(sets) and not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


@pytest.mark.parametrize("by", ["random", "molecule", "size", "scaffold", "scaffold_random"])
def test_every_method_of_splitting(options, made, by):
    if by.startswith("scaffold"):
        pytest.importorskip("rdkit")
    # A filter, so that numbers in the store are not places in the selection.
    data = options(made, charge=0.0, min_atoms=7, split=by, num_train=60, num_valid=12, num_test=12)
    loaded = source.load(data)
    parts = source.split(loaded, data)
    check_parts(parts, loaded)
    assert len(loaded.indices) < 102 and all(len(p) for p in parts.values())
    all_structures = structures()
    molecules = labels_of(parts, [s.molecule for s in all_structures])
    if by == "random":
        assert molecules[0] & molecules[2]
        assert [len(parts[n]) for n in parts] == [60, 12, 12]
    else:
        assert disjoint(molecules)
    if by == "size":
        sizes = labels_of(parts, [len(s) for s in all_structures])
        assert max(sizes[0]) < min(sizes[1]) and max(sizes[1]) < min(sizes[2])
    if by.startswith("scaffold"):
        assert disjoint(labels_of(parts, [murcko_scaffold(s.smiles) for s in all_structures]))
    again = source.split(loaded, data)
    assert all(np.array_equal(again[n], parts[n]) for n in parts)


@pytest.mark.parametrize("by", ["random", "molecule"])
def test_another_seed_is_another_split(options, made, by):
    parts = [
        source.split(source.load(data), data)
        for data in (
            options(made, split=by, split_seed=seed, num_train=60, num_valid=12, num_test=12)
            for seed in (0, 1)
        )
    ]
    assert not np.array_equal(parts[0]["test"], parts[1]["test"])


RECORDS = {"train": [0, 3, 4, 5, 6, 7, 8], "valid": [9, 16], "test": [2, 1]}


def test_own_split_by_record(options, made, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps(RECORDS))
    for name, records in RECORDS.items():
        (tmp_path / f"index_{name}.csv").write_text("".join(f"{r}\n" for r in records))
    texts = ",".join(str(tmp_path / f"index_{name}.csv") for name in RECORDS)
    named = ",".join(f"{name}={tmp_path}/index_{name}.csv" for name in RECORDS)
    record = np.array([s.record for s in structures()])
    neutral = np.array([s.charge == 0 for s in structures()])
    for files in (str(tmp_path / "split.json"), texts, named):
        data = options(made, charge=0.0, split_files=files)
        loaded = source.load(data)
        parts = source.split(loaded, data)
        check_parts(parts, loaded)
        for name, records in RECORDS.items():
            np.testing.assert_array_equal(
                parts[name], np.flatnonzero(np.isin(record, records) & neutral)
            )
        assert len(parts["test"]) == CONFORMERS, "acetate, record 2, is charged"


def test_own_split_of_another_file(options, made, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps({"train": [0, 1], "test": [17]}))
    data = options(made, split_files=str(tmp_path / "split.json"))
    with pytest.raises(DatasetError, match="beyond the last record 16"):
        source.split(source.load(data), data)


def test_official_split_that_there_is_none_of(options, made):
    data = options(made, split="official")
    with pytest.raises(ValueError, match="no split of its own.*data.split_files"):
        source.split(source.load(data), data)


def test_scaffolds_without_smiles(options, tmp_path):
    def without(file):
        for group in file.values():
            del group["smiles"]

    data = options(edited(tmp_path / "bare.hdf5", without), split="scaffold")
    with pytest.raises(DatasetError, match="needs SMILES.*Choose another data.split"):
        source.split(source.load(data), data)


def test_isolated_atoms_implied_by_formation_energies(options, made):
    with h5py.File(DATA) as file:
        expected = {
            s: e * units.Hartree
            for s, e in json.loads(file.attrs["energies_of_isolated_atoms"]).items()
        }
    found = source.isolated_atoms(source.load(options(made)))
    occurring = {"H", "C", "N", "O", "S", "Cl"}
    for symbol in occurring:
        np.testing.assert_allclose(found[atomic_numbers[symbol]], expected[symbol], atol=1e-5)
    assert {z for z in range(len(found)) if np.isfinite(found[z])} == {
        atomic_numbers[s] for s in occurring
    }
    # Chlorine stands in one molecule, which is left out.
    found = source.isolated_atoms(source.load(options(made, elements=("H", "C", "N", "O", "S"))))
    assert np.isnan(found[17]) and np.isfinite(found[16])


def test_isolated_atoms_that_the_data_state(options, tmp_path):
    with h5py.File(tmp_path / "1000.hdf5", "w") as file:
        for name, x in (("i1-c1-opt", 0.96), ("i1-c1-1", 0.97)):
            group = file.create_group(f"10/Geom-m10-{name}")
            group["atNUM"] = np.array([8, 1, 1])
            group["atXYZ"] = np.array([[0.0, 0.0, 0.0], [x, 0.0, 0.0], [-0.24, 0.93, 0.0]])
            group["ePBE0+MBD"], group["totFOR"] = np.array([-2078.0 - x]), np.zeros((3, 3))
    loaded = source.load(options(tmp_path / "1000.hdf5", reader="qm7x", refuse=False))
    stated = loaded.store.manifest["atom_energies"]
    assert len(stated) > 3
    found = source.isolated_atoms(loaded)
    for symbol, energy in stated.items():
        assert found[atomic_numbers[symbol]] == energy
    assert np.isfinite(found).sum() == len(stated)


def test_isolated_atoms_that_are_not_known(options, tmp_path):
    (tmp_path / "frames.xyz").write_text(FRAMES)
    assert (
        source.isolated_atoms(source.load(options(tmp_path / "frames.xyz", refuse=False))) is None
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
def test_reference_energies_as_text(text, expected):
    assert source.parse_reference(text) == expected


@pytest.mark.parametrize("text", ["H=", "H=a", "H=1=2", "H=-13.6;C=-1029", "H=-13.6,C", "H=-13.6,"])
def test_reference_energies_that_cannot_be_read(text):
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
def test_reader_options_as_text(text, expected):
    assert source.reader_options(text) == expected


def test_nested_subsets_of_the_training_part(options):
    def parts(**fields):
        data = options(DATA, num_train=80, num_valid=10, num_test=10, min_conformers=5, **fields)
        loaded = source.load(data)
        return loaded.store, source.split(loaded, data)

    store, whole = parts()
    _, large = parts(num_molecules=6, num_conformers=5)
    _, small = parts(num_molecules=3, num_conformers=2)
    assert len(large["train"]) == 30 and len(small["train"]) == 6
    assert set(small["train"]) < set(large["train"]) < set(whole["train"])
    assert len(np.unique(store.index("molecule")[small["train"]])) == 3
    for name in ("valid", "test"):
        np.testing.assert_array_equal(small[name], whole[name])


def test_molecules_of_fewer_conformers_of_the_training_part(options):
    def train(**fields):
        data = options(
            DATA,
            num_train=80,
            num_valid=10,
            num_test=10,
            num_molecules=6,
            num_conformers=2,
            **fields,
        )
        loaded = source.load(data)
        return source.split(loaded, data)["train"]

    more = CONFORMERS + 1
    with pytest.raises(
        ValueError, match=f"6 molecules with at least {more} conformations are asked for; 0 of"
    ):
        train(min_conformers=more)
    found = train(min_conformers=more, fewer_conformers="last")
    assert len(found) == 12 and np.array_equal(found, train())
    with pytest.raises(ValueError, match="unknown data.fewer_conformers 'first'"):
        train(fewer_conformers="first")
    with pytest.raises(ValueError, match="data.selection must be 'random'"):
        train(fewer_conformers="last", selection="maxmin")


def test_diverse_molecules_of_the_training_part(options, tmp_path):
    def molecules(**fields):
        data = options(
            DATA,
            num_train=80,
            num_valid=10,
            num_test=10,
            min_conformers=2,
            num_conformers=2,
            **fields,
        )
        loaded = source.load(data)
        train = source.split(loaded, data)["train"]
        codes, smiles = loaded.store.texts("smiles")
        return {smiles[c] for c in codes[train]}, len(train)

    few, size = molecules(num_molecules=3, selection="maxmin")
    more, _ = molecules(num_molecules=6, selection="maxmin")
    drawn, _ = molecules(num_molecules=6)
    assert len(few) == 3 and size == 6 and few < more and len(more) == 6 and more != drawn

    def nearest(names):
        prints = [
            morgan_fingerprint(Chem.RemoveHs(Chem.MolFromSmiles(name))) for name in sorted(names)
        ]
        return max(TanimotoSimilarity(a, b) for i, a in enumerate(prints) for b in prints[:i])

    assert nearest(more) < nearest(drawn)
    with pytest.raises(ValueError, match="data.selection 'maxmim'.*Did you mean 'maxmin'"):
        molecules(num_molecules=3, selection="maxmim")


def test_molecules_of_the_training_part_by_features(options):
    """Nested, by the first conformer of each molecule; those asked for do not depend on the split."""
    asked = []

    def embed(store, indices):
        assert (np.asarray(store.index("conformer")[indices]) == 0).all()
        asked.append(indices)
        return np.array([[store[i].numbers.mean(), len(store[i])] for i in indices])

    def molecules(**fields):
        data = options(
            DATA,
            num_train=80,
            num_valid=10,
            num_test=10,
            min_conformers=2,
            num_conformers=2,
            selection="embedding",
            **fields,
        )
        loaded = source.load(data)
        train = source.split(loaded, data, embed)["train"]
        assert len(train) == 2 * fields["num_molecules"]
        return set(np.asarray(loaded.store.index("molecule")[train]).tolist())

    few, more = molecules(num_molecules=3), molecules(num_molecules=6)
    other = molecules(num_molecules=6, split_seed=1)
    assert few < more != other and all(np.array_equal(a, asked[0]) for a in asked)
    data = options(
        DATA, num_train=80, num_valid=10, num_test=10, num_molecules=3, selection="embedding"
    )
    with pytest.raises(ValueError, match="data.selection='embedding' needs the features"):
        source.split(source.load(data), data)


def test_what_filters_took_is_listed(options, tmp_path):
    loaded = source.load(options(DATA, charge=0.0, max_atoms=8))
    source.write_left_out(tmp_path / "left_out.csv", loaded)
    rows = [
        line.rsplit(",", 1) for line in (tmp_path / "left_out.csv").read_text().splitlines()[1:]
    ]
    expected = [
        (f"{s.source}#{s.conformer}", "charge" if s.charge else "too many atoms")
        for s in structures()
        if s.charge or len(s) > 8
    ]
    assert [tuple(row) for row in rows] == expected and len(rows) == 102 - len(loaded.indices) > 10
