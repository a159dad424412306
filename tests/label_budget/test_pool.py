"""Tests for the pool of molecules and for candidates that need no force field."""

import dataclasses

import numpy as np
import pytest
from ase.build import molecule
from ase.io import iread, write

from mlip_jax.checkpoint import CheckpointError
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.smiles.entries import CsvColumns
from mlip_jax.label_budget.candidates import Displacements, propose
from mlip_jax.label_budget.columns_file import load_columns, save_columns
from mlip_jax.label_budget.geometry import environment, is_physical
from mlip_jax.label_budget.pool import PoolMolecule, read_pool, split_pool
from mlip_jax.structure import Structure
from mlip_jax.tasks.active_learning.function import _molecule_file
from mlip_jax.tasks.active_learning.outputs import write_labels
from mlip_jax.tasks.fine_tune import next_structures

pytest.importorskip("rdkit")
KINDS = ("conformers", "modes", "random")


def read(path, **options):
    defaults = dict(columns=CsvColumns(), limit=None, mmff=True, seed=0, num_processes=1)
    return read_pool(path, **defaults | dict(num_conformers=2) | options)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    path = tmp_path_factory.mktemp("pool") / "molecules.smi"
    path.write_text("CCO\nOCC\nCC(C)=O\nCO\nc1ccccc1X\nCS\nC\n")
    return read(path)


def test_molecules_are_grouped_and_unusable_ones_named(pool):
    """Detects a molecule that is written twice and so could be in two splits."""
    molecules, unusable = pool
    assert [m.name for m in molecules] == ["CCO", "CC(C)=O", "CO", "CS", "C"]
    assert all(len(m.geometries) == 2 for m in molecules)
    assert list(unusable) == ["c1ccccc1X"]


def test_candidates_are_physical_reproducible_and_of_all_kinds(pool, tmp_path):
    molecules = pool[0][:2]
    options = Displacements(KINDS, 8, (200.0, 800.0), 0.05, 0)
    columns, again = propose(molecules, options, 1), propose(molecules, options, 1)
    np.testing.assert_array_equal(columns.positions, again.positions)
    for m in molecules:
        rows = np.flatnonzero(columns.molecule == m.name)
        assert sorted(set(columns.subset[rows])) == sorted(KINDS) and len(rows) == 8
        for k in rows:
            start = m.geometries[columns.conformer[k]]
            assert is_physical(start, columns[k].positions)
            moved = np.abs(columns[k].positions - start.positions).max()
            assert (moved < 1e-9) == (columns.subset[k] == "conformers") and moved < 1.0
    save_columns(tmp_path / "columns.npz", columns)
    stored = load_columns(tmp_path / "columns.npz")
    np.testing.assert_array_equal(stored.positions, columns.positions)
    assert stored.molecule.tolist() == columns.molecule.tolist() and len(stored) == len(columns)


def test_long_names_are_stored_and_read(pool, tmp_path):
    """NumPy's arrays of text have 40 kB per name here, so the file was rejected as a bomb."""
    columns = propose(pool[0][:1], Displacements(("conformers",), 4, (200.0, 800.0), 0.05, 0), 1)
    columns = columns.take(np.arange(len(columns)).repeat(1000))
    names = np.array([f"{k}{'a' * 10_000}\ud800" for k in range(len(columns))], object)
    columns = dataclasses.replace(columns, molecule=names)
    save_columns(tmp_path / "columns.npz", columns)
    stored = load_columns(tmp_path / "columns.npz")
    assert stored.molecule.tolist() == names.tolist()
    assert stored.smiles.tolist() == columns.smiles.tolist()
    np.testing.assert_array_equal(stored.positions, columns.positions)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("offsets", [0, 9, 3]),
        ("energy", ["a"] * 2),
        ("energy", [1.0]),
        ("molecule_code", [-1] * 2),
        ("molecule_code", [7] * 2),
        ("molecule_ends", [2.5]),
        ("positions", np.zeros((5, 2))),
    ],
)
def test_columns_of_another_form_are_corrupted(pool, tmp_path, name, values):
    """A resumed folder of other people; the errors of NumPy came later and named no file."""
    path = tmp_path / "columns.npz"
    options = Displacements(("conformers",), 4, (200.0, 800.0), 0.05, 0)
    save_columns(path, propose(pool[0][:1], options, 1))
    assert len(load_columns(path)) == 2
    with np.load(path) as stored:
        np.savez(path, **{**stored, name: np.array(values)})
    with pytest.raises(CheckpointError, match=rf"columns.npz: corrupted .*{name.split('_')[0]}"):
        load_columns(path)


