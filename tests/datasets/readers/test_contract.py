"""Tests that every reader must pass. samples/<reader>.py creates a small file for a new reader.

Its function `add_label(path)` adds a label "surplus" that the reader does not read.
"""

import contextlib
import inspect
import pickle
import shutil
import sqlite3

import h5py
import numpy as np
import pytest

from mlip_jax.config import ConfigError
from mlip_jax.datasets import readers
from mlip_jax.datasets.charges import charge_from_smiles
from mlip_jax.datasets.identity import molecule_identity
from mlip_jax.datasets.reader import DatasetError, Reader, ReadReport

ALL = readers.names()


def structures(path, name, options, records=None):
    with readers.open_data(path, name, **options) as source:
        report = ReadReport()
        actual = list(source.read(range(len(source)) if records is None else records, report))
        assert report.structures == len(actual)
        return actual, report, len(source)


@pytest.mark.parametrize("name", ALL)
def test_format_is_detected(name, sample):
    path, _ = sample(name)
    assert readers.detect(path) == name


@pytest.mark.parametrize("name", ALL)
def test_structures_are_valid(name, sample):
    path, options = sample(name)
    actual, report, length = structures(path, name, options)
    assert len(actual) >= 2 and report.records == length
    assert sum(report.skipped.values()) == len(report.identities)
    for s in actual:
        assert s.numbers.ndim == 1 and len(s) >= 1 and ((s.numbers > 0) & (s.numbers < 119)).all()
        assert s.positions.dtype == np.float64 and np.isfinite(s.positions).all()
        assert s.forces is None or s.forces.dtype == np.float64
        assert isinstance(s.energy, float)
        assert s.molecule and path.stem.split(".")[0] in s.source or s.source
        assert 0 <= s.record < length and s.conformer >= 0
        for value in s.properties.values():
            assert np.asarray(value).dtype.kind in "fiub"
        for value in s.atom_properties.values():
            assert len(value) == len(s)
        if len(s) > 1:
            d = np.linalg.norm(s.positions[:, None] - s.positions[None], axis=-1)
            nearest = (d + 99 * np.eye(len(s))).min()
            assert 0.5 < nearest < 3.0, f"{s.source}: the shortest distance is {nearest} Å"
    assert len({(s.record, s.conformer) for s in actual}) == len(actual)


