"""Tests for the Python functions `train`, `evaluate` and `load`."""

import dataclasses
import shutil

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

import mlip_jax
from mlip_jax import (
    EnsembleCalculator,
    MLIPCalculator,
    MolecularDynamics,
    Potential,
    Relaxer,
    evaluate,
    load,
    train,
)
from mlip_jax.config import ConfigError, load_file
from mlip_jax.datasets import atoms_list, source
from mlip_jax.datasets.given_structures import set_structures
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.readers import open_data
from mlip_jax.tasks.force_field_evaluation import data as evaluation_data
from tests.simulation.analytic import PartOfTheGradient, springs
from tests.simulation.conftest import random_potential
from tests.tasks.property_runs import write_force_field
from tests.tasks.test_evaluate import labelled


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library") / "ff"
    write_force_field(folder)
    return folder


def test_every_export_exists():
    """Detects a name whose module moved."""
    assert all(getattr(mlip_jax, name) is not None for name in mlip_jax.__all__)


def test_a_force_field_in_every_form(workdir):
    """Detects a function that takes fewer forms of a force field than the others."""
    potential, calculator = Potential.load(workdir), load(workdir)
    water, digest = molecule("H2O"), potential.digest()
    expected = calculator.get_potential_energy(water)
    for form in (workdir, str(workdir), potential, calculator):
        assert evaluate(form, water).energies[0] == pytest.approx(expected, abs=1e-5)
        assert load(form).potential.digest() == mlip_jax.load_force_field(form).digest() == digest
        for user in (Relaxer(form), MLIPCalculator(form), MolecularDynamics(water, form)):
            assert user.potential.digest() == digest
    write_force_field(workdir.parent / "other", seed=1)
    pair = f"{workdir}, {workdir.parent / 'other'}"
    ensemble = load(pair)
    assert isinstance(ensemble, EnsembleCalculator)
    spreads = [evaluate(f, water).evaluated.predictions.energy_std[0] for f in (pair, ensemble)]
    assert spreads[0] == spreads[1] > 0
    with pytest.raises(ValueError, match="expected one force field, received 2"):
        mlip_jax.load_force_field(pair)
    with pytest.raises(ValueError, match="expected the workdir"):
        load(3)


def test_evaluate_in_memory(workdir):
    frames = labelled()
    result = evaluate(workdir, frames)
    assert result.report is None and result.skipped == {3: "unknown element Cl"}
    assert result.indices.tolist() == [0, 1, 2, 4, 5]
    assert [f.shape for f in result.forces] == [(len(frames[i]), 3) for i in result.indices]
    errors = result.energies - [frames[i].get_potential_energy() for i in result.indices]
    assert result.metrics["evaluated"]["energy_mae_ev"] == pytest.approx(np.abs(errors).mean())
    assert result.atoms()[0].get_potential_energy() == result.energies[0]
    assert "energy MAE" in repr(result)
    aligned = evaluate(workdir, frames, align_energies=True).metrics["evaluated"]
    (correction,) = result.metrics["per_element_correction"].values()
    expected = correction["mae_after_mev_per_atom"]
    assert aligned["energy_mae_mev_per_atom"] == pytest.approx(expected, rel=1e-6)


def test_charges_and_structures_far_from_the_origin():
    """Detects positions that lose their digits in float32, and charges of other atoms."""
    potential, frames = random_potential("charged"), [molecule("CH3OH"), molecule("H2O")]
    near = evaluate(potential, frames).evaluated.predictions
    for atoms in frames:
        atoms.positions += 1e4
    far = evaluate(potential, frames).evaluated.predictions
    np.testing.assert_allclose(far.forces, near.forces, atol=1e-4)
    np.testing.assert_allclose(far.charges, near.charges, atol=1e-5)
    assert far.charges[:6].sum() == pytest.approx(0, abs=1e-5)


def test_results_of_other_positions_are_not_labels(workdir):
    """Detects labels from a calculator that structures share, or that were moved since."""
    first, second = molecule("H2O"), molecule("H2O")
    first.calc = SinglePointCalculator(first, energy=-1.0)
    second.calc, second.positions[0, 0] = first.calc, 0.1
    result = evaluate(workdir, [first, second])
    np.testing.assert_array_equal(result.evaluated.labelled.energy, [-1.0, np.nan])


def test_forces_that_are_no_gradient_have_no_stress():
    """Detects an evaluation that fails for crystals, whose stress such a model does not have."""
    crystal = Atoms("H", cell=[7, 7, 7], pbc=True)
    potential = dataclasses.replace(springs(), model=PartOfTheGradient())
    result = evaluate(potential, [crystal])
    assert result.stress is None and np.isfinite(result.forces[0]).all()


