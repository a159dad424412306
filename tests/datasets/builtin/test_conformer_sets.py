"""Tests for conformer sets: selected molecules, distinct conformers, labels, and resuming."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
from ase.units import Bohr

Chem = pytest.importorskip("rdkit.Chem")
pytest.importorskip("tblite")

from mlip_jax.config import ConfigError
from mlip_jax.datasets.builtin import generate, labels, storage
from mlip_jax.datasets.builtin.conformer_sets import (
    ConformerOptions,
    Selection,
    generate_conformers,
    select_molecules,
)
from mlip_jax.datasets.builtin.conformers import ConformerTask, make_conformers
from mlip_jax.datasets.builtin.molecules import Molecule
from mlip_jax.datasets.molecules.symmetry import best_rms
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.readers import open_data

REPOSITORY = Path(__file__).parents[3]
FEW = ConformerOptions(num_conformers=4, prune_rmsd=0.2)


def molecules(tmp_path, text, selection=Selection()):  # noqa: B008
    path = tmp_path / "molecules.smi"
    path.write_text(text)
    left_out = Counter()
    return list(select_molecules(path, selection, "drugs", left_out)), left_out


def test_molecules_are_selected(tmp_path):
    text = (
        "CCO ethanol\nOCC again\nC[NH3+]\nCCCCCCCC a/b\nC1CC\nO.CCO\nCBr\nCCCCO\nCCCCCO too many\n"
    )
    actual, left_out = molecules(
        tmp_path, text, Selection(count=3, elements=("H", "C", "O"), max_atoms=26)
    )
    assert actual == [
        Molecule("00000000 ethanol", "CCO", "drugs"),
        Molecule("00000003 a_b", "CCCCCCCC", "drugs"),
        Molecule("00000007", "CCCCO", "drugs"),
    ]
    assert left_out == {
        "duplicate": 1,
        "other elements": 2,
        "not a valid SMILES": 1,
        "several fragments": 1,
    }  # molecules after the third are not read
    assert molecules(tmp_path, "C[NH3+]\nCCCC\nCC=O\n", Selection(min_rotatable=1))[1] == {
        "other charge": 1,
        "too few rotatable bonds": 1,
    }
    assert [
        m.smiles
        for m in molecules(tmp_path, "CC\nC[NH3+]\n", Selection(charge=None, min_atoms=8))[0]
    ] == ["CC", "C[NH3+]"]


def test_only_smiles_files_are_accepted(tmp_path):
    with pytest.raises(DatasetError, match="no such file"):
        list(select_molecules(tmp_path / "none.smi", Selection(), "", Counter()))
    (tmp_path / "a.csv").write_text("name,what\nx,CC\n")
    with pytest.raises(ConfigError, match="no column is called smiles"):
        list(select_molecules(tmp_path / "a.csv", Selection(), "", Counter()))


def test_conformers_are_distinct_and_labels_match():
    task = ConformerTask(Molecule("m", "CC(C)(C)CCO", "drugs"), 4, FEW, 0)
    actual = make_conformers(task)
    assert 2 <= len(actual.energies) <= 4 and actual.force_field == "MMFF94"
    mol = Chem.AddHs(Chem.MolFromSmiles("CC(C)(C)CCO"))
    positions = actual.conformations * Bohr
    rmsd = best_rms(mol, positions, positions)
    assert rmsd[~np.eye(len(rmsd), dtype=bool)].min() > 0.19
    energy, gradient = labels.energy_and_gradient(actual.atomic_numbers, actual.conformations[0])
    assert actual.energies[0] == pytest.approx(energy, abs=1e-9)
    np.testing.assert_allclose(actual.gradients[0], gradient, atol=1e-6)
    again = make_conformers(task)
    np.testing.assert_array_equal(again.conformations, actual.conformations)
    assert sum(actual.dropped.values()) + len(actual.energies) == 4


def test_relaxation_by_gfn2_reduces_forces():
    molecule = Molecule("m", "CCCO", "drugs")
    plain, relaxed = (
        make_conformers(ConformerTask(molecule, 3, FEW._replace(gfn2_steps=steps), 0))
        for steps in (0, 8)
    )
    assert len(plain.energies) == len(relaxed.energies)
    assert np.abs(relaxed.gradients).max() < 0.5 * np.abs(plain.gradients).max()
    assert (relaxed.energies < plain.energies).all()


@pytest.mark.parametrize(
    "smiles, options, reason",
    [
        ("CO", FEW._replace(min_conformers=2), "too few conformers"),
        ("[Fe]", FEW, "molecule: no isolated-atom energy for atomic number 26"),
        ("C1C[C@@H]2CC[C@@H]1C2", FEW, "molecule: RDKit found no three-dimensional geometry"),
    ],
)
def test_failed_molecules_are_reported(smiles, options, reason):
    actual = make_conformers(ConformerTask(Molecule("m", smiles, ""), 4, options, 0))
    assert actual.conformations.shape[0] == 0 and len(actual.dropped) == 1
    assert next(iter(actual.dropped)).startswith(reason) and set(actual.dropped.values()) == {4}


@pytest.fixture(scope="module")
def smiles_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("smiles") / "molecules.smi"
    path.write_text("CCO\nCCCO\nOCCO\nCC(=O)NC\nCCC=O\n")
    return path


def test_files_are_readable_and_generated_once(tmp_path, smiles_file, monkeypatch):
    arguments = dict(options=FEW, molecules_per_file=2, num_processes=1, progress=False)
    files = generate_conformers(tmp_path / "data", smiles_file, **arguments)
    assert [f.name for f in files] == [f"conformers-0000{n}.hdf5" for n in range(3)]
    data = open_data(str(tmp_path / "data/*.hdf5"))
    structures = list(data.read(range(len(data)), ReadReport()))
    assert len({s.molecule for s in structures}) == 5
    assert all(
        np.isfinite(s.energy) and np.isfinite(s.forces).all() and s.subset == "Conformers"
        for s in structures
    )
    monkeypatch.setattr(generate, "make_parts", lambda *_: pytest.fail("made again"))
    assert generate_conformers(tmp_path / "data", smiles_file, **arguments) == files


def test_file_without_conformers_is_marked_empty(tmp_path, monkeypatch):
    (tmp_path / "molecules.smi").write_text("CCCCO\nCO\n")
    arguments = dict(
        options=FEW._replace(min_conformers=2),
        molecules_per_file=1,
        num_processes=1,
        progress=False,
    )
    files = generate_conformers(tmp_path, tmp_path / "molecules.smi", **arguments)
    assert (
        files == [tmp_path / "conformers-00000.hdf5"]
        and (tmp_path / "conformers-00001.empty").exists()
    )
    assert len(list(tmp_path.glob("conformers*"))) == 2
    monkeypatch.setattr(generate, "make_parts", lambda *_: pytest.fail("made again"))
    assert generate_conformers(tmp_path, tmp_path / "molecules.smi", **arguments) == files


def test_invalid_settings_are_rejected(tmp_path, smiles_file):
    for options, message in (
        (ConformerOptions(num_conformers=2, min_conformers=3), "min_conformers must be"),
        (ConformerOptions(candidates=0.5), "candidates must be"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_conformers(tmp_path, smiles_file, options=options)
    with pytest.raises(ValueError, match="molecules_per_file"):
        generate_conformers(tmp_path, smiles_file, molecules_per_file=0)
    with pytest.raises(DatasetError, match="no molecule has a conformer"):
        generate_conformers(
            tmp_path, smiles_file, selection=Selection(min_atoms=100), num_processes=1
        )


@pytest.mark.slow
def test_killed_run_resumes_without_repeating_molecules(tmp_path):
    """After two SIGKILLs, saved parts are unchanged and the file equals that of a complete run."""
    (tmp_path / "molecules.smi").write_text("".join("C" * n + "O\n" for n in range(2, 12)))
    command = [
        sys.executable,
        "-m",
        "mlip_jax.main",
        f"--config={REPOSITORY}/configs/geom_like.py",
        f"--config.smiles={tmp_path}/molecules.smi",
        "--config.num_processes=1",
        "--config.select.min_rotatable=0",
        "--config.select.max_atoms=60",
        "--config.conformers.min_conformers=1",
        "--config.conformers.num_conformers=6",
    ]
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY))
    killed = tmp_path / "killed"
    parts = killed / "data/conformers-00000.hdf5.parts"
    times = {}
    for wanted in (2, 5):
        process = subprocess.Popen(
            [*command, f"--workdir={killed}"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 300
        while len(list(parts.glob("*.npz"))) < wanted and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        actual = {p.name: p.stat().st_mtime_ns for p in parts.glob("*.npz")}
        assert len(actual) >= wanted and times.items() <= actual.items()
        times = actual
    for workdir in (killed, tmp_path / "whole"):
        subprocess.run(
            [*command, f"--workdir={workdir}"], env=environment, check=True, capture_output=True
        )
    with (
        h5py.File(killed / "data/conformers-00000.hdf5") as a,
        h5py.File(tmp_path / "whole/data/conformers-00000.hdf5") as b,
    ):
        assert list(a) == list(b) and len(a) == 10
        for name in a:
            np.testing.assert_array_equal(a[name]["conformations"], b[name]["conformations"])
    assert storage.summarize(killed / "data/conformers-00000.hdf5")["molecules"] == 10
