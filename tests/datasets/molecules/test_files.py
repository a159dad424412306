"""Tests for files of molecules of every kind, valid and invalid, complete and in shares."""

import bz2
import gzip
import itertools
import lzma

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.db import connect
from ase.io import write
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.config import ConfigError
from mlip_jax.datasets.molecules.files import (
    CsvColumns,
    count_molecules,
    fingerprint,
    from_smiles,
    kind_of,
    read_molecules,
)
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.smiles import embedding
from mlip_jax.datasets.smiles.embedding import EmbeddingOptions, Entry, UnusableMoleculeError
from mlip_jax.datasets.store.conversion import ConversionSpec, convert

SMI = """smiles name
CCO ethanol and more
# a comment

[NH3+]CC(=O)[O-]
C1#CC1 strained
C1CC broken
[O-]C=O formate
"""


def read(path, **options):
    return list(read_molecules(path, num_processes=1, **options))


def smi(tmp_path, text=SMI, name="mols.smi"):
    path = tmp_path / name
    path.write_text(text)
    return path


def sdf(*molecules):
    from rdkit import Chem

    return "".join(f"{Chem.MolToMolBlock(m)}>  <id>\n7\n\n$$$$\n" for m in molecules)


def embedded(smiles, name="", hydrogens=True):
    from rdkit import Chem
    from rdkit.Chem import AllChem

    m = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(m, randomSeed=1)
    m = m if hydrogens else Chem.RemoveHs(m)
    m.SetProp("_Name", name)
    return m


def test_smiles_file(tmp_path):
    records = read(smi(tmp_path))
    assert [r.index for r in records] == [0, 1, 2, 3, 4]
    assert [r.name for r in records] == ["ethanol and more", "", "strained", "broken", "formate"]
    assert [r.smiles for r in records] == ["CCO", "[NH3+]CC(=O)[O-]", "C1#CC1", "C1CC", "[O-]C=O"]
    ethanol, glycine, strained, broken, formate = records
    assert ethanol.atoms.get_chemical_formula() == "C2H6O"
    assert [r.atoms.info["charge"] for r in (ethanol, glycine, formate)] == [0, 0, -1]
    assert ethanol.geometry == "embedded" and not ethanol.failure
    assert strained.atoms is None and strained.failure == (
        "mols.smi line 6: RDKit found no three-dimensional geometry (ETKDGv3)"
    )
    assert (
        broken.atoms is None
        and broken.failure == "mols.smi line 7: RDKit cannot read the SMILES 'C1CC'"
    )
    assert count_molecules(tmp_path / "mols.smi") == 5


def test_embedded_geometries_have_the_bonds_of_their_smiles(tmp_path):
    """Bonds have the usual lengths, and no other atoms are close."""
    atoms = read(smi(tmp_path, "CCO\n"))[0].atoms
    distances = atoms.get_all_distances()
    assert 1.4 < distances[0, 1] < 1.65 and 1.3 < distances[1, 2] < 1.5
    assert distances[np.triu_indices(len(atoms), 1)].min() > 0.9


def test_chemistry_problems_are_reported(tmp_path):
    records = read(smi(tmp_path, "N(C)(C)(C)C\n*C\n[CH3]\n"))
    assert "valence" in records[0].failure.lower() and "line 1" in records[0].failure
    assert 0 in records[1].atoms.numbers  # a dummy atom: the force field says that it knows none
    assert records[2].atoms.info == {"charge": 0.0, "num_unpaired_electrons": 1}


def test_fragments_of_a_salt_are_separated(tmp_path):
    atoms = read(smi(tmp_path, "CC(=O)[O-].[Na+].O\n"))[0].atoms
    distances = atoms.get_all_distances()
    sodium = list(atoms.symbols).index("Na")
    assert np.sort(distances[sodium])[1] > 2.5 and distances.max() < 20
    assert distances[np.triu_indices(len(atoms), 1)].min() > 0.9


