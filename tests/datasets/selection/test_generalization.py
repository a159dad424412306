"""Unseen conformers of training molecules, and how far they are from the seen ones."""

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
def test_no_run_of_a_comparison_trains_on_them(n_s, n_c):
    """The molecules of a small subset are among those of a large one, and their unseen conformers are the same."""
    train = nested_subset(MOLECULE, CONFORMER, n_s, n_c, seed=3, min_conformers=6)
    unseen = unseen_conformers(MOLECULE, CONFORMER, train, num_conformers=6, seed=3)
    assert len(unseen) == 3 * n_s and set(MOLECULE[unseen]) == set(MOLECULE[train])
    everything = nested_subset(MOLECULE, CONFORMER, 30, 6, seed=3)
    assert not np.isin(unseen, everything).any()
    few = unseen_conformers(MOLECULE, CONFORMER, train, num_conformers=6, seed=3, max_molecules=4)
    largest = nested_subset(MOLECULE, CONFORMER, 20, 6, seed=3)
    assert np.array_equal(
        few,
        unseen_conformers(MOLECULE, CONFORMER, largest, num_conformers=6, seed=3, max_molecules=4),
    )


def test_only_what_may_be_used():
    train = nested_subset(MOLECULE, CONFORMER, 5, 6, seed=0)
    among = np.union1d(train, np.flatnonzero(CONFORMER < 8))
    unseen = unseen_conformers(
        MOLECULE,
        CONFORMER,
        nested_subset(MOLECULE, CONFORMER, 5, 6, seed=0),
        num_conformers=6,
        seed=0,
    )
    found = unseen_conformers(MOLECULE, CONFORMER, train, num_conformers=6, seed=0, among=among)
    assert set(found) == set(unseen) & set(among)
    every = nested_subset(MOLECULE, CONFORMER, 5, 9, seed=0)
    assert len(unseen_conformers(MOLECULE, CONFORMER, every, num_conformers=9, seed=0)) == 0


def test_another_draw_is_told():
    train = nested_subset(MOLECULE, CONFORMER, 5, 6, seed=0)
    with pytest.raises(ValueError, match="are not those by which the training set was drawn"):
        unseen_conformers(MOLECULE, CONFORMER, train, num_conformers=6, seed=1)


def test_molecules_of_many_conformers():
    molecule = np.array([5, 5, 5, 7, 7, 9])
    assert with_min_conformers(molecule, np.arange(6), 2).tolist() == [0, 1, 2, 3, 4]
    assert with_min_conformers(molecule, np.array([0, 3, 4, 5]), 2).tolist() == [3, 4]


def test_near_and_far():
    found = near_and_far(np.array([0.2, 1.0, 1.1, np.nan]), 1.0)
    assert found["iid_c"].tolist() == [0, 1] and found["ood_c"].tolist() == [2]
    with pytest.raises(ValueError, match="must be positive"):
        near_and_far(np.zeros(1), 0.0)


class Rows:
    """A store in memory."""

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


def test_distances_as_rdkit_has_them():
    """Molecules with and without symmetry, whose structures stand in no order, nor their atoms in the SMILES's."""
    structures = [
        s
        for smiles in ("CC(C)(C)CCO", "OCCc1ccccc1", "CCCC(=O)O")
        for s in conformers(smiles, 6, True)
    ]
    order = np.random.default_rng(0).permutation(len(structures))
    structures = [structures[i] for i in order]
    test = np.array([i for i, s in enumerate(structures) if s.conformer < 2])
    train = np.array([i for i, s in enumerate(structures) if s.conformer >= 3])
    found = distances_to_training(Rows(structures), test, train, num_processes=1)
    assert found.notes == []
    for i, rmsd in zip(test, found.rmsd):
        s = structures[i]
        others = [structures[k].positions for k in train if structures[k].molecule == s.molecule]
        expected = best_rms(
            molecule_of(s.numbers, s.positions, s.smiles), s.positions[None], np.array(others)
        )
        assert rmsd == pytest.approx(expected.min(), abs=2e-5)


def test_what_cannot_be_compared_is_told():
    structures = conformers("CCCO", 3) + conformers("CCO", 1)
    other = conformers("CCCO", 4, True)[3]
    found = distances_to_training(
        Rows([*structures, other]), np.array([0, 3]), np.array([1, 2, 4]), num_processes=1
    )
    assert np.isfinite(found.rmsd[0]) and np.isnan(found.rmsd[1])  # nothing of CCO was trained on
    assert len(found.notes) == 1 and found.notes[0].startswith(
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
