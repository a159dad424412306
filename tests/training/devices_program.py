"""Training of a small model for 20 steps of eight micro-batches, whose results are written."""

import contextlib
from pathlib import Path

import jax
import numpy as np
import optax

from mlip_jax import models
from mlip_jax.datasets import readers, statistics
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality.filters import Filters
from mlip_jax.graphs import resident
from mlip_jax.graphs.padding import choose_budgets, graph_sizes
from mlip_jax.potential import example_graph
from mlip_jax.training.data import Batches, Split
from mlip_jax.training.objectives import ForceField
from mlip_jax.training.step import Trainer
from tests.models.parameters import quick_parameters

DATA = Path(__file__).parents[1] / "data/gfn2_small.hdf5"
UPDATES, MICRO_BATCHES = 20, 8


def load():
    with readers.open_data(DATA) as source:
        columns = Columns.from_structures(source)
    filters = Filters(elements=("H", "C", "N", "O", "S"), charge=0.0)
    return columns.take(np.flatnonzero(filters.reasons(columns) == 0))


def main(output: str, resident_text: str, per_call_text: str, num_buckets: str) -> None:
    """Train, and write losses and parameters.

    Args:
      output: Path of the file, *.npz.
      resident_text: "True" for data on the devices.
      per_call_text: Number of updates per call.
      num_buckets: Maximum number of size buckets.
    """
    on_device, per_call = resident_text == "True", int(per_call_text)
    jax.config.update("jax_disable_most_optimizations", True)
    columns = load()
    model = models.create("schnet", num_features=8, num_layers=1, num_radial=6, zero_init=False)
    split = Split(columns, np.arange(len(columns)), graph_sizes(columns, model.cutoff))
    reference = statistics.reference_energies(statistics.Summary([columns]), "least_squares")
    budgets = choose_budgets(split.sizes, 2, max_budgets=int(num_buckets))
    batches = Batches(
        budgets,
        model.cutoff,
        reference,
        jax.local_device_count(),
        MICRO_BATCHES,
        resident=on_device,
    )
    build, data = None, ()
    if on_device:
        data = resident.collect([columns], model.cutoff, reference)

        def build(data, places, bucket):
            return resident.gather(data, places, budgets[bucket])

    trainer = Trainer(
        ForceField(model, 1.3, lambda step: 0.7, 0.7, {"penalty": "mse"}),
        optax.adam(1e-3),
        0.9,
        build=build,
        data=data,
    )
    state = trainer.init(quick_parameters(model, example_graph()))
    results = []
    with contextlib.closing(batches.training(split, seed=0)) as stream:
        held = next(stream)
        while len(results) < UPDATES:
            taken = [held]
            held = next(stream)
            while (
                len(taken) < per_call
                and held[0].bucket == taken[0][0].bucket
                and len(results + taken) < UPDATES
            ):
                taken.append(held)
                held = next(stream)
            inputs = [batch for _, batch in taken]
            inputs += inputs[-1:] * (per_call - len(inputs))
            joined = jax.tree.map(lambda *x: np.concatenate(x, 1), *inputs)
            state, result = trainer.train(state, joined, len(taken), bucket=taken[0][0].bucket)
            # with fewer cores than devices a second step could starve the all-reduce of the first
            result = trainer.single(result)
            done = len(taken)
            sums = type(result.sums)(*(x[:done] for x in result.sums))
            results += list(
                0.3 * sums.energy_loss / sums.energies + 0.7 * sums.force_loss / sums.force_terms
            )
    single = trainer.single(state)
    np.savez(
        output,
        losses=results,
        devices=jax.local_device_count(),
        params=np.concatenate([np.ravel(x) for x in jax.tree.leaves(single.params)]),
        ema=np.concatenate([np.ravel(x) for x in jax.tree.leaves(single.ema)]),
    )
