"""Tests for the built-in data set: molecules, geometries, labels, and resuming of the generator."""

import errno
import json
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
from ase.units import Bohr, Hartree

Chem = pytest.importorskip("rdkit.Chem")
pytest.importorskip("tblite")

from mlip_jax import workers
from mlip_jax.datasets.builtin import (
    Molecule,
    embedded_molecules,
    generate_embedded,
    labels,
    read_smiles_file,
    sampling,
    storage,
    summarize,
)
from mlip_jax.datasets.builtin import generate as generate_module
from mlip_jax.datasets.builtin.conformations import Task, make_conformations

REPOSITORY = Path(__file__).parents[3]
FEW = [
    Molecule("water", "O", "small"),
    Molecule("methanol", "CO", "small"),
    Molecule("acetate", "CC(=O)[O-]", "charged"),
    Molecule("dimethyl-sulfoxide", "CS(C)=O", "small"),
    Molecule("glycinamide", "NCC(N)=O", "small"),
    Molecule("furan", "c1ccoc1", "rings"),
]


def contents(path):
    """Return the content of an HDF5 file as comparable bytes."""
    content = {}
    with h5py.File(path) as file:
        content[""] = dict(file.attrs)

        def visit(name, node):
            content[name] = dict(node.attrs)
            if isinstance(node, h5py.Dataset):
                content[name, "data"] = (str(node.dtype), node.shape, np.asarray(node[()]).tolist())

        file.visititems(visit)
    return content


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    path = tmp_path_factory.mktemp("embedded") / "few.h5"
    return generate_embedded(
        path, num_conformations=60, molecules=FEW, num_processes=2, progress=False
    )


@pytest.fixture
def in_this_process(monkeypatch):
    """Run jobs in this process, for tests whose subject is not the workers."""
    run = workers.run
    monkeypatch.setattr(workers, "run", lambda function, jobs, *_, **__: run(function, jobs, 1))


# Molecules.


def test_molecules_are_valid_and_unique():
    molecules = embedded_molecules()
    mols = [Chem.MolFromSmiles(molecule.smiles) for molecule in molecules]
    assert all(mols)
    assert max(Counter(Chem.MolToSmiles(mol) for mol in mols).values()) == 1
    assert max(Counter(molecule.name for molecule in molecules).values()) == 1
    assert not any("/" in molecule.name for molecule in molecules)
    assert {molecule.subset for molecule in molecules} == {
        "Embedded Dipeptides",
        "Embedded Drugs",
        "Embedded Fragments",
        "Embedded Solvents and Monomers",
    }


def test_molecules_are_small_mostly_neutral_and_mostly_of_five_elements():
    mols = [Chem.AddHs(Chem.MolFromSmiles(molecule.smiles)) for molecule in embedded_molecules()]
    sizes = [mol.GetNumAtoms() for mol in mols]
    charged = np.mean([Chem.GetFormalCharge(mol) != 0 for mol in mols])
    other = np.mean(
        [not {atom.GetSymbol() for atom in mol.GetAtoms()} <= set("HCNOS") for mol in mols]
    )
    assert 300 <= len(mols) <= 500
    assert 15 < np.mean(sizes) < 20 and max(sizes) <= 45
    assert 0.03 < charged < 0.07 and 0.03 < other < 0.07


@pytest.mark.parametrize(
    "group",
    [
        "[CX3](=O)[NX3]",
        "[CX3](=O)[OX2H]",
        "[CX3](=O)[OX2][CX4]",
        "[SX2H]",
        "[SX2]([#6])[#6]",
        "[SX2][SX2]",
        "S(=O)(=O)N",
        "[SX3]=O",
        "C#N",
        "[N+](=O)[O-]",
        "C#C",
        "[CX3H1]=O",
        "NC(=N)N",
        "NC(=O)N",
        "C(=S)N",
        "[NX3][NX3]",
        "[NX3][OX2]",
        "[OX2]C[OX2]",
        "C1CO1",
        "[#6]=N[OX2]",
        "[#6]=N[NX3]",
        "O=C([OX2])[OX2]",
        "c1nc[nH]c1",
        "c1ccsc1",
        "c1ccoc1",
        "[OX2H]c",
        "C=CC=O",
        "C1CC1",
    ],
)
def test_every_functional_group_occurs_in_several_molecules(group):
    pattern = Chem.MolFromSmarts(group)
    matches = sum(
        Chem.MolFromSmiles(molecule.smiles).HasSubstructMatch(pattern)
        for molecule in embedded_molecules()
    )
    assert matches >= 3, matches


