"""The loop: where a run stands, what it leaves behind, and that no way of running it changes what comes of it."""

import copy
import csv
import dataclasses
import types
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from mlip_jax import distributed, models
from mlip_jax.checkpoint import CheckpointStore
from mlip_jax.datasets import readers, statistics
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.filters import Filters
from mlip_jax.graphs import resident
from mlip_jax.graphs.batching import choose_budget, measure
from mlip_jax.potential import example_graph
from mlip_jax.training import loop as module
from mlip_jax.training import nonfinite, optimizer
from mlip_jax.training.data import Batches, Split
from mlip_jax.training.loop import Loop
from mlip_jax.training.losses import Sums
from mlip_jax.training.meter import Meter
from mlip_jax.training.nonfinite import TrainingError
from mlip_jax.training.outputs import restore
from mlip_jax.training.step import Result, Trainer

pytestmark = pytest.mark.usefixtures("quick_compilation")
DATA = Path(__file__).parents[1] / "data/gfn2_small.hdf5"
MODEL = {"num_features": 4, "num_layers": 1, "num_radial": 4, "zero_init": False}
STEPS, BAD = 20, 11


def make_trainer(model, rule=None, decay=0.9, **on_device):
    return Trainer(model, 1.3, rule or optax.adam(3e-3), lambda step: 0.7, decay, {"penalty": "mse"}, **on_device)


class World:
    """Small data in two buckets, and the trainers, which are compiled once for all tests."""

    def __init__(self):
        with readers.open_data(DATA) as source:
            columns = Columns.from_structures(source)
        filters = Filters(elements=("H", "C", "N", "O", "S"), charge=0.0)
        columns = columns.take(np.flatnonzero(filters.reasons(columns) == 0)[:50])
        self.columns, self.model = columns, models.create("painn", **MODEL)
        sizes = measure(columns, self.model.cutoff)
        self.reference = statistics.reference_energies(statistics.Summary([columns]), "least_squares")
        order = np.random.default_rng(0).permutation(len(columns))
        self.train, self.valid = (Split(columns, p, sizes.take(p)) for p in (order[:30], order[30:]))
        # the smaller one does not hold the largest structures
        low, high = choose_budget(sizes.take(np.argsort(sizes.n_edge)[:30]), 1), choose_budget(sizes, 5)
        self.budgets = (low, type(high)(*np.maximum(low, high).tolist()))
        self.streamed, self.on_device = make_trainer(self.model), self.with_resident(columns)
        self.params = jax.jit(self.model.init)(jax.random.key(0), example_graph())

    def with_resident(self, columns):
        return make_trainer(self.model, data=self.collect(columns), build=lambda data, places, bucket: resident.gather(
            data, places, self.budgets[bucket]))

    def collect(self, columns):
        return resident.collect(columns.take(self.train.indices), self.model.cutoff, self.reference)

    def loop(self, workdir, per_call=1, trainer=None, num_steps=STEPS, train=None, budgets=None, plateau=None,
             **options):
        """A loop over data of the host, one update a call, or over resident data."""
        train, streamed = train or self.train, per_call == 1
        trainer = trainer or (self.streamed if streamed else self.on_device)
        batches = Batches(budgets or self.budgets, self.model.cutoff, self.reference, 1, resident=not streamed,
                          put=trainer.put if streamed else lambda batch: batch)
        options = types.SimpleNamespace(**{"on_nonfinite": "stop", "log_every": 5, "valid_every": 7,
                                           "checkpoint_every": 6, "profile_steps": 0} | options)
        schedules = {"learning_rate": lambda step: 3e-3, "beta": lambda step: 0.7}
        workdir.mkdir(exist_ok=True)
        return Loop(trainer, batches, train, self.valid, workdir, {"about": "a test"}, schedules, options, num_steps,
                    seed=3, beta_valid=0.7, meter=Meter(train.sizes), plateau=plateau, steps_per_call=per_call)

    def run(self, workdir, **options):
        """Go on with the run in `workdir`, or begin it."""
        return self.loop(workdir, **options).run(self.params, restore(workdir))

    def bad(self, places=(BAD,)):
        """The training data, some forces of which overflow when they are squared."""
        forces = self.columns.forces.copy()
        forces[self.columns.atoms_of(self.train.indices[list(places)])] = 1e30
        return dataclasses.replace(self.train, rows=dataclasses.replace(self.columns, forces=forces))

    def first_step_with(self, place):
        """At which the structure comes first, from 1."""
        for step, (group, _) in enumerate(self.loop(Path(".")).batches.training(self.train, 3), 1):
            if any(place in places for places in group.places):
                return step


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """Workdirs of runs that nothing has disturbed, by the updates of a call."""
    made = {}

    def get(per_call):
        if per_call not in made:
            made[per_call] = tmp_path_factory.mktemp("undisturbed") / "run"
            world.run(made[per_call], per_call=per_call)
        return made[per_call]

    return get


