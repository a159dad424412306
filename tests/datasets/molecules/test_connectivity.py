"""Tests for skeletons of molecules, which are equal for a SMILES and a geometry."""

import numpy as np
import pytest
from ase.build import molecule
from rdkit import Chem
from rdkit.Chem import rdDistGeom

from mlip_jax.datasets.molecules import connectivity
from mlip_jax.datasets.molecules.connectivity import (
    IdentityQuery,
    describe,
    from_geometry,
    from_smiles,
    skeleton,
)

SMILES = [
    "C",
    "CCO",
    "c1ccccc1O",
    "CC(=O)Nc1ccc(O)cc1",
    "C[N+](=O)[O-]",
    "CC(=O)[O-]",
    "C[NH3+]",
    "N[C@@H](C)C(=O)O",
    "CS(=O)(=O)N",
    "OC1CC1",
    "C#N",
    "ClCCBr",
    "F/C=C/F",
]


def geometry(smiles):
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert rdDistGeom.EmbedMolecule(mol, randomSeed=1) == 0
    return np.array([a.GetAtomicNum() for a in mol.GetAtoms()]), mol.GetConformer().GetPositions()


@pytest.mark.parametrize("smiles", SMILES)
def test_smiles_and_geometry_agree_in_any_order_of_atoms(smiles):
    numbers, positions = geometry(smiles)
    order = np.random.default_rng(0).permutation(len(numbers))
    expected = skeleton(from_smiles(smiles))
    assert skeleton(from_geometry(numbers[order], positions[order])) == expected
    explicit = Chem.AddHs(Chem.MolFromSmiles(smiles))
    for place, atom in enumerate(explicit.GetAtoms()):
        atom.SetAtomMapNum(place + 1)  # as SPICE writes them
    assert skeleton(from_smiles(Chem.MolToSmiles(explicit))) == expected


def test_skeletons_distinguish_molecules_but_not_their_forms():
    actual = [skeleton(from_smiles(s)) for s in SMILES]
    assert len(set(actual)) == len(SMILES)
    for a, b in (
        ("N[C@@H](C)C(=O)O", "N[C@H](C)C(=O)O"),
        ("C/C=C/C", "C/C=C\\C"),
        ("Cc1ccccc1C", "CC1=C(C)C=CC=C1"),
        ("[2H]C", "C"),
        ("[NH3+]CC(=O)[O-]", "[NH3+]CC([O-])=O"),
    ):
        assert skeleton(from_smiles(a)) == skeleton(from_smiles(b))
    assert skeleton(from_smiles("CC(=O)C")) != skeleton(from_smiles("CC(O)=C"))  # tautomers


def test_descriptions():
    water = molecule("H2O")
    entries = [
        IdentityQuery("CCO"),
        IdentityQuery("not a SMILES"),
        IdentityQuery("", water.numbers, water.positions),
        IdentityQuery(""),
    ]
    actual = describe(entries, len(entries), fingerprints=True)
    assert [d and d.elements for d in actual] == [(1, 6, 8), None, (1, 8), None]
    assert actual[2].skeleton == describe([IdentityQuery("O")], 1)[0].skeleton
    assert actual[0].fingerprint and not describe([IdentityQuery("O")], 1)[0].fingerprint
    assert describe([IdentityQuery("[C]")], 1)[0].elements == (6,)


def test_results_do_not_depend_on_the_number_of_processes(monkeypatch):
    monkeypatch.setattr(connectivity, "_CHUNK", 4)
    entries = [IdentityQuery(s) for s in SMILES]
    assert describe(entries, len(entries), num_processes=2) == describe(
        entries, len(entries), num_processes=1
    )