def test_embedding_depends_only_on_smiles_and_seed(tmp_path):
    path = smi(tmp_path, "CCCO a\nCCCN\nCCCO b\n")
    a, _, b = read(path)
    np.testing.assert_array_equal(a.atoms.positions, b.atoms.positions)
    two = list(read_molecules(path, num_processes=2))
    for ours, theirs in zip(two, read(path), strict=True):
        np.testing.assert_array_equal(ours.atoms.positions, theirs.atoms.positions)
    other = read(path, seed=1)[0]
    assert np.abs(other.atoms.positions - a.atoms.positions).max() > 0.05
    relaxed = read(path, mmff=True)[0]
    assert (
        relaxed.geometry == "embedded, MMFF94"
        and np.abs(relaxed.atoms.positions - a.atoms.positions).max() > 1e-3
    )


def test_conformers(tmp_path):
    path = smi(tmp_path, "CCCCO\nC1CC\nCCC\n")
    records = read(path, num_conformers=3)
    assert [r.index for r in records] == list(range(9))
    assert all(r.atoms is None and "line 2" in r.failure for r in records[3:6])
    a, b, c = (r.atoms.positions for r in records[:3])
    assert np.abs(a - b).max() > 0.1 and np.abs(b - c).max() > 0.1
    some = read(path, num_conformers=3, skip={0, 2, 3, 4, 5, 6, 7, 8})
    assert [r.index for r in some] == [1]
    np.testing.assert_array_equal(some[0].atoms.positions, b)


def test_skipped_molecules_are_not_embedded(tmp_path, monkeypatch):
    seen = []
    embed_entry = embedding.embed_entry
    monkeypatch.setattr(
        embedding, "embed_entry", lambda job: seen.append(job[0].number) or embed_entry(job)
    )
    path = smi(tmp_path, "C\nCC\nCCC\nCCCC\n")
    assert [r.index for r in read(path, skip={0, 2})] == [1, 3] and seen == [1, 3]
    assert [r.index for r in read(path, limit=2)] == [0, 1] and seen[2:] == [0, 1]
    assert [r.index for r in read(path, share=(1, 3))] == [1] and seen[4:] == [1]


