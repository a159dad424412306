"""Tests for training with additional energy terms."""

import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from ase import Atoms

from mlip_jax import defaults
from mlip_jax.checkpoint import CheckpointStore
from mlip_jax.datasets.selection.split_files import load_split
from mlip_jax.datasets.store.store import Store
from mlip_jax.potential import Potential
from mlip_jax.simulation.calculators.calculator import MLIPCalculator
from mlip_jax.tasks import train
from mlip_jax.training.step import Trainer

pytestmark = pytest.mark.slow  # whole runs

DATA = Path(__file__).parents[1] / "data/gfn2_small.hdf5"


def config(**potential):
    c = defaults.train_defaults()
    c.data.path = str(DATA)
    c.data.charge = 0.0
    c.data.elements = ("H", "C", "N", "O", "S")
    c.model.name = "painn"
    c.model.options.update({"num_features": 8, "num_layers": 1, "num_radial": 6, "cutoff": 4.0})
    c.potential.update({"zbl": True, "electrostatics": True} | potential)
    c.train.num_steps, c.train.batch_size = 6, 4
    c.train.log_every, c.train.valid_every, c.train.checkpoint_every = 2, 3, 2
    c.optimizer.warmup_steps = 2
    return c


@pytest.fixture(scope="module", autouse=True)
def working_folder(tmp_path_factory):
    """Folder of the stores. Programs are compiled quickly, because they run only a few times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, working_folder):
    """Workdir and log of a finished run with a cutoff (5 Å) below the size of the molecules."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("mlip_jax")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        train.run(config(long_range_cutoff=5.0), workdir)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return workdir, "\n".join(lines)


def restored(workdir, folder="checkpoints"):
    store = CheckpointStore(workdir / folder, read_only=True)
    found = store.restore()
    store.close()
    return found


def test_log_and_report_list_the_energy_terms(finished):
    workdir, output = finished
    assert (
        "energy term electrostatics: cutoff=5.0" in output
        and "energy term zbl: cutoff=4.0" in output
    )
    assert "long-range pairs: within 5 Å" in output and "energy term dispersion" not in output
    assert "% of long-range pairs" in output
    assert "energy term electrostatics" in (workdir / "report.html").read_text()


def test_terms_are_trained_and_stored(finished):
    arrays = restored(finished[0]).arrays
    kernel = "params/params/electrostatics/hidden/kernel"
    assert any(name.startswith("params/params/zbl/") for name in arrays)
    assert any(name.startswith("params/params/model/") for name in arrays)
    moments = [
        v
        for name, v in arrays.items()
        if name.startswith("optimizer/") and "electrostatics/hidden" in name
    ]
    assert kernel in arrays and moments and all(np.abs(m).max() > 0 for m in moments)


def test_the_calculator_reproduces_the_predictions(finished):
    workdir, _ = finished
    p = np.load(workdir / "predictions_test.npz", allow_pickle=False)
    numbers, offsets = p["numbers"], p["offsets"]
    assert len(offsets) > 2
    potential = Potential.load(workdir)
    assert potential.long_range_cutoff == 5.0
    calculator = MLIPCalculator(potential)
    data = json.loads((workdir / "splits.json").read_text())
    columns = Store(data["store"]).take(load_split(workdir / "splits.npz")[0]["test"])
    for s in range(min(len(columns), 5)):
        rows = slice(offsets[s], offsets[s + 1])
        np.testing.assert_array_equal(columns[s].numbers, numbers[rows])
        atoms = Atoms(numbers[rows], columns[s].positions)
        atoms.calc = calculator
        assert atoms.get_potential_energy() == pytest.approx(p["energy_predicted"][s], abs=2e-3)
        np.testing.assert_allclose(atoms.get_forces(), p["forces_predicted"][rows], atol=2e-3)
        assert np.abs(atoms.get_charges()).max() > 0
        assert atoms.get_charges().sum() == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_a_stopped_run_ends_like_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    steps, step = [], Trainer.train

    def stopping(self, *args, **options):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    monkeypatch.setattr(Trainer, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        train.run(config(long_range_cutoff=5.0), tmp_path / "run")
    assert restored(tmp_path / "run").step == 2
    train.run(config(long_range_cutoff=5.0), tmp_path / "run")
    assert len(steps) == 4 + 4
    expected, resumed = restored(finished[0]), restored(tmp_path / "run")
    assert resumed.step == expected.step == 6
    for name, value in expected.arrays.items():
        np.testing.assert_array_equal(resumed.arrays[name], value, err_msg=name)


def test_another_term_is_an_error(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    with pytest.raises(RuntimeError, match="potential.dispersion: False -> True"):
        train.run(config(long_range_cutoff=5.0, dispersion=True), tmp_path / "run")


@pytest.mark.slow
def test_long_range_terms_with_all_pairs(tmp_path):
    c = config(long_range_cutoff=float("inf"))
    c.train.num_steps = 2
    train.run(c, tmp_path / "run")
    potential = Potential.load(tmp_path / "run")
    assert potential.long_range_cutoff == float("inf")
    assert (
        json.loads((tmp_path / "run/metrics.json").read_text())["test"]["energy_mae_mev_per_atom"]
        > 0
    )
