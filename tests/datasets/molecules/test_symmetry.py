"""Tests for symmetries of molecules and RMSDs over them against RDKit's GetBestRMS."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

Chem = pytest.importorskip("rdkit.Chem")

from mlip_jax.datasets.molecules.rmsd import Conformers, cross_rmsd
from mlip_jax.datasets.molecules.symmetry import (
    SymmetryQuery,
    best_rms,
    molecule_of,
    symmetries,
    symmetries_of,
)

MOLECULES = {  # and how many symmetries the heavy atoms have
    "c1ccccc1": 12,
    "CC(C)(C)c1ccc(C(=O)O)cc1": 24,
    "CCC(=O)[O-]": 2,
    "O=C(O)c1ccccc1[N+](=O)[O-]": 4,
    "CC(=O)C(C)O": 1,
    "CCNC(N)=[NH2+]": 2,
    "C[C@H](F)Cl": 1,
    "CCP(=O)(O)O": 6,
    "CCCCN1C(=N)N(C)CC1=O": 1,
}


def embedded(smiles, count, seed=7):
    """Return a molecule, its atomic numbers (n,) and positions (count, n, 3) of conformers."""
    from rdkit.Chem import rdDistGeom

    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMultipleConfs(mol, count, randomSeed=seed)
    return (
        mol,
        np.array([a.GetAtomicNum() for a in mol.GetAtoms()]),
        np.array([c.GetPositions() for c in mol.GetConformers()]),
    )


@pytest.mark.parametrize("smiles", MOLECULES)
def test_equals_rdkits_best_rms(smiles):
    """The atoms are in another order than in the SMILES."""
    _, numbers, positions = embedded(smiles, 6)
    order = np.random.default_rng(0).permutation(len(numbers))
    numbers, positions = numbers[order], positions[:, order]
    mol = molecule_of(numbers, positions[0], smiles)
    assert [a.GetAtomicNum() for a in mol.GetAtoms()] == numbers.tolist()
    assert Chem.CanonSmiles(
        Chem.MolToSmiles(Chem.RemoveHs(mol), isomericSmiles=False)
    ) == Chem.MolToSmiles(Chem.MolFromSmiles(smiles), isomericSmiles=False)
    actual = symmetries(mol)
    assert actual.complete and len(actual.permutations) == MOLECULES[smiles]
    heavy = positions[:, actual.atoms]
    rmsd = cross_rmsd(Conformers(heavy[:2], heavy[2:], actual.permutations), dtype=np.float64)
    np.testing.assert_allclose(rmsd, best_rms(mol, positions[:2], positions[2:]), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    smiles=st.sampled_from(["Cc1ccccc1", "CC(C)(C)CO", "CCS(=O)(=O)N", "FC(F)(F)CC(=O)[O-]"]),
    seed=st.integers(1, 10_000),
    mirrored=st.booleans(),
)
def test_random_conformers_and_mirror_images(smiles, seed, mirrored):
    mol, _, positions = embedded(smiles, 2, seed)
    noisy = positions + 0.1 * np.random.default_rng(seed).normal(size=positions.shape)
    other = noisy[1:] * ([1, 1, -1] if mirrored else [1, 1, 1])
    actual = symmetries(mol)
    rmsd = cross_rmsd(
        Conformers(noisy[:1][:, actual.atoms], other[:, actual.atoms], actual.permutations),
        dtype=np.float64,
    )
    np.testing.assert_allclose(rmsd, best_rms(mol, noisy[:1], other), atol=1e-6)


def test_exchanging_equivalent_atoms_gives_zero_rmsd():
    mol, _, positions = embedded("c1ccccc1", 1)
    actual = symmetries(mol)
    ring = positions[:, actual.atoms]
    turned = ring[:, [1, 2, 3, 4, 5, 0]] + 0.05 * np.random.default_rng(0).normal(size=ring.shape)
    assert cross_rmsd(Conformers(ring, turned, actual.permutations))[0, 0] < 0.15
    assert cross_rmsd(Conformers(ring, turned))[0, 0] == pytest.approx(
        cross_rmsd(Conformers(ring, turned, actual.permutations))[0, 0], abs=0.1
    )  # a turn of the ring is a rotation
    swapped = ring[:, [1, 0, 2, 3, 4, 5]]  # and this one is neither
    assert cross_rmsd(Conformers(ring, swapped, actual.permutations))[0, 0] > 0.3


def test_too_many_symmetries_are_reported():
    mol = Chem.AddHs(Chem.MolFromSmiles("CC(C)(C)c1ccc(C(C)(C)C)cc1"))  # 6 * 6 * 2 * 2
    some = symmetries(mol, 10)
    assert len(some.permutations) == 10 and not some.complete
    assert symmetries(mol, 144).complete and not symmetries(mol, 143).complete
    assert (some.permutations[0] == np.arange(len(some.atoms))).all()
    with pytest.raises(ValueError, match="received 0"):
        symmetries(mol, 0)


def test_without_heavy_atoms_or_smiles():
    numbers, positions = np.array([1, 1]), np.array([[0.0, 0, 0], [0, 0, 0.74]])
    actual = list(
        symmetries_of(
            [SymmetryQuery(numbers, positions), SymmetryQuery(numbers, positions, "[H][H]")],
            num_processes=1,
        )
    )
    assert [s.permutations.shape for s in actual] == [(1, 0), (1, 0)]
    _, numbers, positions = embedded("CC(=O)C(C)O", 1)
    for smiles in ("", "CCO", "no SMILES"):  # of nothing, of another molecule, and of none at all
        assert (
            len(symmetries(molecule_of(numbers, positions[0], smiles)).permutations) == 2
        )  # only the skeleton
    assert len(symmetries(molecule_of(numbers, positions[0], "CC(=O)C(C)O")).permutations) == 1
