"""Tests for the training loop: resumption, files, reproducible results, and non-finite losses.

They are in one file, because a process compiles their programs once. Non-finite losses are caused
by forces whose squares overflow.
"""

import csv

import jax
import numpy as np
import pytest

from mlip_jax import distributed
from mlip_jax.training import loop as module
from mlip_jax.training import nonfinite, optimizer
from mlip_jax.training.nonfinite import TrainingError
from mlip_jax.training.outputs import TrainingOutputs, restore
from mlip_jax.training.step import DispatchResult, Trainer
from tests.training.toy import (
    BAD,
    STEPS,
    as_sums,
    assert_same_run,
    by_path,
    make_trainer,
    rows,
    saved,
    without_times,
)


@pytest.fixture(scope="module")
def uninterrupted(toy, tmp_path_factory):
    """Workdirs of uninterrupted runs, by the number of steps per dispatch."""
    workdirs = {}

    def get(per_call):
        if per_call not in workdirs:
            workdirs[per_call] = tmp_path_factory.mktemp("uninterrupted") / "run"
            toy.run(workdirs[per_call], per_call=per_call)
        return workdirs[per_call]

    return get


@pytest.mark.slow
def test_resident_data_and_several_steps_per_dispatch_change_nothing(toy, uninterrupted):
    one, many = uninterrupted(1), uninterrupted(4)
    a, b = saved(one), saved(many)
    assert a.step == b.step == STEPS
    for name in a.arrays:
        np.testing.assert_allclose(a.arrays[name], b.arrays[name], rtol=0, atol=1e-6, err_msg=name)
    for key in ("step", "epoch", "input"):
        assert a.metadata["position"][key] == b.metadata["position"][key]
    steps = [[int(row["step"]) for row in rows(workdir)] for workdir in (one, many)]
    assert steps[0] == steps[1] == [5, 7, 10, 14, 15, 20, 20]
    for x, y in zip(rows(one), rows(many)):
        for key in (
            "train_loss",
            "valid_loss",
            "train_force_mae_mev_per_ang",
            "valid_energy_mae_mev",
        ):
            np.testing.assert_allclose(
                float(x[key] or "nan"), float(y[key] or "nan"), rtol=1e-5, err_msg=key
            )


def test_training_changes_the_parameters(toy, uninterrupted):
    arrays = saved(uninterrupted(1)).arrays
    moved = [np.abs(arrays[f"params/{k}"] - v).max() for k, v in by_path(toy.params).items()]
    assert len(moved) > 5 and max(moved) > 1e-2


def test_each_bucket_is_compiled_once(toy, uninterrupted, tmp_path):
    for per_call, trainer in ((1, toy.streamed), (4, toy.on_device)):
        uninterrupted(per_call)
        assert trainer.num_compiles == len(toy.budgets) == 2
    toy.run(tmp_path / "run", num_steps=8)
    toy.run(tmp_path / "run", num_steps=10)  # resuming does not compile either
    assert toy.streamed.num_compiles == 2


@pytest.mark.parametrize(
    ("per_call", "step"),
    [
        *((1, 1), (1, 6), (1, 7), (1, 20), (4, 13)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 17), (4, 1))),
    ],
)
def test_a_stopped_run_resumes_bit_by_bit(toy, uninterrupted, stop_at, tmp_path, per_call, step):
    expected = uninterrupted(per_call)
    workdir, stop_at.step = tmp_path / "run", step
    with pytest.raises(distributed.Stopped, match="SIGTERM"):
        toy.run(workdir, per_call=per_call)
    resumed_at = saved(workdir).step
    assert step <= resumed_at <= min(step + 3 * per_call, STEPS)
    stop_at.step = None
    toy.run(workdir, per_call=per_call)
    assert_same_run(workdir, expected, resumed_at)