def test_allocated_conformations_sum_to_the_total():
    molecules = embedded_molecules()
    for total in (1, 100, 8000):
        assert sum(generate_module.allocate_conformations(molecules, total)[0]) == total
    counts = dict(
        zip(
            [m.name for m in molecules],
            generate_module.allocate_conformations(molecules, 8000)[0],
            strict=True,
        )
    )
    assert counts["methane"] >= 8 and counts["ace-ala-ala-nme"] > counts["methane"]


def test_smiles_file_reports_invalid_lines_and_keeps_the_others(tmp_path):
    file = tmp_path / "mine.smi"
    file.write_text("# mine\nCCO ethanol\nC1CC broken\n\nOCC again\nC/C=C/C\nCN a/b\nCS ethanol\n")
    molecules, problems = read_smiles_file(file)
    assert [molecule.name for molecule in molecules] == [
        "ethanol",
        "line-6",
        "a_b",
        "ethanol (line 8)",
    ]
    assert len(problems) == 2
    assert "line 3" in problems[0] and "C1CC" in problems[0]
    assert "line 5" in problems[1] and "line 2" in problems[1]


def test_all_invalid_molecules_are_reported(tmp_path):
    bad = [
        Molecule("a", "C1CC", ""),
        Molecule("b", "C", ""),
        Molecule("b", "CC", ""),
        Molecule("c/d", "O", ""),
    ]
    with pytest.raises(ValueError, match="'b'.*'c/d'") as error:
        generate_embedded(tmp_path / "x.h5", molecules=bad, progress=False)
    assert "C1CC" in str(error.value)
    assert not list(tmp_path.iterdir())


# Geometries and labels.


def displaced(smiles, seed=0):
    """A surface, its minimum and a displaced geometry."""
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    ids = sampling.embed(mol, 1, seed + 1)
    surface = sampling.Surface(mol)
    minimum = surface.minimum(ids[0])
    return (
        mol,
        surface,
        minimum,
        minimum + np.random.default_rng(seed).normal(0, 0.03, minimum.shape),
    )


@pytest.mark.parametrize(
    "smiles", ["CO", "CC(=O)N[C@@H](C)C(=O)NC", "CS(=O)(=O)N", "[NH3+]CC(=O)[O-]", "CB(O)O"]
)
def test_molecular_mechanics_gradient_against_central_differences(smiles):
    _, surface, minimum, positions = displaced(smiles)
    assert surface.name == ("UFF" if "B" in smiles else "MMFF94")
    # Another geometry just before: the gradient must not remember it.
    surface.energy(minimum)
    surface.gradient(minimum)
    gradient = surface.gradient(positions)
    step = 1e-5
    differences = np.zeros_like(positions)
    for index in np.ndindex(*positions.shape):
        up, down = positions.copy(), positions.copy()
        up[index] += step
        down[index] -= step
        differences[index] = (surface.energy(up) - surface.energy(down)) / (2 * step)
    np.testing.assert_allclose(gradient, differences, atol=1e-5 * np.abs(differences).max())


def test_langevin_keeps_the_harmonic_energy_of_its_temperature():
    # In a stiff molecule the mean energy above the minimum is kT/2 per vibration (3n - 6).
    _, surface, minimum, _ = displaced("C")
    temperature = 150.0
    frames = sampling.langevin(surface, minimum, temperature, 60, np.random.default_rng(0))
    energy = np.mean([surface.energy(frame) for frame in frames]) - surface.energy(minimum)
    expected = 0.5 * sampling.BOLTZMANN * temperature * 9
    assert energy == pytest.approx(expected, rel=0.3)


