"""Measurements of the models of this package, like those of others in benchmarks/peers.

benchmarks/models.py starts this script. Training steps are those of a training run: planned padded
batches, `Trainer` with its pmap, and the moving average of the parameters.
"""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "peers")]

import measure as clock

from mlip_jax import models
from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.packing import plan_batches
from mlip_jax.graphs.padding import choose_budget, graph_sizes
from mlip_jax.potential import Potential, example_graph
from mlip_jax.simulation.calculators.calculator import MLIPCalculator
from mlip_jax.structure import Structure
from mlip_jax.training.objectives import ForceField
from mlip_jax.training.step import Trainer

LOSS = {"penalty": "mse", "energy_per_atom": False}
EMA_DECAY = 0.999
REPEATED_STEPS = 3


def make_model(job: dict[str, Any]):
    """Return the model, with a nonzero energy head, so that no gradient is zero at the start."""
    options = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in job["options"].items()
    }
    return models.create(job["model"], cutoff=clock.CUTOFF, zero_init=False, **options)


def make_params(model):
    return jax.device_get(jax.jit(model.init)(jax.random.key(0), example_graph()))


class Setup:
    """Trainer, initial state and batches of a job.

    Attributes:
      real: Numbers of structures, atoms and edges of each batch, without padding.
      budget: Static shape of a batch.
    """

    def __init__(self, job: dict[str, Any], num_batches: int):
        count = job["batch"] * num_batches
        # more structures than necessary, so that the last batch is as full as those of a long run
        columns = Columns.from_structures(
            [
                Structure(
                    numbers=m.numbers, positions=m.positions, energy=m.energy, forces=m.forces
                )
                for m in clock.read_molecules(job["work"])
            ][: 2 * count]
        )
        sizes = graph_sizes(columns, clock.CUTOFF)
        self.budget = choose_budget(sizes, job["batch"])
        plan = plan_batches(np.arange(len(columns)), sizes, self.budget)[:num_batches]
        self.real = [(len(p), int(sizes.n_node[p].sum()), int(sizes.n_edge[p].sum())) for p in plan]
        model = make_model(job)
        params = make_params(model)
        self.num_parameters = sum(p.size for p in jax.tree.leaves(params))
        self.trainer = Trainer(
            ForceField(model, 1.0, lambda step: clock.FORCE_WEIGHT, clock.FORCE_WEIGHT, LOSS),
            optax.adam(clock.LEARNING_RATE),
            EMA_DECAY,
        )
        if self.trainer.num_devices != 1:
            raise ValueError(
                f"expected one device, found {self.trainer.num_devices}. "
                "Set CUDA_VISIBLE_DEVICES=0."
            )
        self.state = self.trainer.init(params)
        self.data = [
            self._input(build_batch(columns.take(p), self.budget, clock.CUTOFF)) for p in plan
        ]

    def _input(self, graphs):
        """Return the input of a dispatch with one step of one micro-batch."""
        return self.trainer.replicate(jax.tree.map(lambda x: np.asarray(x)[None, None], graphs))

    def step(self, graphs) -> None:
        """Perform one training step."""
        self.state, _ = self.trainer.train(self.state, graphs)


def train(job: dict[str, Any]) -> dict[str, Any]:
    run = Setup(job, job["batches"])
    device = jax.devices()[0]
    times = clock.time_steps(
        run.step,
        run.data,
        job["seconds"],
        lambda: jax.block_until_ready(run.state.params),
        each=device.platform == "cpu",
    )
    if run.trainer.num_compiles != 1:
        raise RuntimeError(
            f"the training step was compiled {run.trainer.num_compiles} times instead of once"
        )
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    result = clock.training_result(
        times,
        run.real,
        run.num_parameters,
        device=device.platform,
        padded=dict(zip(("nodes", "edges", "graphs", "pairs"), run.budget)),
        peak_device_mib=None if peak is None else peak / 2**20,
    )
    if job["counters"]:
        result |= clock.xla_cost(run.trainer.lower(run.state, run.data[0]).compile())
    return result


def latency(job: dict[str, Any]) -> dict[str, Any]:
    model = make_model(job)
    elements = tuple(range(1, 119))
    calculator = MLIPCalculator(
        Potential(model, make_params(model), clock.CUTOFF, np.zeros(119), 1.0, elements)
    )
    return clock.latency(job, lambda atoms: calculator)


def repeat(job: dict[str, Any]) -> dict[str, Any]:
    """Return hashes of the gradients, and of the whole training state after a few steps.

    Adam's first moment after one step is the gradient times 1 - b1, so it is hashed instead.
    """
    run = Setup(job, REPEATED_STEPS)
    hashes = {}
    for n, graphs in enumerate(run.data):
        run.step(graphs)
        if n == 0:
            hashes["gradients"] = _hash(run.trainer.single(run.state.optimizer)[0].mu)
    hashes[f"state after {REPEATED_STEPS} steps"] = _hash(run.state)
    return {"hashes": hashes, "device": jax.devices()[0].platform}


def _hash(tree) -> str:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    if not all(np.isfinite(leaf).all() for leaf in leaves):
        raise ValueError("values are not finite and cannot be compared")
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()


def device(job: dict[str, Any]) -> dict[str, Any]:
    """Measure FLOP/s of a float32 matrix product and bytes/s (read and written) of a copy.

    The product has JAX's default precision, as in the models. On a CPU, processor time is measured.
    """
    first = jax.devices()[0]
    cpu = first.platform == "cpu"
    clock_of_device = time.process_time if cpu else time.perf_counter
    size, length = (2048, 2**25) if cpu else (8192, 2**28)
    multiply = jax.jit(lambda a: a @ a)
    # Donate the buffer, so that no memory is allocated.
    copy = jax.jit(lambda a: -a, donate_argnums=0)
    matrix, held = (
        jax.random.normal(jax.random.key(0), (size, size), jnp.float32),
        [jnp.ones(length, jnp.float32)],
    )

    def copy_held():
        held[0] = copy(held[0])
        return held[0]

    return {
        "device": first.platform,
        "kind": first.device_kind,
        "flops_per_s": 2
        * size**3
        / _shortest(lambda: multiply(matrix), job["seconds"], clock_of_device),
        "bytes_per_s": 8 * length / _shortest(copy_held, job["seconds"], clock_of_device),
    }


def _shortest(function, seconds: float, clock_of_device) -> float:
    jax.block_until_ready(function())
    times, stop = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < stop:
        start = clock_of_device()
        jax.block_until_ready(function())
        times.append(clock_of_device() - start)
    return min(times)


if __name__ == "__main__":
    clock.main(
        {"train": train, "latency": latency, "repeat": repeat, "device": device},
        ("jax", "jaxlib", "flax"),
    )
