"""Tests for the kinds of geometries of the generator: torsions, dimers and small molecules."""

import json

import h5py
import numpy as np
import pytest
from ase.units import Bohr, Hartree

Chem = pytest.importorskip("rdkit.Chem")
pytest.importorskip("tblite")

from mlip_jax import config as configs
from mlip_jax import workers
from mlip_jax.datasets.builtin import Molecule, generate_embedded
from mlip_jax.datasets.builtin.conformations import Task, make_conformations
from mlip_jax.datasets.builtin.kinds import KINDS, jobs
from mlip_jax.datasets.builtin.kinds.dimers import place
from mlip_jax.datasets.builtin.kinds.torsions import turnable_bonds
from mlip_jax.defaults import generate_defaults

AMIDE, WATER = Molecule("amide", "CC(=O)NC", "User"), Molecule("water", "O", "User")
SMALL, LARGE = Molecule("small", "N", "User"), Molecule("large", "C" * 16, "User")


def frames(smiles, kind, count):
    """Return atomic numbers, positions (Å) and energies (eV) of generated geometries."""
    part = make_conformations(Task(Molecule("x", smiles, ""), count, 0, kind))
    assert sum(part.dropped.values()) < count / 3
    return part.atomic_numbers, part.conformations * Bohr, part.energies * Hartree


def test_torsions_of_amides_take_all_angles():
    """Thermal conformations have planar amides only, so barriers of amides were far too low."""
    _, positions, energies = frames("CC(=O)NC", "torsions", 30)
    mol = Chem.AddHs(Chem.MolFromSmiles("CC(=O)NC"))
    sines = []
    for each in positions:
        mol.RemoveAllConformers()
        conformer = Chem.Conformer(len(each))
        conformer.SetPositions(each.astype(float))
        mol.AddConformer(conformer)
        angle = Chem.rdMolTransforms.GetDihedralDeg(mol.GetConformer(), 0, 1, 3, 4)
        sines.append(abs(np.sin(np.radians(angle))))
    assert np.mean(np.array(sines) > 0.7) > 0.15  # twisted by 45 to 135 degrees
    assert 0.4 < np.ptp(energies) < 6.0


def test_bonds_that_turn():
    """Detects turns about bonds of triple bonds, rings and terminal atoms, which do nothing."""
    for smiles, expected in (
        ("CC(=O)NC", 3),  # C-C, C-N, N-C
        ("CC#CC", 0),
        ("C1CC1", 0),
        ("O", 0),
        ("CS(=O)(=O)N", 2),
        ("OP(=O)(O)O", 3),
    ):
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        assert len(turnable_bonds(mol)) == expected, smiles


def test_dimers_go_from_contact_to_separation():
    """Detects pairs at one distance, and labels that are not those of the whole pair."""
    numbers, positions, energies = frames("O.C", "dimers", 24)
    first = np.array([0, 2, 3])  # hydrogens follow the heavy atoms
    second = np.setdiff1d(np.arange(len(numbers)), first)
    assert sorted(numbers[first]) == [1, 1, 8] and sorted(numbers[second]) == [1, 1, 1, 1, 6]
    gaps = positions[:, first][:, :, None] - positions[:, second][:, None]
    closest = np.linalg.norm(gaps, axis=-1).min((1, 2))
    assert closest.min() < 2.6 and closest.max() > 4.0 and np.ptp(energies) < 2.0


def test_dimers_of_molecules_without_mmff94_parameters():
    """UFF needs positions when it is built; without them, one such pair ended the whole run."""
    _, positions, _ = frames("C[PH](C)(C)C.O", "dimers", 4)
    assert len(positions) >= 3


def test_placed_molecules_have_the_requested_contact():
    rng, radius = np.random.default_rng(0), 1.2  # of hydrogen, RDKit
    atom, hydrogen = np.zeros((1, 3)), np.array([1])
    first, second = place([atom, atom], [hydrogen, hydrogen], 1.0, 2.0, rng)
    assert np.linalg.norm(first - second) == pytest.approx(2 * radius + 2.0, abs=0.05)


def test_stretches_reach_long_and_short_bonds():
    """Detects hydrogen, which molecular mechanics and other kinds treat poorly, at one length."""
    _, positions, energies = frames("[H][H]", "stretches", 24)
    lengths = np.linalg.norm(positions[:, 0] - positions[:, 1], axis=-1)
    assert lengths.min() < 0.7 and lengths.max() > 0.8
    assert np.abs(lengths[energies.argmin()] - 0.776) < 0.03  # GFN2-xTB bond length of tblite
    assert np.ptp(energies) > 0.1


def test_jobs_of_kinds():
    """Detects duplicate names, partners that are too large, and molecules without the kind."""
    found = jobs([AMIDE, WATER, LARGE], KINDS, seed=0)
    by_kind = {k: [job.molecule for job in found if job.kind == k] for k in KINDS}
    assert by_kind["conformations"] == [AMIDE, WATER, LARGE]
    assert [m.smiles for m in by_kind["torsions"]] == [AMIDE.smiles, LARGE.smiles]
    assert [m.smiles for m in by_kind["stretches"]] == [AMIDE.smiles, WATER.smiles]
    pairs = [m.smiles.split(".") for m in by_kind["dimers"]]
    assert len(pairs) == 2 and all(pair[1] != LARGE.smiles for pair in pairs)
    names = [job.molecule.name for job in found]
    assert len(set(names)) == len(names)
    assert jobs([AMIDE, WATER, LARGE], KINDS, seed=0) == found


@pytest.mark.parametrize(
    ("molecules", "kinds", "message"),
    [
        ([WATER], ("dimer",), "data.kinds.*'dimer'.*dimers"),
        ([WATER], ("dimers", "dimers"), "different kinds"),
        ([WATER], (), "different kinds"),
        ([WATER], ("torsions",), "no molecule.*'torsions'"),
    ],
)
def test_unusable_kinds_are_named(molecules, kinds, message):
    with pytest.raises(ValueError, match=message):
        jobs(molecules, kinds, 0)


def test_file_has_all_kinds_and_is_made_again_with_others(tmp_path, monkeypatch, caplog):
    """Detects a file of other kinds that is taken for the requested one."""
    run = workers.run
    monkeypatch.setattr(workers, "run", lambda function, jobs, *_, **__: run(function, jobs, 1))
    path = tmp_path / "small.h5"
    options = {"num_conformations": 4, "molecules": [WATER, SMALL], "progress": False}
    generate_embedded(path, kinds=("dimers", "stretches"), **options)
    with h5py.File(path) as file:
        subsets = {group["subset"].asstr()[0] for group in file.values()}
        assert subsets == {"Dimers", "Stretches"}
        assert json.loads(file.attrs["generator_parameters"])["kinds"] == ["dimers", "stretches"]
    changed = path.stat().st_mtime_ns
    generate_embedded(path, kinds=("dimers", "stretches"), **options)
    assert path.stat().st_mtime_ns == changed
    generate_embedded(path, kinds=("stretches",), **options)
    assert "other settings" in caplog.text
    with h5py.File(path) as file:
        assert {group["subset"].asstr()[0] for group in file.values()} == {"Stretches"}


def test_kinds_are_set_on_the_command_line():
    config = generate_defaults()
    assert config.data.kinds == ("conformations",)
    assert configs.complete(config, generate_defaults()).data.kinds == ("conformations",)