def test_broken_and_fused_geometries_are_detected():
    mol, _, minimum, _ = displaced("CO")
    radii, bonded = (
        labels.covalent_radii([a.GetAtomicNum() for a in mol.GetAtoms()]),
        labels.bond_matrix(mol),
    )
    assert labels.is_intact(minimum, radii, bonded)
    torn, fused, lost = minimum.copy(), minimum.copy(), minimum.copy()
    torn[5] += 2 * (torn[5] - torn[1])
    fused[5] = minimum[2] + [0.3, 0, 0]
    lost[0] = np.nan
    assert not any(labels.is_intact(positions, radii, bonded) for positions in (torn, fused, lost))


def test_near_minimum_geometries_have_small_forces():
    result = make_conformations(Task(Molecule("n-methylacetamide", "CNC(C)=O", ""), 20, 0))
    rms = np.sqrt(np.mean(result.gradients.astype(float) ** 2, axis=(1, 2))) * Hartree / Bohr
    assert (rms < 0.6).sum() >= 2 and rms.min() < 0.35
    assert 0.8 < np.median(rms) < 1.6


def test_failed_molecule_reports_its_reason():
    result = make_conformations(Task(Molecule("iron", "[Fe]", ""), 5, 0))
    assert len(result.energies) == 0
    assert sum(result.dropped.values()) == 5 and "atomic number 26" in next(iter(result.dropped))


# The file.


def test_layout_is_that_of_spice(few):
    with h5py.File(few) as file:
        assert set(file) == {molecule.name for molecule in FEW}
        for molecule in FEW:
            group = file[molecule.name]
            m, n = group["conformations"].shape[:2]
            assert m > 3
            arrays = {
                name: data for name, data in group.items() if name not in ("smiles", "subset")
            }
            assert {name: (data.shape, data.dtype) for name, data in arrays.items()} == {
                "atomic_numbers": ((n,), np.int16),
                "conformations": ((m, n, 3), np.float32),
                "dft_total_energy": ((m,), np.float64),
                "dft_total_gradient": ((m, n, 3), np.float32),
                "formation_energy": ((m,), np.float64),
            }
            assert {
                name: data.attrs["units"] for name, data in group.items() if "units" in data.attrs
            } == {
                "conformations": "bohr",
                "dft_total_energy": "hartree",
                "dft_total_gradient": "hartree/bohr",
                "formation_energy": "hartree",
            }
            assert group["subset"].asstr()[0] == molecule.subset


def test_mapped_smiles_are_in_atom_order(few):
    with h5py.File(few) as file:
        for molecule in FEW:
            mol = Chem.MolFromSmiles(file[molecule.name]["smiles"].asstr()[0], sanitize=False)
            by_map = {atom.GetAtomMapNum(): atom.GetAtomicNum() for atom in mol.GetAtoms()}
            numbers = file[molecule.name]["atomic_numbers"][()]
            assert [by_map[i + 1] for i in range(len(numbers))] == numbers.tolist()
            assert Chem.GetFormalCharge(mol) == Chem.GetFormalCharge(
                Chem.MolFromSmiles(molecule.smiles)
            )


def test_labels_belong_to_the_stored_geometry_and_the_gradient_is_one(few):
    with h5py.File(few) as file:
        for name, charge in (("methanol", 0), ("acetate", -1)):
            group = file[name]
            numbers, positions = (
                group["atomic_numbers"][()],
                group["conformations"][0].astype(np.float64),
            )
            energy, _ = labels.energy_and_gradient(numbers, positions, charge)
            assert energy == pytest.approx(group["dft_total_energy"][0], abs=1e-10)
            step = 1e-3
            for index in ((0, 0), (1, 2), (len(numbers) - 1, 1)):
                up, down = positions.copy(), positions.copy()
                up[index] += step
                down[index] -= step
                slope = (
                    labels.energy_and_gradient(numbers, up, charge)[0]
                    - labels.energy_and_gradient(numbers, down, charge)[0]
                ) / (2 * step)
                assert group["dft_total_gradient"][0][index] == pytest.approx(slope, abs=2e-5)


