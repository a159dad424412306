"""Tests for stress labels: sign, units, missing labels, and the check of both."""

from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.io import write
from ase.stress import voigt_6_to_full_3x3_stress
from ase.units import GPa

from mlip_jax.config import ConfigError
from mlip_jax.datasets.atoms_list import from_atoms, write_trajectory
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality.checks import examine
from mlip_jax.datasets.quality.problems import WRONG_STRESS
from mlip_jax.datasets.quality.stress_check import diagnose_stress
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.readers import ase, npz
from mlip_jax.structure import from_ase
from mlip_jax.tasks.force_field_training import preparation
from tests.simulation.analytic import Springs

CELL = np.diag([4.0, 5.0, 6.0])
VOIGT = np.array([0.01, 0.02, 0.03, -0.04, 0.05, 0.06])
STRESS = voigt_6_to_full_3x3_stress(VOIGT)


def crystal(pbc=True, results=True, **info):
    atoms = Atoms("NaCl", [[0, 0, 0], [2, 2.5, 3]], cell=CELL, pbc=pbc, info=info)
    labels = {"stress": VOIGT} if results else {}
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((2, 3)), **labels)
    return atoms


def stresses(path, reader=ase, **options):
    report = ReadReport()
    source = reader.Reader(path, **options)
    structures = list(source.read(range(len(source)), report))
    source.close()
    return [s.properties.get("stress") for s in structures], structures, report


def test_stress_of_frames(tmp_path):
    """ASE's stress, and NaN for frames without it or with an open direction."""
    frames = [crystal(), crystal(results=False), crystal(pbc=(True, True, False))]
    write(tmp_path / "a.xyz", frames)
    with connect(tmp_path / "a.db") as database:
        for atoms in frames:
            database.write(atoms)
    for name in ("a.xyz", "a.db"):
        found, structures, report = stresses(tmp_path / name)
        np.testing.assert_allclose(found[0], STRESS, atol=1e-8)
        assert np.isnan(found[1:]).all() and not report.unread.get("virial")
    found, _, _ = stresses(tmp_path / "a.xyz", stress_unit="GPa", stress_sign_reversed=True)
    np.testing.assert_allclose(found[0], -GPa * STRESS, atol=1e-8)
    found, _, report = stresses(tmp_path / "a.xyz", stress_key="")
    assert found[0] is None and report.unread["stress"] == 2
    write_trajectory(tmp_path / "b.traj", structures[:2])
    found, _, _ = stresses(tmp_path / "b.traj")
    np.testing.assert_allclose(found[0], STRESS, atol=1e-8)
    assert np.isnan(found[1]).all()


def test_stress_of_atoms_reaches_a_training_run(tmp_path):
    """Detects a file of Atoms in memory whose stress occurs twice, which the reader rejects."""
    structures, _ = from_atoms([crystal(), crystal(results=False)])
    write_trajectory(tmp_path / "a.traj", structures)
    found, _, _ = stresses(tmp_path / "a.traj")
    np.testing.assert_allclose(found[0], STRESS, atol=1e-8)
    assert np.isnan(found[1]).all()


@pytest.mark.parametrize("name", ["a.xyz", "a.traj", "a.db"])
def test_stress_after_many_frames_without(tmp_path, name):
    """Detects stresses that are ignored because the first frames of the file are molecules."""
    write(tmp_path / name, [*[crystal(pbc=False, results=False)] * 12, crystal()])
    found, _, report = stresses(tmp_path / name)
    assert np.isnan(found[0]).all() and not report.unread.get("stress")
    np.testing.assert_allclose(found[12], STRESS, atol=1e-8)


def test_stress_of_a_given_name_after_many_frames_without(tmp_path):
    frames = [*[crystal(results=False)] * 12, crystal(results=False, outer_virial=STRESS)]
    write(tmp_path / "a.xyz", frames)
    found, _, _ = stresses(tmp_path / "a.xyz", stress_key="outer_virial")
    np.testing.assert_allclose(found[12], STRESS, atol=1e-8)


@pytest.mark.parametrize("name", ["virial", "REF_virials", "dft_stress"])
def test_virials_and_other_names(tmp_path, name):
    value = STRESS if "stress" in name else -STRESS * np.linalg.det(CELL)
    write(tmp_path / "a.xyz", [crystal(results=False, **{name: value})])
    (found,), _, report = stresses(tmp_path / "a.xyz")
    np.testing.assert_allclose(found, STRESS, atol=1e-8)
    assert not report.unread
    write(tmp_path / "b.xyz", [crystal(results=False, **{name: value + np.eye(3, k=1)})])
    with pytest.raises(DatasetError, match="not symmetric"):
        stresses(tmp_path / "b.xyz")