def test_a_stop_between_two_size_buckets_loses_no_batch(toy, stop_at, tmp_path):
    """The first batch of the other bucket is already taken; it is trained on before the stop."""
    rarely = {"per_call": 4, "log_every": 20, "valid_every": 20, "checkpoint_every": 20}
    toy.run(tmp_path / "uninterrupted", **rarely)
    expected, ends = saved(tmp_path / "uninterrupted"), set()
    for step in (1, 4, 7, 10):
        workdir, stop_at.step = tmp_path / f"run{step}", step
        with pytest.raises(distributed.Stopped):
            toy.run(workdir, **rarely)
        ends.add(saved(workdir).step)
        stop_at.step = None
        toy.run(workdir, **rarely)
        found = saved(workdir)
        assert found.metadata["position"]["input"] == expected.metadata["position"]["input"]
        for name in expected.arrays:
            assert found.arrays[name].tobytes() == expected.arrays[name].tobytes(), (step, name)
    assert len(ends) > 1 and STEPS not in ends


@pytest.mark.parametrize("calls", [3, pytest.param(9, marks=pytest.mark.slow), 19])
def test_a_killed_run_resumes_bit_by_bit(toy, uninterrupted, monkeypatch, tmp_path, calls):
    """It resumes from its last checkpoint, although metrics and best checkpoint are newer."""
    expected, real, dispatched = uninterrupted(1), Trainer.train, []

    def train(self, *arguments, **options):
        dispatched.append(1)
        if len(dispatched) > calls:
            raise OSError("the power is gone")
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", train)
        with pytest.raises(OSError, match="power"):
            toy.run(tmp_path / "run")
    resumed_at = calls // 6 * 6
    assert [x.step for x in [restore(tmp_path / "run")] if x] == [resumed_at] * bool(resumed_at)
    toy.run(tmp_path / "run")
    assert_same_run(tmp_path / "run", expected, resumed_at)


def test_a_finished_run_does_nothing(toy, uninterrupted, monkeypatch):
    workdir = uninterrupted(1)
    before = without_times(workdir)
    monkeypatch.setattr(Trainer, "train", None)
    position = toy.run(workdir)
    assert position.step == STEPS and without_times(workdir) == before


@pytest.fixture
def reads(monkeypatch):
    """Return the list of (step of a result, newest step) when the loop reads results."""
    newest, seen = [0], []
    train, single = Trainer.train, Trainer.single

    def counted(self, *arguments, **options):
        state, result = train(self, *arguments, **options)
        newest[0] += 1
        # keep the result, so that no other object gets its id
        order[id(result.finite)] = (newest[0], result)
        return state, result

    def looked_at(tree):
        if isinstance(tree, DispatchResult):
            seen.append((order[id(tree.finite)][0], newest[0]))
        return single(tree)

    order = {}
    monkeypatch.setattr(Trainer, "train", counted)
    monkeypatch.setattr(Trainer, "single", staticmethod(looked_at))
    return seen


def test_the_loop_does_not_wait_for_the_newest_dispatches(toy, reads, monkeypatch, tmp_path):
    """Results are read immediately only if a validation or a checkpoint is due."""
    monkeypatch.setattr(Trainer, "oversubscribed", False)
    toy.run(tmp_path / "run", log_every=1)
    due = {step for step in range(1, STEPS + 1) if step % 7 == 0 or step % 6 == 0 or step == STEPS}
    assert [step for step, _ in reads] == list(range(1, STEPS + 1))
    assert all(at - step == module.AHEAD for step, at in reads if at not in due)
    assert sum(at not in due for _, at in reads) >= 5


