"""Tests for scaffolds: independent of the form of the SMILES and the number of processes."""

import numpy as np
import pytest

pytest.importorskip("rdkit")
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection import scaffolds as module
from mlip_jax.datasets.selection.scaffolds import murcko_scaffold, scaffold_index, scaffolds
from mlip_jax.datasets.selection.splits import split

METHANE = "[H]C([H])([H])[H]"
# 4-methylpyridinium with all atoms explicit and numbered, as in SPICE
NUMBERED = (
    "[c:1]1([H:8])[c:2]([H:9])[n+:3]([H:14])[c:4]([H:10])[c:5]([H:11])[c:6]1"
    "[C:7]([H:12])([H:13])[H:15]"
)


@pytest.mark.parametrize(
    ("smiles", "expected"),
    [
        ("CCO", ""),
        (METHANE, ""),
        ("[H][H]", ""),
        ("[Na+].[Cl-]", ""),
        ("Cc1ccccc1", "c1ccccc1"),
        ("CC(=O)Nc1ccc(O)cc1", "c1ccccc1"),
        ("c1ccc(CCC2CC2)cc1", "c1ccc(CCC2CC2)cc1"),
        ("O=C1CCCCC1C", "O=C1CCCCC1"),  # atoms bound to the ring by a double bond belong to it
        ("C[N+]1(C)CCOCC1", "C1C[NH2+]CCO1"),
        ("C[n+]1ccccc1", "c1cc[nH+]cc1"),  # charges stay
        ("C[C@H]1CC[C@@H](O)CC1", "C1CCCCC1"),
        ("c1ccccc1/C=C/c1ccccc1", "C(=Cc1ccccc1)c1ccccc1"),
        ("[2H]c1ccccc1", "c1ccccc1"),
    ],
)
def test_scaffold(smiles, expected):
    from rdkit import Chem

    assert murcko_scaffold(smiles) == Chem.CanonSmiles(expected)


@pytest.mark.parametrize(
    "smiles", ["Cc1cc[nH+]cc1", "[H]c1c([H])c(C([H])([H])[H])c([H])c([H])[n+]1[H]", NUMBERED]
)
def test_explicit_hydrogens_and_atom_maps_are_ignored(smiles):
    assert murcko_scaffold(smiles) == "c1cc[nH+]cc1"


def test_scaffold_does_not_depend_on_the_smiles():
    from rdkit import Chem

    molecule = Chem.AddHs(Chem.MolFromSmiles("CC(C)Cc1ccc(cc1)C(C)C(=O)N1CC[NH2+]C[C@@H]1C"))
    for number, atom in enumerate(molecule.GetAtoms(), 1):
        atom.SetAtomMapNum(number)
    written = [Chem.MolToSmiles(molecule, doRandom=True) for _ in range(10)]
    assert len(set(written)) == 10
    assert set(scaffolds(written)) == {Chem.CanonSmiles("O=C(Cc1ccccc1)N1CC[NH2+]CC1")}


def test_each_smiles_is_processed_once(monkeypatch):
    seen = []
    original = module.is_safe_smiles
    monkeypatch.setattr(module, "is_safe_smiles", lambda s: seen.append(s) or original(s))
    actual = scaffolds(["Cc1ccccc1", "CCO", "Cc1ccccc1", "CCO", "C1CC1C"])
    assert actual.tolist() == ["c1ccccc1", "", "c1ccccc1", "", "C1CC1"]
    assert sorted(seen) == ["C1CC1C", "CCO", "Cc1ccccc1"]


def test_invalid_smiles(caplog):
    bad = ["C(", "x1", "C1CC", "", "c1cc", "CC=", "((("]
    with pytest.raises(
        DatasetError, match=r"cannot read 7 of 8 different SMILES: .*, \.\.\.\. Remove"
    ) as raised:
        scaffolds([*bad, "C", "C("])
    assert sum(repr(s) in str(raised.value) for s in bad) == 5
    with pytest.raises(DatasetError, match="1 of 1 different SMILES: 'x1'. Remove"):
        scaffolds(["x1"])
    assert scaffolds(["C1CC1", "x1", "C("], on_error="own").tolist() == ["C1CC1", "x1", "C("]
    assert "cannot read 2 of 3" in caplog.text
    with pytest.raises(DatasetError, match="cannot read the SMILES 'x1'"):
        murcko_scaffold("x1")


def test_invalid_arguments_are_rejected():
    with pytest.raises(ValueError, match="'raise' or 'own', received 'skip'"):
        scaffolds(["C"], on_error="skip")
    with pytest.raises(ValueError, match="num_processes must be at least 1, received 0"):
        scaffolds(["C"], num_processes=0)


def test_no_smiles():
    assert scaffolds([]).shape == (0,)


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_processes(capsys):
    smiles = [f"{'C' * n}{ring}" for n in range(1, 300) for ring in ("c1ccccc1", "C1CC1", "O")]
    one = scaffolds(smiles, num_processes=1)
    assert np.array_equal(one, scaffolds(smiles, num_processes=2)) and set(one) == {
        "c1ccccc1",
        "C1CC1",
        "",
    }
    assert capsys.readouterr().out.strip() == ""  # too few for a progress bar


def test_progress_bar_for_long_work(monkeypatch, capsys):
    monkeypatch.setattr(module, "_LONG", 3)
    scaffolds(["C", "CC", "CCC"], num_processes=1)
    assert "3/3" in capsys.readouterr().out
    scaffolds(["C", "CC", "CCC"], num_processes=1, progress=False)
    assert capsys.readouterr().out.strip() == ""


def test_missing_rdkit_is_reported(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rdkit", None)
    with pytest.raises(ImportError, match=r"pip install 'mlip-flax\[data\]'"):
        murcko_scaffold("C")


def test_scaffold_indices_split_like_scaffold_names():
    smiles = np.array(
        [
            f"{'C' * (1 + n % 5)}{ring}"
            for n in range(20)
            for ring in ("c1ccccc1", "C1CC1", "C1CCC1", "O")
        ]
    )
    names, index = scaffold_index(smiles)
    assert index.dtype == np.int32 and np.array_equal(names[index], scaffolds(smiles))
    one, other = (
        split("scaffold", (0.5, 0.25, 0.25), seed=0, molecule=smiles, scaffold=s)
        for s in (names[index], index)
    )
    assert all(np.array_equal(one[name], other[name]) for name in one)
