"""Tests for identities of molecules, and hashes that are equal on every machine."""

import numpy as np
import pytest
from ase import Atoms

from mlip_jax.datasets import identity
from mlip_jax.datasets.identity import molecule_identity, splitmix64, stable_ids
from mlip_jax.datasets.smiles.embedding import MoleculeRecord


def test_stable_ids_of_strings_are_blake2b():
    # from `printf CCO | b2sum -l 64`, read as little-endian
    assert int(stable_ids(np.array(["CCO"]))[0]) == int.from_bytes(
        bytes.fromhex("6d200b6f6c9553c3"), "little"
    )
    names = np.array(["CCO", "C", "CCO", ""])
    ids = stable_ids(names)
    assert ids.dtype == np.uint64 and ids[0] == ids[2] and len(set(ids.tolist())) == 3
    for same in (names.astype(object), names.astype("U40"), names.astype("S")):
        assert np.array_equal(stable_ids(same), ids)


def test_stable_ids_of_numbers():
    numbers = np.array([0, 5, 2**31 - 1])
    assert np.array_equal(
        stable_ids(numbers.astype(np.int32)), stable_ids(numbers.astype(np.uint64))
    )
    assert len(set(stable_ids(np.array([-1, 0, 1, 2**63 - 1, -(2**63)])).tolist())) == 5
    with pytest.raises(ValueError, match="strings or integers; received float64"):
        stable_ids(np.array([0.5]))
    with pytest.raises(ValueError, match="received object"):
        stable_ids(np.array(["a", 1], object))


def test_splitmix64_is_the_published_generator():
    """The first outputs of the reference implementation with seed 1234567."""
    state = (1234567 + 0x9E3779B97F4A7C15 * np.arange(3, dtype=object)) % 2**64
    assert splitmix64(state.astype(np.uint64)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize(
    "spellings",
    [
        ("CCO", "OCC", "[H]OC([H])([H])C", "[CH3:1][CH2:3][OH:2]", "[2H]OCC", "C[13CH2]O"),
        ("C[C@H](N)O", "C[C@@H](N)O", "CC(N)O"),
        ("C/C=C/F", r"C/C=C\F"),
        ("C[N+](=O)[O-]", "CN(=O)=O"),
        ("[2H]", "[H]"),
    ],
)
def test_spellings_and_stereoisomers_share_an_identity(spellings):
    """Mirror images used to be in different splits, although their energies are equal."""
    pytest.importorskip("rdkit")
    assert len({molecule_identity(s) for s in spellings}) == 1


def test_different_molecules_and_invalid_smiles_keep_their_identities():
    pytest.importorskip("rdkit")
    smiles = [
        "CCO",
        "COC",
        "CC=O",
        "C=CO",
        "CC(=O)[O-]",
        "CC(=O)O",
        "[Na+].[Cl-]",
        "N(C)(C)(C)(C)C",
    ]
    assert len({molecule_identity(s) for s in smiles}) == len(smiles)
    assert molecule_identity("N(C)(C)(C)(C)[C:3]") == "N(C)(C)(C)(C)[C]"


def test_identities_without_rdkit_are_declared(monkeypatch):
    """A store states how its molecules are identified."""
    monkeypatch.setattr(identity, "method", lambda: identity.AS_WRITTEN)
    molecule_identity.cache_clear()
    assert molecule_identity("O[CH2:1]C") == "O[CH2]C"
    molecule_identity.cache_clear()


def test_names_for_people_have_no_atom_maps():
    assert identity.readable_name("[C@H:1]([F:2])([Cl:3])[Br:4]") == "F[C@@H](Cl)Br"
    for name in ("aspirin", "[H]C([H])([H])[H]", ""):
        assert ":" not in identity.readable_name(name)
    assert identity.readable_name("m:7") == "m:7"


def test_structures_without_a_name_are_called_by_their_formula():
    """Crystals of a file used to be "molecule 1" in reports and had no name in tables."""
    salt = Atoms("NaCl", [[0, 0, 0], [0, 0, 2.4]])
    for record, shown, in_tables in (
        (MoleculeRecord(3, "", "", salt), "ClNa", "ClNa"),
        (MoleculeRecord(3, "rock salt", "", salt), "rock salt", "rock salt"),
        (MoleculeRecord(3, "", "[Na+].[Cl-]", salt), "[Na+].[Cl-]", ""),
        (MoleculeRecord(3, "", "", None, "line 4: no atoms"), "molecule 3", ""),
    ):
        assert (record.display_name, record.table_name) == (shown, in_tables)