def test_the_loop_waits_for_oversubscribed_devices(toy, reads, monkeypatch, tmp_path):
    monkeypatch.setattr(Trainer, "oversubscribed", True)
    toy.run(tmp_path / "run", num_steps=4)
    assert reads == [(step, step) for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("per_call", [1, 4])
def test_the_epoch_is_an_integer_at_its_end(toy, tmp_path, per_call):
    batches, ends = toy.loop(tmp_path).batches, []
    for step, (plan, _) in enumerate(batches.training(toy.train, 3), 1):
        if plan.progress == 1.0:
            ends.append(step)
        if len(ends) == 2:
            break
    for steps, expected in ((ends[0], 1.0), (ends[1], 2.0)):
        assert toy.run(tmp_path / "run", per_call=per_call, num_steps=steps).epoch == expected
    between = toy.run(tmp_path / "another", per_call=per_call, num_steps=ends[0] + 1).epoch
    assert 1.0 < between < 1.5
    assert [int(row["epoch"]) for row in rows(tmp_path / "run") if int(row["step"]) == ends[1]] == [
        2,
        2,
    ]


def test_averages_of_parameters_and_frozen_parameters(toy, recorded_steps, monkeypatch, tmp_path):
    frozen = [k for k in by_path(toy.params) if "embed" in k.lower()]
    assert 0 < len(frozen) < len(by_path(toy.params))
    rule = optimizer.create(
        {
            "name": "adamw",
            "learning_rate": 1e-2,
            "learning_rate_end": 1e-2,
            "schedule": "constant",
            "warmup_steps": 0,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "clip_norm": 10.0,
            "freeze": frozen,
        },
        8,
    )
    workdir = tmp_path / "run"
    monkeypatch.setattr(module, "validate", lambda *_: as_sums(1.0))  # would be compiled as well
    toy.run(
        workdir, trainer=make_trainer(toy.model, rule, 0.5), num_steps=8, budgets=toy.budgets[1:]
    )
    arrays = saved(workdir).arrays
    for name, start in by_path(toy.params).items():
        average = np.asarray(start, np.float64)
        for step, (params, _, _) in enumerate(recorded_steps):
            decay = min(0.5, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * by_path(params)[name]
        np.testing.assert_allclose(
            arrays[f"ema/{name}"], average, rtol=1e-5, atol=1e-6, err_msg=name
        )
        for kind in ("params", "ema"):
            same = arrays[f"{kind}/{name}"].tobytes() == np.asarray(start).tobytes()
            assert same == (name in frozen), (kind, name)


def test_muon_resumes_bit_by_bit(toy, stop_at, tmp_path):
    """The state of Muon has other shapes than that of Adam, and none for frozen parameters."""
    frozen = [k for k in by_path(toy.params) if "filter" in k and k.endswith("kernel")][:1]
    assert len(frozen) == 1
    rule = optimizer.create(
        {
            "name": "muon",
            "learning_rate": 3e-3,
            "learning_rate_end": 1e-3,
            "schedule": "cosine",
            "warmup_steps": 2,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "clip_norm": 10.0,
            "freeze": frozen,
        },
        10,
    )
    how = dict(trainer=make_trainer(toy.model, rule), num_steps=10, budgets=toy.budgets[1:])
    toy.run(tmp_path / "uninterrupted", **how)
    stop_at.step = 4
    with pytest.raises(distributed.Stopped, match="SIGTERM"):
        toy.run(tmp_path / "run", **how)
    resumed_at, stop_at.step = saved(tmp_path / "run").step, None
    assert 4 <= resumed_at < 10
    toy.run(tmp_path / "run", **how)
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted", resumed_at)
    arrays = saved(tmp_path / "run").arrays
    for name, start in by_path(toy.params).items():
        same = arrays[f"params/{name}"].tobytes() == np.asarray(start).tobytes()
        assert same == (name in frozen), name


def reduce_on_plateau(losses, patience, factor, threshold, floor):
    """Return the scale after each loss by the rule of torch.optim.lr_scheduler.ReduceLROnPlateau.

    Its options are mode="min", threshold_mode="rel" and cooldown=0.
    """
    best, num_bad, scale, scales = np.inf, 0, 1.0, []
    for loss in losses:
        better = loss < best * (1 - threshold)
        best, num_bad = (loss, 0) if better else (best, num_bad + 1)
        if num_bad > patience:
            scale, num_bad = max(scale * factor, floor), 0
        scales.append(scale)
    return scales


@pytest.mark.parametrize("stop", [None, 6])
def test_the_learning_rate_is_reduced_on_a_plateau(toy, stop_at, monkeypatch, tmp_path, stop):
    """An epoch has one step here. An interruption must not change anything."""
    losses = [5.0, 4.0, 4.0, 3.999, 4.2, 3.0, 3.1, 2.9999, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    plateau = {"patience": 1, "factor": 0.5, "threshold": 1e-2, "floor": 0.1}
    few = toy.train.subset(np.argsort(toy.train.sizes.n_edge)[:2])
    real = module.validate

    def validate(trainer, params, split, batches):
        real(trainer, params, split.subset(np.arange(1)), batches)
        return as_sums(losses[len(used) - 1])  # `used` has one entry per step

    def run():
        loop = toy.loop(
            tmp_path / "run",
            train=few,
            num_steps=len(losses),
            plateau=plateau,
            valid_every=1,
            log_every=1,
            checkpoint_every=5,
        )
        return loop.run(toy.params, restore(tmp_path / "run"))

    def train(self, state, *arguments, **options):
        used.append(float(self.single(state.rate_scale)))
        return trained(self, state, *arguments, **options)

    used, trained = [], Trainer.train
    monkeypatch.setattr(module, "validate", validate)
    monkeypatch.setattr(Trainer, "train", train)
    stop_at.step = stop
    if stop:
        with pytest.raises(distributed.Stopped):
            run()
        stop_at.step = None
    position = run()
    assert position.epoch == len(losses)
    expected = reduce_on_plateau(losses, **plateau)
    assert len(set(expected)) > 3 and expected[-1] == 0.1
    logged = [
        float(row["learning_rate"]) / 3e-3 for row in rows(tmp_path / "run") if row["train_loss"]
    ]
    np.testing.assert_allclose(logged, [1.0, *expected[:-1]], rtol=1e-6)  # of the steps before
    np.testing.assert_allclose(used, logged, rtol=1e-6)
    assert saved(tmp_path / "run").arrays["rate_scale"] == np.float32(0.1)
    assert position.plateau["scale"] == 0.1 and position.best_loss == min(losses)


# --- non-finite losses


@pytest.mark.parametrize("per_call", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_nonfinite_loss_stops_the_run(toy, tmp_path, per_call):
    bad, first = toy.bad(), toy.first_step_with(BAD)
    columns = toy.columns.take(toy.train.indices[[BAD]])
    name = f"{columns.source[0]}#{columns.conformer[0]}"
    trainer = toy.streamed
    if per_call > 1:
        trainer = toy.with_resident(bad.rows)
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
def test_a_nonfinite_step_rolls_the_run_back(toy, stop_at, monkeypatch, tmp_path, stop):
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
    seen, begun, dispatched, train = [], [], 0, Trainer.train

    class Outputs(TrainingOutputs):
        def begin(self, step):
            nonlocal dispatched
            super().begin(step)
            begun.append((dispatched, step))
            dispatched = step

        def save(self, step, tree, metadata):
            super().save(step, tree, metadata)
            if len(seen) < len(begun) - 1:  # the first checkpoint after a rollback
                self.wait()
                position = saved(tmp_path / "uninterrupted").metadata["position"]
                seen.append((*begun[-1], position))

    def train_and_count(self, *arguments, **keywords):
        nonlocal dispatched
        dispatched += 1
        return train(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(module, "TrainingOutputs", Outputs)
        patch.setattr(Trainer, "train", train_and_count)
        position = toy.run(tmp_path / "uninterrupted", train=bad, **options)
    assert position.step == STEPS and position.rollbacks == len(seen) >= 1
    ahead, back, kept = seen[0]
    assert first <= ahead <= first + module.AHEAD and back == 8
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
    if stop < first - module.AHEAD - 1:
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