def test_unpaired_electrons_reach_a_training_run(tmp_path):
    oxygen = molecule("O2")
    oxygen.info["num_unpaired_electrons"] = 2
    oxygen.calc = SinglePointCalculator(oxygen, energy=-1.0, forces=np.zeros((2, 3)))
    structures, _ = atoms_list.from_atoms([oxygen])
    atoms_list.write_trajectory(tmp_path / "o2.traj", structures)
    reader = open_data(tmp_path / "o2.traj", "ase", molecule_key="molecule")
    (read,) = reader.read(range(1), ReadReport())
    assert structures[0].spin == read.spin == 2


def test_properties_of_atoms_reach_a_training_run(tmp_path):
    """Detects properties that are lost between Atoms and the file that the task reads."""
    molecules = [molecule(name) for name in ("H2O", "CH4")]
    for k, atoms in enumerate(molecules):
        atoms.info["gap"] = 5.0 + k
        atoms.arrays["shift"] = np.arange(len(atoms)) + 0.5
    molecules[1].calc = SinglePointCalculator(molecules[1], dipole=np.array([0.0, 0.5, 1.0]))
    config = load_file("force2prop")
    config.property.targets = ("gap", "shift", "dipole")
    set_structures(config, molecules, tmp_path)
    options = source.reader_options(config.data.reader_options)
    reader = open_data(config.data.path, "ase", **options)
    water, methane = reader.read(range(2), ReadReport())
    assert (water.properties["gap"], methane.properties["gap"]) == (5.0, 6.0)
    np.testing.assert_array_equal(methane.properties["dipole"], [0.0, 0.5, 1.0])
    np.testing.assert_array_equal(water.atom_properties["shift"], [0.5, 1.5, 2.5])
    assert np.isnan(water.properties["dipole"]).all() and np.isnan(water.energy)
    config.property.targets = ("homo",)
    with pytest.raises(DatasetError, match=r"no property 'homo': set info\['homo'\]"):
        set_structures(config, molecules, tmp_path)


@pytest.fixture
def frames():
    """Small molecules with artificial energies and forces."""
    frames, rng = [], np.random.default_rng(0)
    for k in range(10):
        atoms = molecule(["H2O", "CH4", "NH3", "CH3OH", "C2H2"][k % 5])
        atoms.rattle(0.05, seed=k)
        forces = rng.normal(0, 1, (len(atoms), 3))
        atoms.calc = SinglePointCalculator(atoms, energy=-3.0 * len(atoms), forces=forces)
        frames.append(atoms)
    return frames


def test_train_passes_config_and_structures(workdir, frames, tmp_path, monkeypatch):
    """Detects labels or fields that get lost between `train` and the task."""
    seen = []

    def run(config, folder):
        shutil.copytree(workdir, folder, dirs_exist_ok=True)
        (folder / "metrics.json").write_text("{}")
        data = evaluation_data.from_config(config.data, 0)
        seen.append((config, folder, data.rows.take(data.indices)))
        return folder / "report.html"

    monkeypatch.setattr("mlip_jax.tasks.train.run", run)
    fields = {"train.num_steps": 7, "data.elements": None, "data.reject_invalid": False}
    result = train("spice:schnet", frames, overrides=fields)
    ((config, folder, columns),) = seen
    assert (config.train.num_steps, config.model.name) == (7, "schnet")
    for atoms, structure in zip(frames, columns, strict=True):
        assert structure.energy == atoms.get_potential_energy()
        # a store has single precision
        np.testing.assert_allclose(structure.positions, atoms.positions, atol=1e-6)
        np.testing.assert_allclose(structure.forces, atoms.get_forces(), atol=1e-6)
    assert result.workdir is None and not folder.exists()  # the temporary folder is removed
    assert result.calculator().potential.digest() == Potential.load(workdir).digest()
    assert train("spice", frames, tmp_path, overrides=fields).report == tmp_path / "report.html"
    with pytest.raises(DatasetError, match="no energies or forces"):
        train("spice:schnet", [molecule("H2O")], tmp_path)
    with pytest.raises(ConfigError, match="task 'relax'"):
        train("relax", frames)


@pytest.mark.slow  # a whole run
def test_train_on_atoms_and_use_the_result(frames, tmp_path):
    overrides = {
        "model.options": {"num_features": 8, "num_layers": 1},
        "data.num_train": 6,
        "data.num_valid": 2,
        "data.num_test": 2,
        "data.reject_invalid": False,
        "optimizer.name": "adam",
        "optimizer.warmup_steps": 1,
        "train.num_steps": 2,
        "train.valid_every": 2,
        "train.batch_size": 2,
        "report.max_domain": 8,
    }
    result = train("spice:schnet", frames, tmp_path / "run", overrides=overrides)
    assert result.report.is_file() and result.workdir == tmp_path / "run"
    assert result.metrics["test"]["num_structures"] == 2 and len(result.history["step"])
    energy = result.calculator().get_potential_energy(frames[0].copy())
    assert load(tmp_path / "run").get_potential_energy(frames[0].copy()) == energy