@pytest.mark.parametrize("name", ALL)
def test_record_ranges_equal_the_whole(name, sample):
    """Reading ranges of records, also with a new reader for each, equals reading the whole file."""
    path, options = sample(name)
    whole, _, length = structures(path, name, options)
    cuts = sorted({0, 1, length // 2, length})
    apart = [
        s for a, b in zip(cuts, cuts[1:]) for s in structures(path, name, options, range(a, b))[0]
    ]
    with readers.open_data(path, name, **options) as source:
        along = [s for a, b in zip(cuts, cuts[1:]) for s in source.read(range(a, b), ReadReport())]
    for other in (apart, along):
        assert [(s.record, s.conformer, s.molecule, s.source) for s in other] == [
            (s.record, s.conformer, s.molecule, s.source) for s in whole
        ]
        for a, b in zip(other, whole):
            np.testing.assert_array_equal(a.positions, b.positions)
            np.testing.assert_equal(a.energy, b.energy)


@pytest.mark.parametrize("name", ALL)
def test_reader_states_level_of_theory_and_units(name, sample):
    reader = readers.get(name)
    assert issubclass(reader, Reader) and reader.LEVEL_OF_THEORY and "positions" in reader.UNITS
    module = __import__(reader.__module__, fromlist=["__doc__"])
    assert len(module.__doc__.splitlines()) > 5, (
        "the module's docstring gives the layout and its source"
    )
    path, options = sample(name)
    with readers.open_data(path, name, **options) as source:
        assert (
            source.level_of_theory and source.files() and all(f.is_file() for f in source.files())
        )


@pytest.mark.parametrize("name", ALL)
def test_missing_files_and_unknown_options_are_reported(name, sample, tmp_path):
    with pytest.raises(DatasetError, match="nowhere: no such file"):
        readers.open_data(tmp_path / "nowhere", name)
    with pytest.raises(ConfigError, match="'no_such_option'"):
        readers.open_data(sample(name)[0], name, no_such_option=1)


@pytest.mark.parametrize("name", ALL)
def test_other_files_are_rejected_with_a_message(name, tmp_path):
    """Any other or empty file raises DatasetError."""
    for content in (b"", b"<html>404 not found</html>" * 40, bytes(range(256)) * 20):
        path = tmp_path / "strange.bin"
        path.write_bytes(content)
        assert not readers.get(name).matches(path)
        with pytest.raises(DatasetError, match="strange"):
            with readers.open_data(path, name) as source:
                list(source)


def test_unknown_reader_and_unknown_format_are_reported(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'spice'"):
        readers.get("spicee")
    (tmp_path / "a.bin").write_bytes(bytes(100))
    with pytest.raises(DatasetError, match="any known data set.*config.data.reader"):
        readers.detect(tmp_path / "a.bin")


def add_to_hdf5(path):
    """Add a label next to the positions of the first structure."""
    path = path / "1000.hdf5" if path.is_dir() else path
    with h5py.File(path, "a") as file:
        names = []
        file.visit(names.append)
        first = next(n for n in names if n.endswith(("atomic_numbers", "atNUM")))
        file[f"{first.rpartition('/')[0]}/surplus"] = np.zeros((3, 3))


def add_to_npz(path):
    arrays = dict(np.load(path))
    arrays["surplus"] = np.zeros(len(arrays.get("coords", arrays.get("positions"))))
    np.savez(path, **arrays)


def add_to_xyz(path):
    path.write_text(path.read_text().replace("charge=1", "charge=1 surplus=2.5"))


def add_to_archive(path):
    """The layout of QM9 is fixed. Its frequencies are never read."""


def add_to_pickle(path):
    path = path / "qm9" / "OCCO.pickle"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | {"surplus": 1.0}, 3))


def add_to_summary(path):
    table = path.with_name("summary.csv") if path.is_file() else path / "raw" / "properties.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0] + ",surplus", *(line + ",1.5" for line in lines[1:])]))


def add_to_database(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "UPDATE systems SET key_value_pairs = json_set(key_value_pairs, '$.surplus', 2.5)"
        )
        connection.commit()


ADD_LABEL = {
    "ani": add_to_hdf5,
    "ase": add_to_xyz,
    "geom": add_to_pickle,
    "md17": add_to_npz,
    "molecule3d": add_to_summary,
    "nabladft": add_to_database,
    "npz": add_to_npz,
    "pubchemqcr": add_to_summary,
    "qm7x": add_to_hdf5,
    "qm9": add_to_archive,
    "spice": add_to_hdf5,
}


# Option: two values, and the expected ratio of the results, by field of Structure.
UNIT_OPTIONS = {
    "energy_unit": ("hartree", "eV", {"energy": 27.211386}),
    "length_unit": ("bohr", "Ang", {"positions": 0.52917721}),
    "forces_unit": ("hartree/bohr", "eV/Ang", {"forces": 51.422067}),
    "forces_are_gradients": (True, False, {"forces": -1.0}),
}
WITH_UNITS = [
    (name, option)
    for name in ALL
    for option in UNIT_OPTIONS
    if option in inspect.signature(readers.get(name)).parameters
]


@pytest.mark.parametrize(("name", "option"), WITH_UNITS)
def test_unit_options_scale_the_labels(name, option, sample):
    path, options = sample(name)
    value, other, ratios = UNIT_OPTIONS[option]
    # Molecule3D compares the energies with those of its atoms, so only the right unit is accepted.
    if (name, option) == ("molecule3d", "energy_unit"):
        with pytest.raises(DatasetError, match="another unit"):
            structures(path, name, options | {option: value})
        return
    changed, _, _ = structures(path, name, options | {option: value})
    unchanged, _, _ = structures(path, name, options | {option: other})
    for a, b in zip(changed, unchanged, strict=True):
        for field, ratio in ratios.items():
            expected = np.asarray(getattr(b, field), np.float64) * ratio
            np.testing.assert_allclose(getattr(a, field), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_molecules_with_smiles_have_the_common_identity(name, sample):
    """Each reader used to define its own, so spellings and mirror images were in two splits."""
    pytest.importorskip("rdkit")
    path, options = sample(name)
    if name == "molecule3d":
        options = options | {"smiles": True}
    for s in structures(path, name, options)[0]:
        assert not s.smiles or s.molecule == molecule_identity(s.smiles)
        # All molecules of QM9 are neutral; its SMILES were derived from geometries.
        assert not s.smiles or name == "qm9" or s.charge == charge_from_smiles(s.smiles)


@pytest.mark.parametrize("name", ALL)
def test_labels_that_are_not_read_are_reported(name, sample, tmp_path):
    """A label that a file contains and a reader ignores is named in the notes of the store."""
    path, options = sample(name)
    copy = tmp_path / path.name
    (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
    if path.with_name("summary.csv").is_file():
        shutil.copy(path.with_name("summary.csv"), tmp_path)
    (ADD_LABEL.get(name) or sample.modules[name].add_label)(copy)
    with readers.open_data(copy, name, **options) as source:
        report = ReadReport()
        list(source.read(range(len(source)), report))
        (note,) = [n for n in report.notes(source) if "not read" in n]
    assert ("frequencies (" if name == "qm9" else "surplus (") in note
    assert source.UNREAD_REMEDY in note