@pytest.mark.parametrize("form", ["xyz", "list"])
def test_structures_of_one_molecule_are_its_geometries(tmp_path, form):
    """Detects conformers of a molecule in two splits, with and without a file."""
    frames = [molecule(name) for name in ("CH3OH", "H2O", "CH3OH", "CH4")]
    frames[2].rattle(0.01)
    for atoms, smiles in zip(frames, ("CO", "O", "CO", "C")):
        atoms.info["smiles"] = smiles
    path = tmp_path / "frames.xyz"
    if form == "xyz":
        write(path, frames)
    else:
        path = _molecule_file(frames, tmp_path / "run")
    molecules, unusable = read(path)
    assert [(m.name, len(m.geometries), m.embedded) for m in molecules] == [
        ("CO", 2, False),
        ("O", 1, False),
        ("C", 1, False),
    ]
    assert not unusable
    with pytest.raises(DatasetError, match="expected a path, a list of SMILES"):
        _molecule_file([frames[0], "CO"], tmp_path / "run")


def test_structures_without_smiles_are_displaced_at_random():
    options = Displacements(("modes",), 5, (200.0, 800.0), 0.05, 0)
    columns = propose([PoolMolecule("water", "", (molecule("H2O"),), False)], options, 1)
    assert columns.subset.tolist() == ["given"] + 4 * ["random"]


def test_rare_elements_stay_in_training(pool):
    molecules = pool[0]
    parts = split_pool(molecules, (0.2, 0.2), 0)
    assert "CS" in [m.name for m in parts["train"]]
    assert sorted(m.name for part in parts.values() for m in part) == sorted(
        m.name for m in molecules
    )
    with pytest.raises(DatasetError, match="too few molecules: .* Validation takes"):
        split_pool(molecules, (0.5, 0.6), 0)


def test_each_element_of_held_out_molecules_stays_in_training():
    """Detects an element whose molecules are all held out, so that none can be evaluated."""
    names = ["CH3Cl", "HCl", "CCl4"] + ["CH4"] * 4
    molecules = [
        PoolMolecule(f"{name} {k}", "", (molecule(name),), False) for k, name in enumerate(names)
    ]
    for seed in range(40):
        parts = split_pool(molecules, (0.3, 0.3), seed)
        assert [len(parts[name]) for name in ("train", "valid", "test")] == [3, 2, 2]
        assert any(17 in m.geometries[0].numbers for m in parts["train"])


def test_broken_molecules_are_unphysical():
    start = molecule("CH3OH")
    assert is_physical(start, start.positions)
    for change in (np.nan, 1.5):
        positions = start.positions.copy()
        positions[-1] += change
        assert not is_physical(start, positions)
    assert environment(start, 0) == "C(H, H, H, O)"


def test_labels_are_written_on_one_line_per_atom(tmp_path):
    """A line break in a SMILES of a foreign store used to begin a new frame."""
    hostile = "C\n1\nenergy=0"
    structure = Structure(
        np.array([1], np.int32), np.zeros((1, 3)), energy=0.0, forces=np.zeros((1, 3)), charge=0.0
    )
    structure = dataclasses.replace(structure, smiles=hostile, molecule=hostile, subset=hostile)
    columns = Columns.from_structures([structure])
    save_columns(tmp_path / "valid.npz", columns)
    write_labels(tmp_path / "labels.xyz", tmp_path, "random", 0)
    with (tmp_path / "unseen.xyz").open("w") as file:
        write(file, next_structures.to_ase(columns, 0, 1.0), format="extxyz")
    for name in ("labels.xyz", "unseen.xyz"):
        (atoms,) = iread(tmp_path / name, ":", format="extxyz")
        assert atoms.info["smiles"] == "C 1 energy=0"