def test_formation_energy_is_the_total_minus_the_isolated_atoms(few):
    with h5py.File(few) as file:
        atoms = json.loads(file.attrs["energies_of_isolated_atoms"])
        water = file["water"]
        expected = water["dft_total_energy"][()] - 2 * atoms["H"] - atoms["O"]
        np.testing.assert_allclose(water["formation_energy"][()], expected, atol=1e-10)
        assert -0.6 < expected.max() < -0.2  # about 10 eV of binding
        assert (
            "GFN2-xTB" in file.attrs["level_of_theory"]
            and "not the wB97M-D3(BJ)" in file.attrs["note"]
        )


def test_positions_are_in_bohr_and_conformations_are_distinct(few):
    with h5py.File(few) as file:
        for group in file.values():
            conformations = group["conformations"][()] * Bohr
            bonds = np.linalg.norm(conformations[:, :, None] - conformations[:, None], axis=-1)
            bonds[bonds < 1e-6] = np.inf
            assert 0.7 < bonds.min() and bonds.min(axis=(1, 2)).max() < 1.2
            assert len(np.unique(conformations.round(4), axis=0)) == len(conformations)


def test_summary(few):
    summary = summarize(few)
    assert summary["molecules"] == 6 and 55 <= summary["conformations"] <= 60
    assert summary["conformations"] + sum(summary["dropped"].values()) == 60
    assert list(summary["force_rms"]) == ["5%", "25%", "50%", "75%", "95%"]
    assert 0.7 < summary["force_rms"]["50%"] < 1.6
    assert sum(summary["subsets"].values()) == summary["conformations"]
    assert summary["elements"]["H"] == summary["conformations"] > summary["elements"]["S"]


# Caching, determinism, interruptions.


def test_finished_file_is_returned_immediately(few, monkeypatch):
    before = few.stat()
    monkeypatch.setattr(generate_module, "make_parts", lambda *_: pytest.fail("generated again"))
    assert generate_embedded(few, num_conformations=60, molecules=FEW, progress=False) == few
    assert few.stat().st_mtime_ns == before.st_mtime_ns
    assert not few.with_name("few.h5.parts").exists()


def test_content_does_not_depend_on_processes_or_other_molecules(few, tmp_path):
    alone = tmp_path / "alone.h5"
    generate_embedded(alone, num_conformations=60, molecules=FEW, num_processes=1, progress=False)
    assert contents(alone) == contents(few)
    task = Task(FEW[1], len(contents(few)["methanol/conformations", "data"][2]), 0)
    local = make_conformations(task)
    with h5py.File(few) as file:
        np.testing.assert_allclose(local.energies, file["methanol/dft_total_energy"][()], atol=1e-9)


def test_other_seed_gives_other_geometries(in_this_process, few, tmp_path):
    other = generate_embedded(
        tmp_path / "x.h5", num_conformations=60, molecules=FEW[:1], seed=1, progress=False
    )
    with h5py.File(few) as first, h5py.File(other) as second:
        assert abs(first["water/conformations"][0] - second["water/conformations"][0]).max() > 1e-3


def test_file_with_other_parameters_is_replaced_but_a_foreign_one_is_not(in_this_process, tmp_path):
    path = tmp_path / "x.h5"
    for total in (4, 6):
        generate_embedded(path, num_conformations=total, molecules=FEW[:1], progress=False)
        assert summarize(path)["conformations"] == total
    for foreign in (b"not HDF5", None):
        path.unlink()
        path.write_bytes(foreign) if foreign else h5py.File(path, "w").close()
        before = path.read_bytes()
        with pytest.raises(FileExistsError, match="not created by generate_embedded"):
            generate_embedded(path, num_conformations=4, molecules=FEW[:1], progress=False)
        assert path.read_bytes() == before


SCRIPT = """
import sys
from mlip_jax.datasets.builtin import embedded_molecules, generate_embedded
if __name__ == "__main__":
    molecules = embedded_molecules()[200:216]
    generate_embedded(sys.argv[1], num_conformations=160, molecules=molecules, num_processes=2)
"""


