"""Tests for unseen conformers of training molecules and their distances to the seen ones."""

import numpy as np
import pytest

Chem = pytest.importorskip("rdkit.Chem")

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.identity import stable_ids
from mlip_jax.datasets.molecules.symmetry import best_rms, molecule_of
from mlip_jax.datasets.selection.generalization import (
    distances_to_training,
    near_and_far,
    unseen_conformers,
)
from mlip_jax.datasets.selection.subsets import nested_subset, with_min_conformers
from mlip_jax.structure import Structure

MOLECULE, CONFORMER = np.repeat(np.arange(30), 9), np.tile(np.arange(9), 30)


@pytest.mark.parametrize("n_s, n_c", [(20, 1), (10, 2), (5, 6)])
def test_unseen_conformers_are_unseen_in_all_runs(n_s, n_c):
    """Molecules of a small subset are in the large one, with the same unseen conformers."""
    train = nested_subset(MOLECULE, CONFORMER, n_s, n_c, seed=3, min_conformers=6)
    unseen = unseen_conformers(MOLECULE, CONFORMER, train, num_conformers=6, seed=3)
    assert len(unseen) == 3 * n_s and set(MOLECULE[unseen]) == set(MOLECULE[train])
    everything = nested_subset(MOLECULE, CONFORMER, 30, 6, seed=3)
    assert not np.isin(unseen, everything).any()
    small = unseen_conformers(MOLECULE, CONFORMER, train, num_conformers=6, seed=3, max_molecules=4)
    largest = nested_subset(MOLECULE, CONFORMER, 20, 6, seed=3)
    assert np.array_equal(
        small,
        unseen_conformers(MOLECULE, CONFORMER, largest, num_conformers=6, seed=3, max_molecules=4),
    )


def test_only_allowed_structures_are_used():
    train = nested_subset(MOLECULE, CONFORMER, 5, 6, seed=0)
    among = np.union1d(train, np.flatnonzero(CONFORMER < 8))
    unseen = unseen_conformers(
        MOLECULE,
        CONFORMER,
        nested_subset(MOLECULE, CONFORMER, 5, 6, seed=0),
        num_conformers=6,
        seed=0,
    )
    actual = unseen_conformers(MOLECULE, CONFORMER, train, num_conformers=6, seed=0, among=among)
    assert set(actual) == set(unseen) & set(among)
    every = nested_subset(MOLECULE, CONFORMER, 5, 9, seed=0)
    assert len(unseen_conformers(MOLECULE, CONFORMER, every, num_conformers=9, seed=0)) == 0


def test_another_draw_is_rejected():
    train = nested_subset(MOLECULE, CONFORMER, 5, 6, seed=0)
    with pytest.raises(ValueError, match="differs from that of the draw"):
        unseen_conformers(MOLECULE, CONFORMER, train, num_conformers=6, seed=1)


def test_molecules_with_many_conformers():
    molecule = np.array([5, 5, 5, 7, 7, 9])
    assert with_min_conformers(molecule, np.arange(6), 2).tolist() == [0, 1, 2, 3, 4]
    assert with_min_conformers(molecule, np.array([0, 3, 4, 5]), 2).tolist() == [3, 4]


def test_near_and_far():
    actual = near_and_far(np.array([0.2, 1.0, 1.1, np.nan]), 1.0)
    assert actual["iid_c"].tolist() == [0, 1] and actual["ood_c"].tolist() == [2]
    with pytest.raises(ValueError, match="must be positive"):
        near_and_far(np.zeros(1), 0.0)


class Rows:
    """Store in memory."""

    def __init__(self, structures):
        self._columns = Columns.from_structures(structures)

    def index(self, name):
        return (
            stable_ids(self._columns.molecule.astype(str))
            if name == "molecule"
            else getattr(self._columns, name)
        )

    def take(self, indices, **_):
        return self._columns.take(indices)


def conformers(smiles, count, reorder=False):
    from rdkit.Chem import rdDistGeom

    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMultipleConfs(mol, count, randomSeed=3)
    numbers = np.array([a.GetAtomicNum() for a in mol.GetAtoms()])
    order = np.arange(len(numbers))[::-1] if reorder else np.arange(len(numbers))
    return [
        Structure(
            numbers=numbers[order],
            positions=c.GetPositions()[order],
            molecule=smiles,
            smiles=smiles,
            conformer=i,
        )
        for i, c in enumerate(mol.GetConformers())
    ]


def test_distances_equal_those_of_rdkit():
    """Molecules with and without symmetry, with structures and atoms in random order."""
    structures = [
        s
        for smiles in ("CC(C)(C)CCO", "OCCc1ccccc1", "CCCC(=O)O")
        for s in conformers(smiles, 6, True)
    ]
    order = np.random.default_rng(0).permutation(len(structures))
    structures = [structures[i] for i in order]
    test = np.array([i for i, s in enumerate(structures) if s.conformer < 2])
    train = np.array([i for i, s in enumerate(structures) if s.conformer >= 3])
    actual = distances_to_training(Rows(structures), test, train, num_processes=1)
    assert actual.notes == []
    for i, rmsd in zip(test, actual.rmsd):
        s = structures[i]
        others = [structures[k].positions for k in train if structures[k].molecule == s.molecule]
        expected = best_rms(
            molecule_of(s.numbers, s.positions, s.smiles), s.positions[None], np.array(others)
        )
        assert rmsd == pytest.approx(expected.min(), abs=2e-5)


def test_conformers_that_cannot_be_compared_are_reported():
    structures = conformers("CCCO", 3) + conformers("CCO", 1)
    other = conformers("CCCO", 4, True)[3]
    actual = distances_to_training(
        Rows([*structures, other]), np.array([0, 3]), np.array([1, 2, 4]), num_processes=1
    )
    assert np.isfinite(actual.rmsd[0]) and np.isnan(actual.rmsd[1])  # nothing of CCO was trained on
    assert len(actual.notes) == 1 and actual.notes[0].startswith(
        "1 conformers have their atoms in another order"
    )
    assert (
        len(
            distances_to_training(
                Rows(structures), np.zeros(0, int), np.arange(3), num_processes=1
            ).rmsd
        )
        == 0
    )
