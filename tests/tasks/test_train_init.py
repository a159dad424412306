"""Tests for training that is initialized from a force field."""

import dataclasses
import json
import shutil

import h5py
import jax
import numpy as np
import pytest

from mlip_jax import config as configs
from mlip_jax import fine_tuning
from mlip_jax.config import ConfigError, complete
from mlip_jax.configs import spice
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection.held_out import RunData
from mlip_jax.datasets.statistics import Summary
from mlip_jax.defaults import train_defaults
from mlip_jax.graphs.padding import graph_sizes
from mlip_jax.importers import parameters
from mlip_jax.potential import Potential
from mlip_jax.reports.predictions import Predictions
from mlip_jax.simulation.calculators.ensemble import _group_by_architecture
from mlip_jax.structure import Structure
from mlip_jax.tasks import train
from mlip_jax.tasks.force_field_training import comparison
from mlip_jax.tasks.force_field_training.preparation import TrainingRun, seen_states
from mlip_jax.training.data import Split
from tests.tasks.runs import DATA

pytestmark = pytest.mark.usefixtures("blank_figures")

SHIFT = {6: 1.5, 1: -0.25, 8: 0.75}  # hartree of an atom: other zeros of energy


def config(path=DATA, directory="data", **fields):
    c = spice.get_config("schnet")
    c.data.path, c.data.directory, c.data.split_seed = str(path), str(directory), 2
    c.model.options.num_features, c.model.options.num_layers = 8, 1
    c.train.num_steps, c.train.valid_every, c.train.checkpoint_every, c.train.batch_size = (
        30,
        15,
        15,
        4,
    )
    c.optimizer.warmup_steps, c.report.max_domain = 2, 0
    for name, value in fields.items():
        c.update_from_flattened_dict({name.replace("__", "."): value})
    return c


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("init")
    train.run(config(directory=folder / "data", optimizer__learning_rate=1e-2), folder / "first")
    return folder


def still(folder, **fields):
    """Return the config of a fine-tuning run that changes nothing."""
    own = {
        "init__workdir": str(folder / "first"),
        "optimizer__learning_rate": 1e-12,
        "optimizer__learning_rate_end": 1e-13,
    }
    return config(directory=folder / "data", **own | fields)


def test_the_average_number_of_neighbors_is_that_of_all_splits(first):
    """Members of an ensemble with different splits used to be different models, in no batch.

    Force fields load with the factor of their training, regardless of later data.
    """
    potentials, averages = [], []
    for seed in (0, 1):
        own = config(directory=first / "data", model__name="nequip", data__split_seed=seed)
        own.model.options.max_degree = 0
        folder = first / f"prepared-{seed}"
        folder.mkdir()
        training = TrainingRun.prepare(complete(own, train_defaults()), folder)
        averages.append(training.statistics["mean_neighbors"])  # of the training split
        stored = training.metadata["config"]["model"]["options"]
        assert stored["avg_num_neighbors"] == training.model.avg_num_neighbors
        potentials.append(Potential(training.model, {}, 5.0, np.zeros(119), 1.0, (1,)))
    assert averages[0] != averages[1] and 5 < potentials[0].model.avg_num_neighbors < 30
    assert len(_group_by_architecture(potentials)) == 1


def test_a_fine_tuned_force_field_has_seen_the_states_of_the_initial_one():
    """Detects crystals and ions that are unseen after fine-tuning on neutral molecules."""
    molecule = Structure(np.array([1, 1]), np.eye(2, 3))
    crystal = Structure(np.array([1, 1]), np.eye(2, 3), cell=np.eye(3), pbc=np.ones(3, bool))
    summary, of_crystal = (Summary([Columns.from_structures([s])]) for s in (molecule, crystal))
    initial = Potential(None, {}, 5.0, np.zeros(119), 1.0, (1,))

    def seen(summary, **statistics):
        before = dataclasses.replace(initial, metadata={"statistics": statistics})
        return seen_states(summary, before)

    before = seen(summary, periodic=True, charges=[-1.0], spins=[1.0], odd_electrons=True)
    assert before == {
        "charges": [-1.0, 0.0],
        "spins": [0.0, 1.0],
        "periodic": True,
        "odd_electrons": True,
        "sizes": None,  # not recorded by the initial force field
    }
    assert seen(summary, sizes=[5, 9])["sizes"] == (2, 9)
    assert seen(of_crystal, periodic=False)["periodic"] is True
    assert seen(summary, periodic=False)["periodic"] is False
    assert seen(summary, charges=None)["periodic"] is seen(summary, charges=None)["charges"] is None
    assert seen_states(summary, None)["periodic"] is False


def predictions(workdir):
    return Predictions.load(workdir / "predictions_test.npz")


def test_initial_parameters_are_those_of_the_force_field(first, caplog):
    caplog.set_level("INFO")
    train.run(still(first), first / "second")
    old, new = (Potential.load(first / name) for name in ("first", "second"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), old.params, new.params)
    assert new.energy_scale == old.energy_scale and new.elements == old.elements
    a, b = predictions(first / "first"), predictions(first / "second")
    np.testing.assert_allclose(a.forces_predicted, b.forces_predicted, atol=1e-4)
    # nothing has changed, so the errors before and after are the same, on new and old data
    lines = [m for m in caplog.messages if m.startswith("fine-tuning, test errors on the ")]
    assert [line.split()[5] for line in lines] == ["new", "old"]
    scores = json.loads((first / "second/metrics.json").read_text())["test"]
    for line in lines:
        before, after = line.partition("data: ")[2].split(" → ")
        assert before == after
        assert before.endswith(f"{scores['force_mae_mev_per_ang']:.1f} meV/Å")