@given(
    st.integers(1, 6),
    st.integers(1, 3),
    st.sets(st.integers(0, 60)),
    st.one_of(st.none(), st.integers(1, 25)),
)
@settings(max_examples=60, deadline=None)
def test_shares_are_disjoint_and_complete(tmp_path_factory, processes, conformers, skip, limit):
    path = tmp_path_factory.mktemp("shares") / "bad.smi"
    path.write_text("X\n" * 20)  # none can be read, so that nothing takes time
    parts = [
        [
            r.index
            for r in read(
                path, share=(i, processes), num_conformers=conformers, skip=skip, limit=limit
            )
        ]
        for i in range(processes)
    ]
    expected = [i for i in range(min(20, limit or 20) * conformers) if i not in skip]
    assert sorted(itertools.chain(*parts)) == expected
    assert all(i // conformers % processes == p for p, part in enumerate(parts) for i in part)


def test_killed_worker_gives_a_failed_record(tmp_path):
    job = Entry(3, "mols.smi line 4", "name", "CCO"), EmbeddingOptions(2)
    records = embedding.failed_records(job)
    assert [r.index for r in records] == [6, 7] and all(
        "mols.smi line 4" in r.failure for r in records
    )


@pytest.mark.parametrize(
    "pack, suffix", [(gzip.open, ".gz"), (bz2.open, ".bz2"), (lzma.open, ".xz")]
)
def test_compressed_text(tmp_path, pack, suffix):
    path = tmp_path / f"mols.smi{suffix}"
    with pack(path, "wt") as file:
        file.write("CCO ethanol\nC methane\n")
    assert [r.name for r in read(path)] == ["ethanol", "methane"] and count_molecules(path) == 2
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(DatasetError, match="corrupted or truncated"):
        count_molecules(path)


def test_csv(tmp_path):
    path = smi(tmp_path, 'Id,activity,SMILES\n"a ""x"", y",1,CCO\n,2,\n\nlast,3,C1CC\n', "mols.csv")
    a, nothing, broken = read(path)
    assert (a.name, a.smiles, a.geometry) == ('a "x", y', "CCO", "embedded")
    assert nothing.failure == "mols.csv line 3: no SMILES"
    assert "mols.csv line 5" in broken.failure and broken.name == "last"
    assert read(path, columns=CsvColumns(name="activity"))[0].name == "1"
    tab = smi(tmp_path, "\ufeffname\tcanonical_smiles\nx y\tCC\n", "mols.tsv")
    assert [(r.name, r.smiles) for r in read(tab)] == [("x y", "CC")]


def test_csv_line_of_a_row_after_one_of_several_lines(tmp_path):
    path = smi(tmp_path, 'smiles,name\nC,"a\nb"\nC1CC,c\n', "mols.csv")
    sound, broken = read(path)
    assert sound.name == "a b" and "line 4" in broken.failure  # names are on one line


def test_missing_csv_column_is_rejected(tmp_path):
    path = smi(tmp_path, "structure,name\nCCO,x\n", "mols.csv")
    with pytest.raises(ConfigError, match="found: structure, name. Set smiles_column"):
        read(path)
    with pytest.raises(ConfigError, match="'structur'.*Did you mean 'structure'"):
        count_molecules(path, CsvColumns("structur"))
    assert read(path, columns=CsvColumns("Structure"))[0].smiles == "CCO"


def test_sdf(tmp_path):
    from rdkit import Chem
    from rdkit.Chem import rdDepictor

    flat = Chem.MolFromSmiles("CC[NH3+]")
    rdDepictor.Compute2DCoords(flat)
    whole, bare = embedded("C[O-]", "methoxide"), embedded("CCO", hydrogens=False)
    good = sdf(whole, bare, flat)
    path = smi(tmp_path, good + "junk\nmore\n\n$$$$\n" + sdf(embedded("CC", "last")), "mols.sdf")
    a, b, c, junk, last = read(path)
    assert (a.name, a.smiles, a.geometry, a.atoms.info["charge"]) == (
        "methoxide",
        "C[O-]",
        "as given",
        -1,
    )
    np.testing.assert_allclose(a.atoms.positions, whole.GetConformer().GetPositions(), atol=1e-4)
    assert b.geometry == "hydrogens added" and len(b.atoms) == 9
    np.testing.assert_allclose(b.atoms.positions[:3], bare.GetConformer().GetPositions(), atol=1e-4)
    assert b.atoms.get_all_distances()[np.triu_indices(9, 1)].min() > 0.9
    assert (
        c.geometry == "embedded"
        and c.atoms.info["charge"] == 1
        and np.ptp(c.atoms.positions[:, 2]) > 0.5
    )
    line = good.count("\n") + 1
    assert junk.failure == f"mols.sdf line {line}: RDKit cannot read the mol block"
    assert last.name == "last" and count_molecules(path) == 5
    assert all("num_conformers" in r.failure for r in read(path, num_conformers=2, limit=1))


def test_sdf_without_the_last_line(tmp_path):
    path = smi(tmp_path, sdf(embedded("CC", "one"))[:-5], "one.mol")
    assert [(r.name, len(r.atoms)) for r in read(path)] == [("one", 8)]


def test_mol_block_with_nan(tmp_path):
    text = sdf(embedded("C"))
    number = text.splitlines()[4].split()[0]
    (record,) = read(smi(tmp_path, text.replace(number.rjust(10), "nan".rjust(10), 1), "nan.sdf"))
    assert record.atoms is None and "nan.sdf" in record.failure


def test_extended_xyz(tmp_path):
    water, fixed = molecule("H2O"), bulk("NaCl", "rocksalt", a=5.6)
    water.info = {"charge": -1, "name": "w", "smiles": "[OH2]", "other": 3}
    fixed.set_constraint(FixAtoms([0]))
    path = tmp_path / "mols.xyz"
    write(path, [water, fixed], format="extxyz")
    a, b = read(path)
    assert (a.name, a.smiles, a.geometry, a.atoms.info) == (
        "w",
        "[OH2]",
        "as given",
        {"charge": -1.0},
    )
    np.testing.assert_allclose(a.atoms.positions, water.positions, atol=1e-7)
    assert b.atoms.pbc.all() and b.atoms.info == {"charge": 0.0}
    assert [c.todict() for c in b.atoms.constraints] == [FixAtoms([0]).todict()]
    np.testing.assert_allclose(b.atoms.cell.array, fixed.cell.array)


@pytest.mark.parametrize("name", ["mols.xyz", "mols.db", "mols.traj"])
def test_all_that_atoms_carry_is_kept_except_results(tmp_path, name):
    """Detects lost velocities and isotopes, and forces of the file that are kept."""
    water = molecule("H2O")
    water.set_masses([None, 2.0141, 3.0160])
    water.set_momenta(np.arange(9.0).reshape(3, 3))
    water.set_tags([1, 2, 3])
    water.set_array("REF_forces", np.ones((3, 3)))
    water.calc = SinglePointCalculator(water, energy=-1.0, forces=np.ones((3, 3)))
    write(tmp_path / name, water)
    (record,) = read(tmp_path / name)
    np.testing.assert_allclose(record.atoms.get_masses(), water.get_masses(), rtol=1e-6)
    np.testing.assert_allclose(record.atoms.get_momenta(), water.get_momenta(), atol=1e-7)
    assert name.endswith("db") or record.atoms.get_tags().tolist() == [1, 2, 3]
    assert record.atoms.calc is None and not record.atoms.has("REF_forces")


def test_isotopes_of_smiles_and_mol_blocks(tmp_path):
    """Detects natural masses for D and 13C, whose frequencies are wrong by a factor of up to 1.4."""
    heavy = from_smiles("[2H]O[2H]")
    assert np.sort(heavy.get_masses())[:2] == pytest.approx(2.0141, abs=1e-3)
    assert from_smiles("[13CH4]").get_masses()[0] == pytest.approx(13.0034, abs=1e-3)
    assert from_smiles("[13CH4]").get_masses()[1] == pytest.approx(1.008)
    assert not from_smiles("C").has("masses")
    from rdkit import Chem

    block = Chem.MolToMolBlock(Chem.AddHs(Chem.MolFromSmiles("[2H]Cl")))
    (record,) = read(smi(tmp_path, block, "dcl.mol"))
    assert record.atoms.get_masses().min() == pytest.approx(2.0141, abs=1e-3)


def test_charge_of_frames(tmp_path):
    """The label takes precedence over the SMILES, and the SMILES over integer initial charges."""
    frames = []
    for info, charges in (({"smiles": "[OH-]"}, [0, 0]), ({}, [-0.6, -0.4]), ({}, [0.3, -0.1])):
        atoms = Atoms("OH", [[0, 0, 0], [0, 0, 0.97]], info=info)
        if any(charges):
            atoms.set_initial_charges(charges)
        frames.append(atoms)
    write(tmp_path / "mols.extxyz", frames)
    assert [r.atoms.info["charge"] for r in read(tmp_path / "mols.extxyz")] == [-1, -1, 0]


def test_invalid_frames_do_not_stop_the_others(tmp_path):
    frames = [
        "1\nname=a\nH 0 0 0\n",
        "2\n\nH 0 0 0\nH 0 0 nan\n",
        "1\n\nQq 0 0 0\n",
        "0\n\n",
        "1\n\nH 0 0\n",
        "2\n\nH 0 0 0\nH 0 0 0.01\n",
        "1\nname=z\nHe 1 2 3\n",
    ]
    path = smi(tmp_path, "\n".join(frames), "mols.xyz")
    records = read(path)
    assert [r.atoms is None for r in records] == [False, True, True, True, True, False, False]
    assert (
        records[0].name == "a" and records[-1].name == "z"
    )  # atoms on top of each other are the relaxation's matter
    assert records[1].failure == (
        "mols.xyz structure 1: 1 of 2 atoms have NaN or infinite coordinates, the first of "
        "them atom 1"
    )
    assert "mols.xyz line 10" in records[2].failure and "Qq" in records[2].failure
    assert "no atoms" in records[3].failure or "cannot be read" in records[3].failure
    assert count_molecules(path) == 7


def test_an_infinite_charge_does_not_stop_the_others(tmp_path):
    records = read(smi(tmp_path, "1\ncharge=inf\nH 0 0 0\n1\ncharge=1\nH 0 0 0\n", "mols.xyz"))
    assert records[0].failure == "mols.xyz structure 0: the charge is inf"
    assert records[1].atoms.info["charge"] == 1


@pytest.mark.parametrize(
    "end, words",
    [("3\n\nH 0 0 0\n", "the file is truncated"), ("hello\n1\n\nH 0 0 0\n", "'hello'")],
)
def test_truncated_xyz_gives_a_failed_record(tmp_path, end, words):
    records = read(smi(tmp_path, "1\n\nH 0 0 0\n" + end, "mols.xyz"))
    assert records[0].atoms is not None and words in records[1].failure and len(records) == 2


def test_single_atom_and_unknown_element_pass(tmp_path):
    records = read(smi(tmp_path, "1\n\nHe 0 0 0\n1\n\nU 0 0 0\n", "mols.xyz"))
    assert [r.atoms.symbols[0] for r in records] == ["He", "U"]


def test_database(tmp_path):
    path = tmp_path / "mols.db"
    with connect(path) as db:
        db.write(molecule("H2O"), name="water", charge=1)
        db.write(molecule("CH4"), smiles="C")
    a, b = read(path)
    assert (a.name, a.atoms.info["charge"], b.smiles, len(b.atoms)) == ("water", 1, "C", 5)
    assert [r.index for r in read(path, skip={0})] == [1] and count_molecules(path) == 2
    fixed = molecule("H2O")
    fixed.set_constraint(FixAtoms([0]))
    with connect(path) as db:
        db.write(fixed)
    with pytest.raises(DatasetError, match="row 3 has constraints.*move_mask"):
        read(path)


def test_other_formats_of_ase(tmp_path):
    frames = [molecule("H2O"), molecule("CH4"), molecule("NH3")]
    frames[1].set_constraint(FixAtoms([2]))
    write(tmp_path / "mols.traj", frames)
    records = read(tmp_path / "mols.traj", share=(1, 2))
    assert [(r.index, len(r.atoms)) for r in records] == [(1, 5)] and records[0].atoms.constraints
    assert count_molecules(tmp_path / "mols.traj") == 3
    with pytest.raises(DatasetError, match="mols.rubbish"):
        count_molecules(smi(tmp_path, "nothing that anyone knows\n", "mols.rubbish"))


def test_store(tmp_path):
    frames = [molecule("H2O"), molecule("CH4"), molecule("NH3")]
    for i, atoms in enumerate(frames):
        atoms.info = {"energy": 0.0, "charge": i}
    write(tmp_path / "mols.xyz", frames)
    store = convert(
        ConversionSpec(str(tmp_path / "mols.xyz"), options={"forces_key": ""}),
        tmp_path / "store",
        num_processes=1,
        reject_invalid=False,
        progress=False,
    )
    records = read(store, skip={1})
    assert [(r.index, len(r.atoms), r.atoms.info["charge"]) for r in records] == [
        (0, 3, 0),
        (2, 4, 2),
    ]
    np.testing.assert_allclose(records[1].atoms.positions, frames[2].positions, atol=1e-6)
    assert count_molecules(store) == 3 and [r.index for r in read(store, limit=1)] == [0]
    assert fingerprint(store)["bytes"] == (store / "manifest.json").stat().st_size


@pytest.mark.parametrize("name", ["empty.smi", "empty.sdf", "empty.xyz"])
def test_empty_files_have_no_molecules(tmp_path, name):
    path = smi(tmp_path, "\n\n", name)
    assert count_molecules(path) == 0 and read(path) == []


@pytest.mark.parametrize("name", ["empty.csv", "empty.db", "empty.pdb"])
def test_empty_files_of_other_formats_are_rejected(tmp_path, name):
    with pytest.raises((DatasetError, ConfigError), match=name):
        count_molecules(smi(tmp_path, "", name))


def test_missing_files_and_folders_are_rejected(tmp_path):
    with pytest.raises(DatasetError, match="no such file"):
        kind_of(tmp_path / "missing.smi")
    with pytest.raises(DatasetError, match="not a store"):
        fingerprint(tmp_path)


def test_conformers_of_molecules_with_positions_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match="num_conformers"):
        read_molecules(smi(tmp_path, "1\n\nH 0 0 0\n", "mols.xyz"), num_conformers=2)


