"""Small data and trainers for tests of the loop, and helpers to compare runs."""

import csv
import dataclasses
import types
from pathlib import Path

import jax
import numpy as np
import optax

from mlip_jax import models
from mlip_jax.checkpoint import CheckpointStore
from mlip_jax.datasets import readers, statistics
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality.filters import Filters
from mlip_jax.graphs import resident
from mlip_jax.graphs.padding import choose_budget, graph_sizes
from mlip_jax.potential import example_graph
from mlip_jax.training import optimizer
from mlip_jax.training.data import Batches, Split
from mlip_jax.training.loop import TrainingLoop
from mlip_jax.training.losses import LossSums
from mlip_jax.training.objectives import ForceField
from mlip_jax.training.outputs import restore
from mlip_jax.training.step import Trainer
from mlip_jax.training.throughput import ThroughputMeter
from tests.models.parameters import quick_parameters

DATA = Path(__file__).parents[1] / "data/gfn2_small.hdf5"
MODEL = {"num_features": 4, "num_layers": 1, "num_radial": 4, "zero_init": False}
STEPS, BAD = 20, 11


def make_trainer(model, rule=None, decay=0.9, **on_device):
    return Trainer(
        ForceField(model, 1.3, lambda step: 0.7, 0.7, {"penalty": "mse"}),
        rule or optax.adam(3e-3),
        decay,
        **on_device,
    )


class ToyTraining:
    """Small data with two size buckets, and trainers that are compiled once for all tests."""

    def __init__(self):
        with readers.open_data(DATA) as source:
            columns = Columns.from_structures(source)
        filters = Filters(elements=("H", "C", "N", "O", "S"), charge=0.0)
        columns = columns.take(np.flatnonzero(filters.reasons(columns) == 0)[:50])
        self.columns, self.model = columns, models.create("schnet", **MODEL)
        sizes = graph_sizes(columns, self.model.cutoff)
        self.reference = statistics.reference_energies(
            statistics.Summary([columns]), "least_squares"
        )
        order = np.random.default_rng(0).permutation(len(columns))
        self.train, self.valid = (
            Split(columns, p, sizes.take(p)) for p in (order[:30], order[30:])
        )
        # the smaller one does not hold the largest structures
        low, high = (
            choose_budget(sizes.take(np.argsort(sizes.n_edge)[:30]), 1),
            choose_budget(sizes, 5),
        )
        self.budgets = (low, type(high)(*np.maximum(low, high).tolist()))
        self.streamed, self.on_device = make_trainer(self.model), self.with_resident(columns)
        self.params = quick_parameters(self.model, example_graph())

    def with_resident(self, columns):
        return make_trainer(
            self.model,
            data=self.collect(columns),
            build=lambda data, members, bucket: resident.gather(
                data, members, self.budgets[bucket]
            ),
        )

    def collect(self, columns):
        return resident.collect(columns.take(self.train.indices), self.model.cutoff, self.reference)

    def loop(
        self,
        workdir,
        per_call=1,
        trainer=None,
        num_steps=STEPS,
        train=None,
        budgets=None,
        plateau=None,
        **options,
    ):
        """Return a loop over data on the host (one step per dispatch) or on the device."""
        train, streamed = train or self.train, per_call == 1
        trainer = trainer or (self.streamed if streamed else self.on_device)
        batches = Batches(
            budgets or self.budgets,
            self.model.cutoff,
            self.reference,
            1,
            resident=not streamed,
            put=trainer.put if streamed else lambda batch: batch,
        )
        options = types.SimpleNamespace(
            **{
                "on_nonfinite": "stop",
                "log_every": 5,
                "valid_every": 7,
                "checkpoint_every": 6,
                "profile_steps": 0,
            }
            | options
        )
        schedules = {"learning_rate": lambda step: 3e-3, "beta": lambda step: 0.7}
        workdir.mkdir(exist_ok=True)
        return TrainingLoop(
            trainer,
            batches,
            train,
            self.valid,
            workdir,
            {"about": "a test"},
            schedules,
            options,
            num_steps,
            seed=3,
            meter=ThroughputMeter(train.sizes),
            plateau=plateau,
            steps_per_dispatch=per_call,
        )

    def run(self, workdir, **options):
        """Start the run in `workdir`, or resume it."""
        return self.loop(workdir, **options).run(self.params, restore(workdir))

    def bad(self, members=(BAD,)):
        """Return the training split with some forces whose squares overflow."""
        forces = self.columns.forces.copy()
        forces[self.columns.atoms_of(self.train.indices[list(members)])] = 1e30
        return dataclasses.replace(
            self.train, rows=dataclasses.replace(self.columns, forces=forces)
        )

    def first_step_with(self, place):
        """Return the first step (from 1) that contains the structure."""
        for step, (plan, _) in enumerate(self.loop(Path(".")).batches.training(self.train, 3), 1):
            if any(place in members for members in plan.members):
                return step


def rows(workdir):
    with open(workdir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_times(workdir, resumed_at=0):
    """Return rows of metrics without times, and without averages across a resumption."""
    cut = resumed_at + 5 - resumed_at % 5 if resumed_at % 5 else None
    timed = (
        "seconds",
        "structures_per_second",
        "atoms_per_second",
        "edges_per_second",
        "input_share",
        "checkpoint_share",
    )
    return [
        {
            k: v
            for k, v in row.items()
            if k not in timed and (row["step"] != str(cut) or not k.startswith("train_"))
        }
        for row in rows(workdir)
    ]


def saved(workdir, kind="checkpoints"):
    store = CheckpointStore(workdir / kind, read_only=True)
    found = store.restore()
    store.close()
    return found


def assert_same_run(workdir, expected, resumed_at):
    """Assert that arrays, progress and metrics of two runs are identical."""
    for kind in ("checkpoints", "best"):
        a, b = saved(workdir, kind), saved(expected, kind)
        assert a.step == b.step and a.arrays.keys() == b.arrays.keys()
        for name in a.arrays:
            assert a.arrays[name].tobytes() == b.arrays[name].tobytes(), (kind, name)
        positions = [
            {k: v for k, v in x.metadata["position"].items() if k != "seconds"} for x in (a, b)
        ]
        assert positions[0] == positions[1]
    assert without_times(workdir, resumed_at) == without_times(expected, resumed_at)


def by_path(tree):
    return {
        optimizer.parameter_path(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def as_sums(loss):
    """Return the sums of a validation whose loss with beta = 0.7 is `loss`."""
    return LossSums(loss, loss, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
