"""Tests for RDKit's parser in a separate process: corrupted molecules do not crash this one."""

import numpy as np
import pytest

from mlip_jax.datasets.smiles.rdkit_process import RDKitParser

Chem = pytest.importorskip("rdkit.Chem")


@pytest.fixture(scope="module")
def parser():
    return RDKitParser()


@pytest.fixture(scope="module")
def molecule():
    molecule = Chem.MolFromSmiles("C[NH3+]")
    conformer = Chem.Conformer(2)
    conformer.SetAtomPosition(1, (0.0, 0.0, 1.5))
    molecule.AddConformer(conformer)
    return molecule.ToBinary()


def test_molecules_are_parsed(parser, molecule):
    numbers, positions, charge = parser.parse(molecule)
    assert numbers.tolist() == [6, 7] and charge == 1.0
    np.testing.assert_allclose(positions, [[0, 0, 0], [0, 0, 1.5]])
    for invalid in (b"", b"x", Chem.MolFromSmiles("C").ToBinary()):
        with pytest.raises(ValueError):
            parser.parse(invalid)


def test_the_process_is_replaced_after_a_crash(parser, molecule):
    parser.parse(molecule)
    parser._process.kill()
    with pytest.raises(ValueError, match="its process ended with -9"):
        parser.parse(molecule)
    assert parser.parse(molecule)[2] == 1.0


def test_corrupted_molecules_are_errors(parser, molecule):
    rng = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(molecule)
        for place in rng.integers(0, len(damaged), 3):
            damaged[place] = rng.integers(256)
        try:
            parser.parse(bytes(damaged))
        except ValueError:
            pass
    assert parser.parse(molecule)[2] == 1.0