def test_fingerprint(tmp_path):
    path = smi(tmp_path)
    before = fingerprint(path)
    path.touch()
    assert fingerprint(path) == before
    path.write_text(SMI.replace("CCO", "CCN"))
    assert fingerprint(path) != before


def test_molecules_are_read_lazily(tmp_path, monkeypatch):
    jobs = []
    embed_entry = embedding.embed_entry
    monkeypatch.setattr(embedding, "embed_entry", lambda job: jobs.append(job) or embed_entry(job))
    stream = read_molecules(smi(tmp_path, "X\n" * 100_000), num_processes=1)
    for count in range(1, 11):
        next(stream)
        assert len(jobs) == count


def test_from_smiles_equals_reading_a_file(tmp_path):
    (tmp_path / "one.smi").write_text("CC[NH3+] ion\n")
    (record,) = read_molecules(tmp_path / "one.smi", seed=3, num_processes=1)
    atoms = from_smiles("CC[NH3+]", seed=3)
    assert atoms.info["charge"] == 1 and np.array_equal(atoms.positions, record.atoms.positions)
    assert not np.allclose(atoms.positions, from_smiles("CC[NH3+]", seed=3, mmff=True).positions)
    with pytest.raises(UnusableMoleculeError, match="^RDKit cannot read the SMILES 'C1CC'"):
        from_smiles("C1CC")  # and not "C1CC: RDKit cannot read the SMILES 'C1CC'"


