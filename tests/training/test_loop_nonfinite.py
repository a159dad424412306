"""Tests for runs with non-finite losses, caused by forces whose squares overflow."""

import copy
import csv

import jax
import numpy as np
import pytest

from mlip_jax import distributed
from mlip_jax.training import loop as module
from mlip_jax.training import nonfinite
from mlip_jax.training.nonfinite import TrainingError
from tests.training.toy import BAD, STEPS, as_sums, assert_same_run, rows, saved


@pytest.mark.parametrize("per_call", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_nonfinite_loss_stops_the_run(toy, tmp_path, per_call):
    bad, first = toy.bad(), toy.first_step_with(BAD)
    columns = toy.columns.take(toy.train.indices[[BAD]])
    name = f"{columns.source[0]}#{columns.conformer[0]}"
    trainer = toy.streamed
    if per_call > 1:  # compiled already
        trainer = copy.copy(toy.on_device)
        trainer._data = trainer.replicate(toy.collect(bad.rows))
    with pytest.raises(TrainingError, match=f"step {first}.*") as raised:
        toy.run(tmp_path / "run", train=bad, per_call=per_call, trainer=trainer, checkpoint_every=1)
    assert name in str(raised.value) and "on_nonfinite" in str(raised.value)
    with open(tmp_path / "run" / "nonfinite.csv", newline="") as file:
        assert {"step": str(first), "structure": name} in list(csv.DictReader(file))
    found = saved(tmp_path / "run")
    assert (found is None and first == 1) or found.step == first - 1
    assert all(np.isfinite(x).all() for x in found.arrays.values())


def test_a_nonfinite_step_is_skipped(toy, recorded_steps, tmp_path):
    workdir, first = tmp_path / "run", toy.first_step_with(BAD)
    position = toy.run(workdir, train=toy.bad(), on_nonfinite="skip", log_every=1)
    assert position.step == STEPS
    wrong = [i + 1 for i, (_, _, finite) in enumerate(recorded_steps) if not finite]
    assert wrong[0] == first and len(wrong) < STEPS / 2
    for step, (*trees, finite) in enumerate(recorded_steps, 1):
        before = recorded_steps[step - 2][:2] if step > 1 else (toy.params, toy.params)
        same = [
            all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y)))
            for x, y in zip(trees, before)
        ]
        assert same == [not finite] * 2, f"step {step}"
    # a row of nothing but such updates has no loss
    logged = {
        int(row["step"]): float(row["train_loss"]) for row in rows(workdir) if row["train_loss"]
    }
    assert [step for step, loss in logged.items() if not np.isfinite(loss)] == wrong


def test_too_many_nonfinite_steps_end_the_run(toy, monkeypatch, tmp_path):
    monkeypatch.setattr(nonfinite, "MAX_SKIPPED", 3)
    with pytest.raises(TrainingError, match="4 steps were skipped"):
        toy.run(tmp_path / "run", train=toy.bad(range(30)), on_nonfinite="skip")


@pytest.mark.parametrize("stop", [None, 7])
def test_a_nonfinite_step_rolls_the_run_back(toy, stop_at, tmp_path, stop):
    """The run returns to the last checkpoint with later batches, also at the next occurrence."""
    members, first = (), 0
    for place in range(30):  # one that comes after some checkpoints
        if (found := toy.first_step_with(place)) in (10, 11):
            members, first = (place,), found
            break
    bad, options = (
        toy.bad(members),
        {"on_nonfinite": "rollback", "log_every": 1, "checkpoint_every": 4, "valid_every": 4},
    )
    seen = []
    loop = toy.loop(tmp_path / "uninterrupted", train=bad, **options)
    roll_back = loop._roll_back

    def noted(position, stream):
        ahead = position.step
        state = roll_back(position, stream)
        loop._outputs.wait()
        seen.append((ahead, position.step, saved(tmp_path / "uninterrupted").metadata["position"]))
        return state

    loop._roll_back = noted
    position = loop.run(toy.params)
    assert position.step == STEPS and position.rollbacks == len(seen) >= 1
    ahead, back, kept = seen[0]
    assert first <= ahead <= first + module._AHEAD and back == 8
    assert kept["step"] == 8 and kept["rollbacks"] == 1
    steps = [int(row["step"]) for row in rows(tmp_path / "uninterrupted") if row["train_loss"]]
    assert steps == list(range(1, STEPS + 1))
    assert all(
        np.isfinite(float(row["train_loss"]))
        for row in rows(tmp_path / "uninterrupted")
        if row["train_loss"]
    )
    validated = [int(row["step"]) for row in rows(tmp_path / "uninterrupted") if row["valid_loss"]]
    assert validated == [4, 8, 12, 16, 20]
    if stop is None:
        return
    stop_at.step = stop
    with pytest.raises(distributed.Stopped):
        toy.run(tmp_path / "run", train=bad, **options)
    stop_at.step = None
    toy.run(tmp_path / "run", train=bad, **options)
    # otherwise, the dispatches ahead of the rollback differ, and so do the discarded batches
    if stop < first - module._AHEAD - 1:
        assert_same_run(tmp_path / "run", tmp_path / "uninterrupted", 0)
    assert saved(tmp_path / "run").step == STEPS


def test_a_run_without_progress_ends_after_some_rollbacks(toy, monkeypatch, tmp_path):
    monkeypatch.setattr(nonfinite, "MAX_ROLLBACKS", 3)
    with pytest.raises(TrainingError, match="rolled back 3 times"):
        toy.run(tmp_path / "run", train=toy.bad(range(30)), on_nonfinite="rollback")
    assert saved(tmp_path / "run").metadata["position"]["rollbacks"] == 3


def test_the_best_checkpoint_survives_a_rollback(toy, monkeypatch, tmp_path):
    """The best checkpoint has the lowest loss of all validations."""
    place = next(p for p in range(30) if toy.first_step_with(p) in (9, 10))
    losses = iter([3.0, 1.0, 2.0, 1.5, 1.2, 1.1])  # back to the start after two validations
    given = []

    def validate(*_):
        given.append(next(losses))
        return as_sums(given[-1])

    monkeypatch.setattr(module, "validate", validate)
    position = toy.run(
        tmp_path / "run",
        train=toy.bad((place,)),
        on_nonfinite="rollback",
        valid_every=4,
        checkpoint_every=50,
        num_steps=12,
    )
    assert position.rollbacks == 1 and given[:3] == [3.0, 1.0, 2.0]
    best = saved(tmp_path / "run", "best")
    assert best.metadata["position"]["best_loss"] == position.best_loss == min(given)