def start(script, path):
    script.write_text(SCRIPT)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    }
    # If a shell started the tests in the background, SIGINT is ignored, also in child processes.
    return subprocess.Popen(
        [sys.executable, script, path],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def group_is_empty(group):
    """Return whether no process of a process group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    "signal_number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_interrupted_run_resumes_with_the_same_result(tmp_path, signal_number):
    path, parts = tmp_path / "x.h5", tmp_path / "x.h5.parts"
    process = start(tmp_path / "script.py", path)
    wait_until(lambda: len(list(parts.glob("*.npz"))) >= 4)
    if signal_number == signal.SIGINT:
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does on Ctrl-C: to all processes
    else:
        process.kill()
    process.communicate(timeout=600)
    assert process.returncode != 0 and not path.exists()
    wait_until(lambda: group_is_empty(process.pid))
    finished = {part: part.stat().st_mtime_ns for part in parts.glob("*.npz")}
    assert 4 <= len(finished) < 16

    # A truncated part, as after a crash of the machine, is regenerated.
    corrupted = sorted(finished)[0]
    corrupted.write_bytes(corrupted.read_bytes()[:100])
    saved = []
    original = storage.Parts.save
    molecules = embedded_molecules()[200:216]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            storage.Parts,
            "save",
            lambda self, index, part: saved.append(index) or original(self, index, part),
        )
        generate_embedded(
            path, num_conformations=160, molecules=molecules, num_processes=2, progress=False
        )
        assert len(saved) == 16 - len(finished) + 1
        whole = generate_embedded(
            tmp_path / "whole.h5", num_conformations=160, molecules=molecules, progress=False
        )
    assert contents(path) == contents(whole)
    assert not parts.exists()


@pytest.mark.parametrize("full_after", [0, 1, 2, 3])
def test_full_disk_is_reported(in_this_process, tmp_path, monkeypatch, full_after):
    path = tmp_path / "x.h5"
    original, writes = os.fsync, []

    def fsync(fd):
        """Raise as on a full disk, which is noticed at the latest when the content is flushed."""
        writes.append(fd)
        if len(writes) > full_after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left on device.*Free disk space") as error:
            generate_embedded(path, num_conformations=8, molecules=FEW[:2], progress=False)
    assert error.value.errno == errno.ENOSPC
    assert not path.exists()
    left = {file.name for file in (tmp_path / "x.h5.parts").iterdir()}
    assert (
        left <= {"lock", "parameters.json", "000000.npz", "000001.npz"}
        and len(left) == full_after + 1
    )
    generate_embedded(path, num_conformations=8, molecules=FEW[:2], progress=False)
    assert summarize(path)["conformations"] == 8
    assert [file.name for file in tmp_path.iterdir()] == ["x.h5"]


def test_unwritable_folder_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not write"):
        generate_embedded(
            tmp_path / "file" / "x.h5", num_conformations=4, molecules=FEW[:1], progress=False
        )


def test_missing_packages_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(generate_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"rdkit and tblite: pip install 'mlip-flax\[data\]'"):
        generate_embedded(tmp_path / "x.h5")


def test_task(tmp_path, caplog):
    from mlip_jax.configs import generate as config_file
    from mlip_jax.tasks import generate as task

    config = config_file.get_config()
    config.data.num_conformations = 8
    (tmp_path / "mine.smi").write_text("CO methanol\nnonsense\nO water\n")
    config.data.molecules = str(tmp_path / "mine.smi")
    path = task.run(config, tmp_path)
    assert path == tmp_path / "embedded.h5" and summarize(path)["molecules"] == 2
    (tmp_path / "mine.smi").write_text("nonsense\n")
    with pytest.raises(ValueError, match="no usable molecule"):
        task.run(config, tmp_path)


@pytest.mark.slow
def test_sample_of_the_whole_set_has_realistic_forces(tmp_path):
    molecules = embedded_molecules()[::9]
    path = generate_embedded(
        tmp_path / "x.h5", num_conformations=900, molecules=molecules, progress=False
    )
    summary = summarize(path)
    assert summary["conformations"] > 0.98 * 900
    assert summary["force_rms"]["5%"] < 0.5
    assert 0.9 < summary["force_rms"]["50%"] < 1.3
    assert 1.7 < summary["force_rms"]["95%"] < 3