def test_stress_of_arrays(tmp_path):
    arrays = {
        "numbers": np.array([11, 17]),
        "positions": np.tile([[0, 0, 0], [2, 2.5, 3.0]], (2, 1, 1)),
        "energy": np.zeros(2),
        "cell": CELL,
    }
    np.savez(tmp_path / "a.npz", **arrays, stress=np.tile(VOIGT, (2, 1)))
    np.savez(tmp_path / "b.npz", **arrays, virial=np.tile(-120 * STRESS, (2, 1, 1)))
    for name in ("a.npz", "b.npz"):
        for found in stresses(tmp_path / name, npz)[0]:
            np.testing.assert_allclose(found, STRESS, atol=1e-12)
    np.savez(tmp_path / "c.npz", **arrays, stress=np.ones((2, 2)))
    found, _, report = stresses(tmp_path / "c.npz", npz)
    assert found == [None, None] and report.unread == {"stress": 2}


@pytest.mark.parametrize("name", ["a.xyz", "a.npz"])
def test_one_of_several_stresses_is_chosen(tmp_path, name):
    """The first of two different stresses used to be read without a word."""
    reader = ase if name == "a.xyz" else npz
    virial = -STRESS * np.linalg.det(CELL)
    if reader is ase:
        write(tmp_path / name, [crystal(results=False, REF_stress=STRESS, virial=2 * virial)])
        write(tmp_path / "same.xyz", [crystal(results=False, REF_stress=STRESS, virial=virial)])
        np.testing.assert_allclose(stresses(tmp_path / "same.xyz")[0][0], STRESS, atol=1e-8)
    else:
        arrays = {"numbers": np.array([11, 17]), "positions": np.eye(2, 3)[None], "cell": CELL}
        np.savez(tmp_path / name, **arrays, stress=STRESS[None], virial=2 * virial[None])
    with pytest.raises(DatasetError, match="several stresses: .*stress.*virial.*stress_key="):
        stresses(tmp_path / name, reader)
    (found,), _, _ = stresses(tmp_path / name, reader, stress_key="virial")
    np.testing.assert_allclose(found, 2 * STRESS, atol=1e-8)
    (found,), _, report = stresses(tmp_path / name, reader, stress_key="none")
    assert found is None and report.unread["virial"] == 1
    # as a property, it would be in the file's unit and sign
    with pytest.raises(ConfigError, match="loss.stress.*stress_unit"):
        stresses(tmp_path / name, reader, property_keys=("stress",))


def test_runs_refuse_stores_without_usable_stresses():
    """Detects stores of earlier versions, and stresses that do not fit the energies."""
    springs = Springs()  # a model with derivatives of its energy

    def check(reject_invalid=True, **manifest):
        manifest = {"problems": [], "properties": {}, "source": {"path": "a.xyz"}} | manifest
        store = SimpleNamespace(path="stores/a", manifest=manifest, chunks=lambda _: iter(()))
        data, train = SimpleNamespace(store=store), SimpleNamespace(indices=np.arange(0))
        preparation.check_stress(data, train, springs, reject_invalid)

    with pytest.raises(DatasetError, match="earlier version.*convert a.xyz again"):
        check()
    with pytest.raises(DatasetError, match="no structure of the training split of stores/a"):
        check(reads_stress=True)
    wrong = {"what": WRONG_STRESS, "message": "the stress has the wrong sign"}
    with pytest.raises(DatasetError, match="loss.stress is set, but the stress has the wrong"):
        check(problems=[wrong])
    with pytest.raises(DatasetError, match="no structure"):
        check(problems=[wrong], reads_stress=True, reject_invalid=False)


@pytest.mark.parametrize(
    ("factor", "words"), [(1, ""), (-1, "wrong sign"), (1 / GPa, "not in eV/Å³, but in GPa")]
)
def test_energy_differences_show_sign_and_unit(factor, words):
    """Crystals of Lennard-Jones atoms, strained and displaced at random."""
    rng = np.random.default_rng(0)
    calculator = LennardJones(epsilon=0.2, sigma=2.4, rc=5.0, smooth=True)
    structures = []
    for _ in range(24):
        cell = np.diag([3.4, 3.6, 3.8]) @ (np.eye(3) + rng.normal(0, 0.02, (3, 3)))
        scaled = np.array([[0, 0, 0], [0.5, 0.5, 0.5]]) + rng.normal(0, 0.01, (2, 3))
        atoms = Atoms("Ar2", scaled_positions=scaled, cell=cell, pbc=True, calculator=calculator)
        stress = factor * voigt_6_to_full_3x3_stress(atoms.get_stress())
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        structures.append(
            from_ase(atoms, energy=energy, forces=forces, properties={"stress": stress})
        )
    findings = examine(Columns.from_structures(structures))
    problems = diagnose_stress(findings)
    assert [words in p.message for p in problems] == [True] * bool(words)
    # runs with loss.stress refuse it; others do not use the stress
    assert {p.severity for p in problems} <= {"warning"}
    ratio = findings.distributions["stress ratio"]
    assert ratio.count > 12 and ratio.median == pytest.approx(1 / factor, rel=0.05)
