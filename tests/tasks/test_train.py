"""Tests for the task `train` from the command line to the report."""

import json
import shutil
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
from ase.build import molecule

from mlip_jax.checkpoint import CheckpointStore
from mlip_jax.datasets.selection.split_files import load_split
from mlip_jax.datasets.store.store import Store
from mlip_jax.potential import Potential
from mlip_jax.simulation.dynamics.md import MolecularDynamics
from mlip_jax.simulation.trust.atom_domain import load_domain
from tests.tasks.runs import (
    DATA,
    REPOSITORY,
    ForkedRun,
    environment,
    finish,
    newest,
    run,
    start,
    wait_for,
    wait_for_step,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Workdir and output of a finished run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    code, output = run(workdir)
    assert code == 0, output
    return workdir, output


def test_the_report_has_its_figures(finished):
    workdir, _ = finished
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert metrics["seconds"] > 0
    for part in ("train", "valid", "test"):
        for key in (
            "energy_mae_mev_per_atom",
            "force_mae_mev_per_ang",
            "energy_slope_mev_per_atom",
        ):
            assert np.isfinite(metrics[part][key])
    html = (workdir / "report.html").read_text()
    assert "GFN2-xTB" in html and "outside" in html
    assert "Zenodo" not in html  # advice for runs without data.path
    assert "minus the gradient of the energy" in html
    assert set(metrics["domain_auc"]) == {"energy", "force"}
    domain = load_domain(workdir)
    assert domain is not None and load_domain(workdir / "best").border == domain.border


def test_the_log_reports_labels_and_excluded_structures(finished):
    _, output = finished
    assert "GFN2-xTB" in output and "'charge': 12" in output and "'elements': 6" in output
    assert output.count("compiling the validation and evaluation step") == 1


def test_the_split_by_molecule_is_stored(finished):
    workdir, _ = finished
    parts, meta = load_split(workdir / "splits.npz")
    store = Store(workdir.parent / meta["store"])
    molecules = {
        part: set(store.take(indices).molecule.tolist()) for part, indices in parts.items()
    }
    assert all(molecules.values())
    assert (
        not molecules["train"] & molecules["test"] and not molecules["train"] & molecules["valid"]
    )


@pytest.mark.slow  # tests/tasks/test_train_survival.py kills a run and corrupts its checkpoint
@pytest.mark.parametrize("after_steps", [6, 13])
def test_a_killed_run_ends_like_an_uninterrupted_one(finished, tmp_path, after_steps):
    uninterrupted, _ = finished
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_for_step(workdir, after_steps - 4, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, output = run(workdir)
    assert code == 0, output
    expected, resumed = newest(uninterrupted), newest(workdir)
    assert resumed.step == expected.step == 24
    for name, value in expected.arrays.items():
        np.testing.assert_array_equal(resumed.arrays[name], value, err_msg=name)
    columns = ("step", "train_loss", "valid_loss")
    curves = [
        np.genfromtxt(w / "metrics.csv", delimiter=",", names=True)
        for w in (uninterrupted, workdir)
    ]
    for column in columns:
        np.testing.assert_array_equal(curves[0][column], curves[1][column])


def test_a_rerun_of_the_same_command_changes_nothing(finished):
    workdir, _ = finished
    before = newest(workdir)
    code, output = run(workdir)
    assert code == 0 and "step 24" in output
    after = newest(workdir)
    assert all(np.array_equal(after.arrays[k], v) for k, v in before.arrays.items())


def test_a_workdir_of_another_config_is_an_error(finished):
    workdir, _ = finished
    code, output = run(workdir, optimizer__learning_rate=0.02)
    assert (
        code != 0
        and "optimizer.learning_rate: 0.001 -> 0.02" in output
        and "Traceback" not in output
    )
    assert (workdir / "report.html").exists()


def test_two_runs_cannot_use_one_workdir(tmp_path):
    workdir = tmp_path / "run"
    first = start(workdir, train__num_steps=100000)
    wait_for((workdir / "config.json").exists, first)
    code, output = run(workdir, train__num_steps=100000)
    first.kill()
    first.communicate()
    assert code != 0 and f"process {first.pid}" in output and "--workdir" in output


def test_an_unknown_field_on_the_command_line_is_an_error_with_the_nearest_name(tmp_path):
    code, output = run(tmp_path / "run", optimizer__learning_rat=1e-3)
    assert code != 0 and "learning_rate" in output and "Traceback" not in output


def test_an_unknown_field_in_a_config_file_is_an_error_with_the_nearest_name(tmp_path):
    text = (REPOSITORY / "configs/spice.py").read_text()
    config = tmp_path / "mine.py"
    config.write_text(text.replace("    return c\n", "    c.train.batch_sise = 3\n    return c\n"))
    code, output = finish(ForkedRun(tmp_path, [f"--config={config}", f"--workdir={tmp_path}/run"]))
    assert code != 0 and "Did you mean 'train.batch_size'?" in output


def test_an_unknown_model_option_is_an_error_with_the_nearest_name(tmp_path):
    config = tmp_path / "mine.py"
    text = (REPOSITORY / "configs/spice.py").read_text()
    config.write_text(
        text.replace("    return c\n", "    c.model.options.num_feature = 3\n    return c\n")
    )
    code, output = finish(ForkedRun(tmp_path, [f"--config={config}", f"--workdir={tmp_path}/run"]))
    assert code != 0 and "Did you mean 'num_features'?" in output


def test_missing_file(tmp_path):
    code, output = run(tmp_path / "run", data__path=tmp_path / "nowhere.hdf5")
    assert code != 0 and "nowhere.hdf5: no such file" in output and "Traceback" not in output


def test_truncated_file(tmp_path):
    cut = tmp_path / "cut.hdf5"
    cut.write_bytes(DATA.read_bytes()[:40_000])
    code, output = run(tmp_path / "run", data__path=cut)
    assert code != 0 and "truncated" in output and "Traceback" not in output


def edited(path, change):
    """Write a copy of the data set with `change` applied to every group."""
    shutil.copy(DATA, path)
    with h5py.File(path, "a") as file:
        for group in file.values():
            change(group)
    return path


def test_file_without_labels(tmp_path):
    def without(group):
        del group["dft_total_energy"], group["dft_total_gradient"]

    code, output = run(tmp_path / "run", data__path=edited(tmp_path / "bare.hdf5", without))
    assert (
        code != 0 and "no structure has an energy or forces" in output and "Traceback" not in output
    )


def test_some_labels_are_nan(tmp_path):
    def some_nan(group):
        group["dft_total_energy"][0] = np.nan
        group["dft_total_gradient"][1, 0] = np.nan

    # The training split has no S.
    split = {"train": [1, 3, 5, 7, 8, 9, 10, 11], "valid": [0, 12, 14], "test": [13, 16]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    code, output = run(
        tmp_path / "run",
        model="schnet",
        data__path=edited(tmp_path / "nan.hdf5", some_nan),
        data__split_files=tmp_path / "split.json",
    )
    assert code == 0, output
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    _check_unseen_elements(tmp_path / "run", metrics, output)
    assert all(
        np.isfinite(metrics["test"][k])
        for k in ("energy_mae_mev_per_atom", "force_mae_mev_per_ang")
    )


def _check_unseen_elements(workdir, metrics, output):
    """Detects structures without training data that decide best checkpoint and headline errors."""
    assert [metrics[part]["num_structures"] for part in ("train", "valid", "test")] == [48, 12, 6]
    unseen = metrics["unseen_elements"]
    assert {part: (u["num_structures"], u["elements"]) for part, u in unseen.items()} == {
        "valid": (6, {"S": 6}),
        "test": (6, {"S": 6}),
    }
    # The reference energies of these elements are unknown, so the errors are in eV per atom.
    energy = "energy_mae_mev_per_atom"
    for part in ("valid", "test"):
        assert unseen[part][energy] > 4 * metrics[part][energy]
    losses = np.genfromtxt(workdir / "metrics.csv", delimiter=",", names=True)
    assert np.nanmax(losses["valid_energy_mae_mev_per_atom"]) < 0.25 * unseen["valid"][energy]
    text = "6 of 12 test structures with elements that the training split lacks (S: 6)"
    assert text in output
    assert "Elements that the training split lacks" in (workdir / "report.html").read_text()
    assert (workdir / "predictions_test_unseen_elements.npz").is_file()


@pytest.mark.slow
def test_training_only_on_forces(tmp_path):
    def without_energy(group):
        del group["dft_total_energy"]

    path = edited(tmp_path / "forces.hdf5", without_energy)
    code, output = run(tmp_path / "a", data__path=path)
    assert code != 0 and "reference energies cannot be fitted" in output
    code, output = run(tmp_path / "b", data__path=path, data__reference_energies="none")
    assert code == 0, output


def test_full_disk_leaves_the_last_checkpoint(finished, tmp_path):
    """A limit of the file size simulates a full disk: writing a checkpoint fails halfway."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    step = newest(workdir).step
    store = CheckpointStore(workdir / "checkpoints")
    script = (
        "import resource, signal, sys, numpy as np\n"
        "from mlip_jax.checkpoint import CheckpointStore, CheckpointError\n"
        "store = CheckpointStore(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n"
        "    store.save(99, {'x': np.random.default_rng(0).normal(size=100000)}, {})\n"
        "except CheckpointError as error:\n"
        "    print('refused:', error); sys.stdout.flush()\n"
        "    import os; os._exit(3)\n"
    )
    store.close()
    process = subprocess.run(
        [sys.executable, "-c", script, str(workdir / "checkpoints")],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
    )
    assert process.returncode == 3 and "Free up disk space" in process.stdout, (
        process.stdout + process.stderr
    )
    assert newest(workdir).step == step


def test_read_only_workdir(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    code, output = run(tmp_path / "file" / "run", cwd=tmp_path)
    assert code != 0 and "cannot be written" in output and "Traceback" not in output


@pytest.mark.slow
def test_painn_by_config(tmp_path):
    config = f"{REPOSITORY}/configs/spice.py:painn"
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "mlip_jax.main",
            f"--config={config}",
            f"--workdir={tmp_path}/run",
            f"--config.data.path={DATA}",
            "--config.model.options.num_features=16",
            "--config.train.num_steps=10",
            "--config.train.batch_size=4",
        ],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "run/metrics.json").read_text())["test"]["num_structures"] > 0


@pytest.mark.slow
def test_direct_forces_are_trained_and_reported(tmp_path):
    """Checkpoint and report say that forces are no gradient, and dynamics require consent."""
    code, output = run(tmp_path / "run", model="painn_oc", loss__beta=1.0, loss__beta_end=1.0)
    assert code == 0, output
    potential = Potential.load(tmp_path / "run")
    assert not potential.conservative
    assert potential.metadata["statistics"]["conservative"] is False
    assert "predicted directly" in (tmp_path / "run/report.html").read_text()
    losses = np.genfromtxt(tmp_path / "run/metrics.csv", delimiter=",", names=True)["valid_loss"]
    losses = losses[np.isfinite(losses)]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="allow_nonconservative"):
        MolecularDynamics(molecule("H2O"), potential)


def test_a_mistyped_path_releases_the_workdir(tmp_path):
    code, output = run(tmp_path / "run", data__path="tests/data/nowhere.hdf5")
    assert code != 0 and "nowhere.hdf5" in output
    code, output = run(tmp_path / "run", data__path=tmp_path / "elsewhere.hdf5")
    assert "elsewhere.hdf5: no such file" in output and "another config" not in output


def test_energy_only_training_reports_no_force_errors(tmp_path):
    code, output = run(
        tmp_path / "run", model="schnet", loss__beta=0.0, loss__beta_end=0.0, train__num_steps=8
    )
    assert code == 0, output
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (
        metrics["test"]["force_mae_mev_per_ang"] is None
        and metrics["test"]["energy_mae_mev_per_atom"] > 0
    )
    assert (
        metrics["test"]["num_nonfinite_predictions"] == 0 and metrics["domain_auc"]["force"] is None
    )
    assert "The training used only energies" in (tmp_path / "run/report.html").read_text()