ATROPISOMER = "Cc1cccc(O)c1-c1c(C)cccc1N"  # the bond between the rings is atom 7 to atom 8


def test_extensions_of_cxsmiles_are_no_names(tmp_path):
    """Both atropisomers used to get one geometry, and the extension became the name."""
    lines = [f"{ATROPISOMER} |w{mark}:7.7| {name}\n" for mark, name in (("U", "P"), ("D", "M"))]
    records = read(smi(tmp_path, "".join(lines) + "CCO ethanol\nCCC\n"))
    assert [r.name for r in records] == ["P", "M", "ethanol", ""]
    angles = [r.atoms.get_dihedral(5, 7, 8, 9) for r in records[:2]]
    assert (angles[0] - 180) * (angles[1] - 180) < 0


def test_planar_blocks_that_are_tagged_3d_keep_their_positions(tmp_path):
    block = (
        "w\n  prog{tag}\n\n  3  2  0  0  0  0  0  0  0  0999 V2000\n"
        "    0.0000    0.0000    0.0000 O   0  0\n    1.0529    0.0000    0.0000 H   0  0\n"
        "   -0.2640    1.0193    0.0000 H   0  0\n  1  2  1  0\n  1  3  1  0\nM  END\n$$$$\n"
    )
    tags = (" " * 14 + "3D", "0101201020" + " " * 4 + "3D", "")
    records = read(smi(tmp_path, "".join(block.format(tag=tag) for tag in tags), "m.sdf"))
    assert [r.geometry for r in records] == ["as given", "as given", "embedded"]
    assert records[0].atoms.positions[1, 0] == 1.0529


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_of_tables(tmp_path, separator):
    rows = [["name", "smiles"], ["ethanol", "CCO"], ["water", "O"]]
    text = "".join(separator.join(row) + "\n" for row in rows)
    records = read(smi(tmp_path, text, "a.csv"))
    assert [(r.name, r.smiles) for r in records] == [("ethanol", "CCO"), ("water", "O")]


