"""Tests for the files of a run: order, a single writer, and errors that are raised."""

import csv
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from mlip_jax.checkpoint import CheckpointError, CheckpointStore
from mlip_jax.training import outputs as module
from mlip_jax.training.objectives import ForceField
from mlip_jax.training.outputs import LATEST, TrainingOutputs, restore
from mlip_jax.training.recorder import Recorder, columns

COLUMNS = columns(ForceField(None, 1.0, None, 0.0, {}).columns)

TREE = {"params": {"w": np.arange(3.0)}}


@pytest.fixture
def outputs(tmp_path):
    outputs = TrainingOutputs(tmp_path, True, COLUMNS)
    yield outputs
    outputs.close()


def steps_of(workdir):
    with open(workdir / "metrics.csv", newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_an_inactive_process_writes_nothing(tmp_path):
    idle = TrainingOutputs(tmp_path, False, COLUMNS)
    idle.begin(0)
    idle.write({"step": 1})
    idle.save(1, TREE, {})
    idle.save_best(1, TREE, {})
    idle.check()
    idle.wait()
    idle.close()
    assert not list(tmp_path.iterdir())


def test_checkpoints_are_restored(outputs, tmp_path):
    assert restore(tmp_path) is None and restore(tmp_path, "best") is None
    outputs.save(3, TREE, {"position": {"step": 3}})
    outputs.save_best(2, TREE["params"], {"loss": 0.5})
    outputs.wait()
    latest, best = restore(tmp_path), restore(tmp_path, "best")
    assert (latest.step, best.step) == (3, 2) and latest.metadata["position"] == {"step": 3}
    np.testing.assert_array_equal(latest.arrays["params/w"], best.arrays["params/w"])


def test_restore_returns_none_for_a_missing_folder(tmp_path):
    assert restore(tmp_path / "nowhere") is None


def test_metrics_resume_after_a_step(outputs, tmp_path):
    outputs.begin(0)
    for step in (1, 2, 3, 4):
        outputs.write({"step": step, "train_loss": 0.5})
    outputs.begin(2)
    assert steps_of(tmp_path) == [1, 2]
    outputs.write({"step": 3, "train_loss": 0.25})
    assert steps_of(tmp_path) == [1, 2, 3]


def test_a_checkpoint_is_written_after_the_best_one_that_it_refers_to(
    outputs, tmp_path, monkeypatch
):
    seen, save = [], ocp.Checkpointer.save

    def noted(self, folder, *args, **kwargs):
        save(self, folder, *args, **kwargs)
        seen.append((folder.parent.name, int(folder.name)))

    monkeypatch.setattr(ocp.Checkpointer, "save", noted)
    for step in (1, 2, 3):
        outputs.save_best(step, TREE, {})
        outputs.save(step, TREE, {})
    outputs.wait()
    for step in (1, 2, 3):
        assert seen.index(("best", step)) < seen.index((LATEST, step))


@pytest.mark.parametrize("again", [False, True])
def test_a_best_checkpoint_of_an_earlier_step_replaces_later_ones(tmp_path, again):
    """This happens after a rollback, or in a run that resumes from an earlier step."""
    outputs = TrainingOutputs(tmp_path, True, COLUMNS)
    for step in (5, 90, 95):
        outputs.save_best(step, TREE, {"way": "first"})
    if again:
        outputs.close()
        outputs = TrainingOutputs(tmp_path, True, COLUMNS)
    outputs.save_best(50, TREE, {"way": "second"})
    outputs.wait()
    found = restore(tmp_path, "best")
    assert found.step == 50 and found.metadata["way"] == "second"
    for step in (60, 70):
        outputs.save_best(step, TREE, {})
    outputs.close()
    store = CheckpointStore(tmp_path / "best", read_only=True)
    assert store.steps() == [60, 70]
    store.close()


@pytest.mark.parametrize("save", ["save", "save_best"])
def test_an_error_in_the_background_is_raised(tmp_path, monkeypatch, save):
    outputs, closed, close = TrainingOutputs(tmp_path, True, COLUMNS), [], Recorder.close
    outputs.begin(0)

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    monkeypatch.setattr(Recorder, "close", lambda self: (closed.append(self), close(self)))
    getattr(outputs, save)(1, TREE, {})
    with pytest.raises(CheckpointError, match="no space left"):
        for _ in range(5_000):  # it looks, and does not wait
            outputs.check()
            time.sleep(1e-3)
    outputs.check()  # once is enough
    getattr(outputs, save)(2, TREE, {})
    with pytest.raises(CheckpointError, match="no space left"):
        outputs.close()
    assert len(closed) == 1, "what cannot be written keeps nothing open"


def test_all_processes_resume_from_the_checkpoint_of_the_leader(outputs, tmp_path, monkeypatch):
    outputs.save(3, TREE, {"position": {"step": 3}})
    outputs.wait()
    sent = []

    def broadcast(value):
        sent.append(value)
        return value

    monkeypatch.setattr(module.distributed, "count", lambda: 2)
    monkeypatch.setattr(module.distributed, "broadcast", broadcast)
    leader = restore(tmp_path)
    assert leader.step == 3 and len(sent) == 2

    def taken(value):
        assert not value, "only the leader reads"
        return sent.pop(0)

    monkeypatch.setattr(module.distributed, "leader", lambda: False)
    monkeypatch.setattr(module.distributed, "broadcast", taken)
    other = restore(tmp_path)
    assert other.step == 3 and other.metadata == leader.metadata
    np.testing.assert_array_equal(other.arrays["params/w"], TREE["params"]["w"])