def test_rare_elements_are_in_the_fit_of_reference_energies(monkeypatch):
    """Detects an element without random structures that keeps a reference energy of another method."""
    monkeypatch.setattr(fine_tuning, "_MAX_FIT_STRUCTURES", 3)
    monkeypatch.setattr(fine_tuning, "_CHUNK", 7)
    numbers = [[17 if s in (31, 38) else 6, 9 if s == 20 else 1] for s in range(40)]
    columns = Columns.from_structures(
        Structure(np.array(z), np.eye(2, 3), energy=np.nan if s == 31 else float(s))
        for s, z in enumerate(numbers)
    )
    train = Split(columns, np.arange(40), graph_sizes(columns, 3.0))
    sample = fine_tuning.fit_sample(train, np.array([1, 6, 9, 17]), seed=0)
    assert set(sample.numbers.tolist()) == {1, 6, 9, 17} and 38.0 in sample.energy
    assert np.isfinite(sample.energy).all()


def test_the_force_rms_is_that_of_the_new_data(first, tmp_path, monkeypatch):
    """Detects reports that state the energy scale of the initial force field."""
    initial = dataclasses.replace(Potential.load(first / "first"), energy_scale=7.0)
    monkeypatch.setattr(fine_tuning, "load_initial_force_field", lambda config: initial)
    run = TrainingRun.prepare(
        configs.complete(still(first, data__reference_energies="none"), train_defaults()), tmp_path
    )
    assert run.statistics["energy_scale"] == 7.0 and 0 < run.statistics["force_rms"] < 7.0


def test_fine_tuning_errors_leave_out_unknown_elements(first):
    """Detects a run that fails after training, because its test split has a new element."""
    potential = Potential.load(first / "first")
    atoms = [np.array([[0, 0, 0], [0, 0, 1.1]])] * 2
    columns = Columns.from_structures(
        [Structure(np.array(z), x, energy=0.0) for z, x in zip(([6, 8], [6, 17]), atoms)]
    )
    text = comparison.before_and_after(columns, potential, potential, potential.reference_energies)
    before, after = text.split(" → ")
    assert after == f"{before}; without 1 of 2 structures with Cl, not in the training data"
    text = comparison.before_and_after(
        columns.take(np.array([1])), potential, potential, potential.reference_energies
    )
    assert text.startswith("not available: all structures contain elements") and "(Cl)" in text


@pytest.mark.slow
def test_another_zero_of_energy_does_not_change_the_initial_errors(first, tmp_path):
    moved = tmp_path / "moved.hdf5"
    shutil.copy(DATA, moved)
    with h5py.File(moved, "r+") as file:
        for group in file.values():
            shift = sum(SHIFT.get(int(z), 0.0) for z in group["atomic_numbers"])
            group["dft_total_energy"][:] = group["dft_total_energy"][:] + shift
    train.run(still(first), tmp_path / "same")
    train.run(still(first, data__path=str(moved)), tmp_path / "moved")
    same, other = predictions(tmp_path / "same"), predictions(tmp_path / "moved")
    np.testing.assert_allclose(
        same.energy_predicted - same.energy, other.energy_predicted - other.energy, atol=2e-3
    )
    assert np.abs(same.energy - other.energy).min() > 1.0


@pytest.mark.slow
def test_the_architecture_can_be_copied(first, tmp_path):
    c = still(first, model__name="")
    c.model.options = type(c.model.options)()
    train.run(c, tmp_path / "run")
    assert Potential.load(tmp_path / "run").model == Potential.load(first / "first").model


@pytest.mark.slow
def test_initial_weights_in_open_files(first, tmp_path):
    parameters.save(Potential.load(first / "first"), tmp_path / "open")
    train.run(still(first, init__workdir=f"parameters:{tmp_path / 'open'}"), tmp_path / "run")
    a, b = predictions(first / "first"), predictions(tmp_path / "run")
    np.testing.assert_allclose(a.forces_predicted, b.forces_predicted, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model__options__num_features": 16},
            r"its model differs .*model.options.num_features: 8 -> 16.*model.name=''",
        ),
        ({"model__options__cutoff": 4.0}, "model.options.cutoff: 5.0 -> 4.0"),
        ({"potential__zbl": True}, "terms.zbl"),
        ({"init__workdir": "", "model__name": ""}, "model.name and init.workdir are both empty"),
    ],
)
def test_a_different_model_is_an_error_with_the_differences(first, tmp_path, fields, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        train.run(still(first, **fields), tmp_path / "run")


def test_runs_without_initialization_keep_their_identity():
    from mlip_jax import config as configs

    assert "init" not in configs.identity(config())
    assert "init" in configs.identity(config(init__workdir="runs/a"))


def test_a_force_field_without_a_training_run_has_no_advice_on_splits(tmp_path):
    """Detects "Give the file of a split" for an initial force field that is given as an object."""
    with pytest.raises(DatasetError, match="is not the workdir of a training run") as raised:
        RunData.load(f"parameters:{tmp_path}")
    assert "data.split_files" not in str(raised.value)