def test_labels_and_symbols_of_xyz_files(tmp_path):
    """Ions with total_charge used to become neutral, and a spin that is no number ended the file."""
    text = (
        "1\ntotal_charge=1 multiplicity=1\nH1 0 0 0\n1\nspin=x\nH 0 0 0\n"
        "1\nmultiplicity=2\nD 0 0 0\n1\ncharge=T\n1 0 0 0\n"
    )
    first, bad, second, flag = read(smi(tmp_path, "\ufeff" + text, "mols.xyz"))
    assert first.atoms.info == {"charge": 1.0} and "'spin'" in bad.failure
    assert second.atoms.info["num_unpaired_electrons"] == 1
    assert second.atoms.numbers.tolist() == [1] and second.atoms.get_masses()[0] > 2
    assert "mols.xyz line 10" in flag.failure and "expected a number" in flag.failure


def test_cells_that_are_no_cells(tmp_path):
    pdb = (
        "CRYST1    1.000    1.000    1.000  90.00  90.00  90.00 P 1           1\n"
        "HETATM    1  H   LIG A   1       0.000   0.000   0.000  1.00  0.00           H\nEND\n"
    )
    (record,) = read(smi(tmp_path, pdb, "a.pdb"))
    assert not record.atoms.pbc.any() and not record.atoms.cell.array.any()
    flat = '1\nLattice="4 0 0 0 4 0 4 4 0" Properties=species:S:1:pos:R:3 pbc="T T T"\nH 0 0 0\n'
    (record,) = read(smi(tmp_path, flat, "a.xyz"))
    assert "parallel or coplanar lattice vectors" in record.failure