def rows(workdir):
    with open(workdir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_times(workdir, begun=0):
    """Rows of metrics. Averages that began before step `begun`, from which a run went on, are left out too."""
    cut = begun + 5 - begun % 5 if begun % 5 else None
    timed = ("seconds", "structures_per_second", "atoms_per_second", "edges_per_second", "input_share",
             "checkpoint_share")
    return [{k: v for k, v in row.items() if k not in timed and not (row["step"] == str(cut) and k.startswith("train_"))}
            for row in rows(workdir)]


def saved(workdir, kind="checkpoints"):
    store = CheckpointStore(workdir / kind, read_only=True)
    found = store.restore()
    store.close()
    return found


def assert_same_run(workdir, expected, begun):
    """Bit for bit: arrays, position and metrics."""
    for kind in ("checkpoints", "best"):
        a, b = saved(workdir, kind), saved(expected, kind)
        assert a.step == b.step and a.arrays.keys() == b.arrays.keys()
        for name in a.arrays:
            assert a.arrays[name].tobytes() == b.arrays[name].tobytes(), (kind, name)
        positions = [{k: v for k, v in x.metadata["position"].items() if k != "seconds"} for x in (a, b)]
        assert positions[0] == positions[1]
    assert without_times(workdir, begun) == without_times(expected, begun)


@pytest.fixture
def stop_at(monkeypatch):
    """Has a signal come when the call that reaches step `stop_at.step` is made; None: never."""
    wish = types.SimpleNamespace(step=None, loop=None)
    begun, real = [], Trainer.train

    class Signal:
        def __enter__(self):
            begun.clear()
            return self

        def __exit__(self, *_):
            pass

        @property
        def received(self):
            return "SIGTERM" if wish.step is not None and sum(begun) >= wish.step else None

    def train(self, state, inputs, count=1, **options):
        begun.append(count)
        return real(self, state, inputs, count, **options)

    monkeypatch.setattr(module.distributed, "StopSignal", Signal)
    monkeypatch.setattr(Trainer, "train", train)
    return wish


@pytest.fixture
def watched(monkeypatch):
    """Parameters, average and whether all was finite after each update of trainers that do one a call."""
    states, real = [], Trainer.train

    def train(self, state, inputs, count=1, **options):
        state, result = real(self, state, inputs, count, **options)
        states.append((self.single(state.params), self.single(state.ema), bool(self.single(result.finite)[0])))
        return state, result

    monkeypatch.setattr(Trainer, "train", train)
    return states


def test_resident_data_and_many_updates_a_call_change_nothing(world, undisturbed):
    one, many = undisturbed(1), undisturbed(4)
    a, b = saved(one), saved(many)
    assert a.step == b.step == STEPS
    for name in a.arrays:
        np.testing.assert_allclose(a.arrays[name], b.arrays[name], rtol=0, atol=1e-6, err_msg=name)
    for key in ("step", "epoch", "input"):
        assert a.metadata["position"][key] == b.metadata["position"][key]
    steps = [[int(row["step"]) for row in rows(workdir)] for workdir in (one, many)]
    assert steps[0] == steps[1] == [5, 7, 10, 14, 15, 20, 20]
    for x, y in zip(rows(one), rows(many)):
        for key in ("train_loss", "valid_loss", "train_force_mae_mev_per_ang", "valid_energy_mae_mev"):
            np.testing.assert_allclose(float(x[key] or "nan"), float(y[key] or "nan"), rtol=1e-5, err_msg=key)


def test_training_changes_the_parameters(world, undisturbed):
    arrays = saved(undisturbed(1)).arrays
    moved = [np.abs(arrays[f"params/{k}"] - v).max() for k, v in _by_path(world.params).items()]
    assert len(moved) > 5 and max(moved) > 1e-2


def _by_path(tree):
    return {optimizer.parameter_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_each_bucket_is_compiled_once(world, undisturbed, tmp_path):
    for per_call, trainer in ((1, world.streamed), (4, world.on_device)):
        undisturbed(per_call)
        assert trainer.num_compiles == len(world.budgets) == 2
    world.run(tmp_path / "run", num_steps=8)
    world.run(tmp_path / "run", num_steps=10)  # neither does going on from a checkpoint
    assert world.streamed.num_compiles == 2


@pytest.mark.parametrize(("per_call", "step"), [(1, 1), (1, 6), (1, 7), (1, 17), (1, 20), (4, 1), (4, 13)])
def test_a_run_that_was_stopped_goes_on_bit_by_bit(world, undisturbed, stop_at, tmp_path, per_call, step):
    expected = undisturbed(per_call)
    workdir, stop_at.step = tmp_path / "run", step
    with pytest.raises(distributed.Stopped, match="SIGTERM"):
        world.run(workdir, per_call=per_call)
    begun = saved(workdir).step
    assert step <= begun <= min(step + 3 * per_call, STEPS)
    stop_at.step = None
    world.run(workdir, per_call=per_call)
    assert_same_run(workdir, expected, begun)


@pytest.mark.parametrize("calls", [3, 9, 19])
def test_a_run_that_was_killed_goes_on_bit_by_bit(world, undisturbed, monkeypatch, tmp_path, calls):
    """From its last checkpoint, and past metrics and a best checkpoint that are later."""
    expected, real, made = undisturbed(1), Trainer.train, []

    def train(self, *arguments, **options):
        made.append(1)
        if len(made) > calls:
            raise OSError("the power is gone")
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", train)
        with pytest.raises(OSError, match="power"):
            world.run(tmp_path / "run")
    begun = calls // 6 * 6
    assert [x.step for x in [restore(tmp_path / "run")] if x] == [begun] * bool(begun)
    world.run(tmp_path / "run")
    assert_same_run(tmp_path / "run", expected, begun)


def test_a_run_that_is_done_does_nothing(world, undisturbed, monkeypatch):
    workdir = undisturbed(1)
    before = without_times(workdir)
    monkeypatch.setattr(Trainer, "train", None)
    position = world.run(workdir)
    assert position.step == STEPS and without_times(workdir) == before


def test_nothing_waits_for_the_newest_calls(world, monkeypatch, tmp_path):
    """But where something is due that needs the state."""
    newest, seen = [0], []
    train, single = Trainer.train, Trainer.single

    def counted(self, *arguments, **options):
        state, result = train(self, *arguments, **options)
        newest[0] += 1
        order[id(result.finite)] = (newest[0], result)  # kept, so that no other object gets its number
        return state, result

    def looked_at(tree):
        if isinstance(tree, Result):
            seen.append((order[id(tree.finite)][0], newest[0]))
        return single(tree)

    order = {}
    monkeypatch.setattr(module, "_crowded", lambda: False)
    monkeypatch.setattr(Trainer, "train", counted)
    monkeypatch.setattr(Trainer, "single", staticmethod(looked_at))
    world.run(tmp_path / "run", log_every=1)
    due = {step for step in range(1, STEPS + 1) if step % 7 == 0 or step % 6 == 0 or step == STEPS}
    assert [step for step, _ in seen] == list(range(1, STEPS + 1))
    assert all(at - step == module._AHEAD for step, at in seen if at not in due)
    assert sum(at not in due for _, at in seen) >= 5


def test_crowded_devices_are_waited_for(world, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_crowded", lambda: True)
    loop = world.loop(tmp_path / "run", num_steps=3)
    left = []
    monkeypatch.setattr(module.Loop, "_due", lambda self, step, every: left.append(len(self._calls)) or False)
    loop.run(world.params)
    assert loop._ahead == 0 and not loop._calls


@pytest.mark.parametrize("per_call", [1, 4])
def test_epochs_are_whole_at_their_ends(world, tmp_path, per_call):
    batches, ends = world.loop(tmp_path).batches, []
    for step, (group, _) in enumerate(batches.training(world.train, 3), 1):
        if group.progress == 1.0:
            ends.append(step)
        if len(ends) == 2:
            break
    for steps, expected in ((ends[0], 1.0), (ends[1], 2.0)):
        assert world.run(tmp_path / "run", per_call=per_call, num_steps=steps).epoch == expected
    between = world.run(tmp_path / "another", per_call=per_call, num_steps=ends[0] + 1).epoch
    assert 1.0 < between < 1.5
    assert [int(row["epoch"]) for row in rows(tmp_path / "run") if int(row["step"]) == ends[1]] == [2, 2]


def test_averages_and_frozen_parameters(world, watched, tmp_path):
    frozen = [k for k in _by_path(world.params) if "embed" in k.lower()]
    assert 0 < len(frozen) < len(_by_path(world.params))
    rule = optimizer.create({
        "name": "adamw", "learning_rate": 1e-2, "learning_rate_end": 1e-2, "schedule": "constant", "warmup_steps": 0,
        "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 10.0, "freeze": frozen}, 8)
    workdir = tmp_path / "run"
    world.run(workdir, trainer=make_trainer(world.model, rule, 0.5), num_steps=8, budgets=world.budgets[1:])
    arrays = saved(workdir).arrays
    for name, start in _by_path(world.params).items():
        average = np.asarray(start, np.float64)
        for step, (params, _, _) in enumerate(watched):
            decay = min(0.5, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * _by_path(params)[name]
        np.testing.assert_allclose(arrays[f"ema/{name}"], average, rtol=1e-5, atol=1e-6, err_msg=name)
        for kind in ("params", "ema"):
            same = arrays[f"{kind}/{name}"].tobytes() == np.asarray(start).tobytes()
            assert same == (name in frozen), (kind, name)


def as_sums(loss):
    """Sums of a validation whose loss, with beta 0.7, is `loss`."""
    return Sums(loss, loss, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


def reduce_on_plateau(losses, patience, factor, threshold, floor):
    """Scales after each of `losses`, as torch.optim.lr_scheduler.ReduceLROnPlateau(mode="min",
    threshold_mode="rel", cooldown=0) goes about it."""
    best, num_bad, scale, scales = np.inf, 0, 1.0, []
    for loss in losses:
        better = loss < best * (1 - threshold)
        best, num_bad = (loss, 0) if better else (best, num_bad + 1)
        if num_bad > patience:
            scale, num_bad = max(scale * factor, floor), 0
        scales.append(scale)
    return scales


@pytest.mark.parametrize("stop", [None, 6])
def test_learning_rate_goes_down_on_a_plateau(world, stop_at, monkeypatch, tmp_path, stop):
    """An epoch is one update here. A stop between has to change nothing."""
    losses = [5.0, 4.0, 4.0, 3.999, 4.2, 3.0, 3.1, 2.9999, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    plateau = {"patience": 1, "factor": 0.5, "threshold": 1e-2, "floor": 0.1}
    few = world.train.part(np.arange(2))
    real = module.validate

    def validate(trainer, params, split, batches):
        real(trainer, params, split.part(np.arange(1)), batches)
        return as_sums(losses[int(current.step) - 1])

    def run():
        nonlocal current
        loop = world.loop(tmp_path / "run", train=few, num_steps=len(losses), plateau=plateau, valid_every=1,
                          log_every=1, checkpoint_every=5, budgets=world.budgets[1:])
        start, restored = loop._start, restore(tmp_path / "run")

        def begin(found):
            nonlocal current
            state, current = start(found)
            return state, current

        loop._start = begin
        return loop.run(world.params, restored)

    current = None
    monkeypatch.setattr(module, "validate", validate)
    stop_at.step = stop
    if stop:
        with pytest.raises(distributed.Stopped):
            run()
        stop_at.step = None
    position = run()
    assert position.epoch == len(losses)
    expected = reduce_on_plateau(losses, **plateau)
    assert len(set(expected)) > 3 and expected[-1] == 0.1
    logged = [float(row["learning_rate"]) / 3e-3 for row in rows(tmp_path / "run") if row["train_loss"]]
    np.testing.assert_allclose(logged, [1.0, *expected[:-1]], rtol=1e-6)  # of the updates before
    assert saved(tmp_path / "run").arrays["rate_scale"] == np.float32(0.1)
    assert position.plateau["scale"] == 0.1 and position.best_loss == min(losses)


@pytest.mark.parametrize("per_call", [1, 4])
def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path, per_call):
    bad, first = world.bad(), world.first_step_with(BAD)
    columns = world.columns.take(world.train.indices[[BAD]])
    name = f"{columns.source[0]}#{columns.conformer[0]}"
    trainer = world.streamed
    if per_call > 1:  # compiled already
        trainer = copy.copy(world.on_device)
        trainer._data = trainer.replicate(world.collect(bad.rows))
    with pytest.raises(TrainingError, match=f"step {first}.*") as raised:
        world.run(tmp_path / "run", train=bad, per_call=per_call, trainer=trainer, checkpoint_every=1)
    assert name in str(raised.value) and "on_nonfinite" in str(raised.value)
    with open(tmp_path / "run" / "nonfinite.csv", newline="") as file:
        assert {"step": str(first), "structure": name} in list(csv.DictReader(file))
    found = saved(tmp_path / "run")
    assert (found is None and first == 1) or found.step == first - 1
    assert all(np.isfinite(x).all() for x in found.arrays.values())


def test_a_bad_update_is_passed_over(world, watched, tmp_path):
    workdir, first = tmp_path / "run", world.first_step_with(BAD)
    position = world.run(workdir, train=world.bad(), on_nonfinite="skip", log_every=1)
    assert position.step == STEPS
    wrong = [i + 1 for i, (_, _, finite) in enumerate(watched) if not finite]
    assert wrong[0] == first and len(wrong) < STEPS / 2
    for step, (*trees, finite) in enumerate(watched, 1):
        before = watched[step - 2][:2] if step > 1 else (world.params, world.params)
        same = [all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y)))
                for x, y in zip(trees, before)]
        assert same == [not finite] * 2, f"step {step}"
    # a row of nothing but such updates has no loss
    logged = {int(row["step"]): float(row["train_loss"]) for row in rows(workdir) if row["train_loss"]}
    assert [step for step, loss in logged.items() if not np.isfinite(loss)] == wrong


def test_too_many_bad_updates_end_the_run(world, monkeypatch, tmp_path):
    monkeypatch.setattr(nonfinite, "MOST_SKIPPED", 3)
    with pytest.raises(TrainingError, match="4 updates were passed over"):
        world.run(tmp_path / "run", train=world.bad(range(30)), on_nonfinite="skip")


@pytest.mark.parametrize("stop", [None, 7])
def test_a_bad_update_rolls_the_run_back(world, stop_at, tmp_path, stop):
    """To the last checkpoint, on with batches that come later; and again where the structure comes again."""
    places, first = (), 0
    for place in range(30):  # one that comes after some checkpoints
        if (found := world.first_step_with(place)) in (9, 10):
            places, first = (place,), found
            break
    bad, options = world.bad(places), {"on_nonfinite": "rollback", "log_every": 1, "checkpoint_every": 4}
    seen = []
    loop = world.loop(tmp_path / "undisturbed", train=bad, **options)
    roll_back = loop._roll_back

    def noted(position, stream):
        ahead = position.step
        state = roll_back(position, stream)
        loop._outputs.wait()
        seen.append((ahead, position.step, saved(tmp_path / "undisturbed").metadata["position"]))
        return state

    loop._roll_back = noted
    position = loop.run(world.params)
    assert position.step == STEPS and position.rollbacks == len(seen) >= 1
    ahead, back, kept = seen[0]
    assert first <= ahead <= first + module._AHEAD and back == 8
    assert kept["step"] == 8 and kept["rollbacks"] == 1
    steps = [int(row["step"]) for row in rows(tmp_path / "undisturbed") if row["train_loss"]]
    assert steps == list(range(1, STEPS + 1))
    assert all(np.isfinite(float(row["train_loss"])) for row in rows(tmp_path / "undisturbed") if row["train_loss"])
    validated = [int(row["step"]) for row in rows(tmp_path / "undisturbed") if row["valid_loss"]]
    assert validated == [7, 14, 20]
    if stop is None:
        return
    stop_at.step = stop
    with pytest.raises(distributed.Stopped):
        world.run(tmp_path / "run", train=bad, **options)
    stop_at.step = None
    world.run(tmp_path / "run", train=bad, **options)
    if stop < first - module._AHEAD - 1:  # else what was ahead at the rollback differs, and with it what is left out
        assert_same_run(tmp_path / "run", tmp_path / "undisturbed", 0)
    assert saved(tmp_path / "run").step == STEPS


def test_a_run_that_comes_to_nothing_ends_after_some_rollbacks(world, monkeypatch, tmp_path):
    monkeypatch.setattr(nonfinite, "MOST_ROLLBACKS", 3)
    with pytest.raises(TrainingError, match="gone back 3 times"):
        world.run(tmp_path / "run", train=world.bad(range(30)), on_nonfinite="rollback")
    assert saved(tmp_path / "run").metadata["position"]["rollbacks"] == 3


def test_the_best_so_far_outlives_a_rollback(world, monkeypatch, tmp_path):
    """What is loaded is what has the lowest loss of all that was validated."""
    place = next(p for p in range(30) if world.first_step_with(p) in (9, 10))
    losses = iter([3.0, 1.0, 2.0, 0.5, 0.8, 0.7, 0.9, 0.6])  # back to the start after two validations
    given = []

    def validate(*_):
        given.append(next(losses))
        return as_sums(given[-1])

    monkeypatch.setattr(module, "validate", validate)
    position = world.run(tmp_path / "run", train=world.bad((place,)), on_nonfinite="rollback", valid_every=4,
                         checkpoint_every=50, num_steps=12)
    assert position.rollbacks == 1 and given[:3] == [3.0, 1.0, 2.0]
    best = saved(tmp_path / "run", "best")
    assert best.metadata["position"]["best_loss"] == position.best_loss == min(given)
