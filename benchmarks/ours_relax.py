"""Measurements of relaxations with this package, like those of others in benchmarks/peers.

benchmarks/relax.py starts this script.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ase.optimize import BFGS

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "peers")]

import measure as clock
import relaxing

from mlip_jax import MLIPCalculator, Potential, Relaxer
from mlip_jax.graphs import slots as slot_graphs
from mlip_jax.graphs.graph import displacements
from mlip_jax.importers import load_force_field, schnetpack
from mlip_jax.models.layers.heads import AtomOutputs
from mlip_jax.potential import evaluate
from mlip_jax.simulation.relaxation.pool import slot_size

REPEATS = 20
# Number of steps whose positions are compared; later, rounding errors may have grown large.
CHECKED_STEPS = 60


class Morse(nn.Module):
    """Morse potential of peers/relaxing.py with the interface of mlip_jax.models."""

    cutoff: float = relaxing.MORSE["cutoff"]

    @nn.compact
    def __call__(self, graph):
        self.param("nothing", nn.initializers.zeros, (1,))
        m, vectors = relaxing.MORSE, displacements(graph)
        squared = (vectors * vectors).sum(-1)
        padding = squared == 0
        e = jnp.exp(-m["alpha"] * (jnp.sqrt(jnp.where(padding, 1.0, squared)) - m["r0"]))
        pair = jnp.where(padding, 0.0, 0.5 * m["epsilon"] * (e * e - 2 * e))
        atoms = graph.nodes["numbers"].shape[0]
        energies = jax.ops.segment_sum(pair, graph.receivers, atoms, indices_are_sorted=True)
        return AtomOutputs(energies, jnp.zeros((atoms, 1, 1, 1), energies.dtype))


def potential(job: dict[str, Any]) -> Potential:
    if job["model"] != "morse":
        return (schnetpack.load if job["weights"].endswith(".npz") else load_force_field)(
            job["weights"]
        )
    return Potential(
        Morse(),
        {"params": {"nothing": np.zeros(1, np.float32)}},
        relaxing.MORSE["cutoff"],
        np.zeros(119),
        1.0,
        (18,),
    )


def molecules_of(job: dict[str, Any]) -> list:
    return relaxing.drops(job["batch"]) if job["model"] == "morse" else relaxing.starts(job)


def batched(job: dict[str, Any]) -> dict[str, Any]:
    """Relax all molecules twice with one `Relaxer`, and measure the second run."""
    molecules, force_field = molecules_of(job), potential(job)
    relaxer = Relaxer(
        force_field,
        optimizer=job["method"],
        fmax=relaxing.FMAX,
        max_steps=relaxing.MAX_STEPS,
        batch_atoms=job["atoms"] or None,
    )
    begin = time.perf_counter()
    list(relaxer.stream(enumerate(molecules)))
    first, compiles, before = (
        time.perf_counter() - begin,
        relaxer.num_compiles,
        relaxer.statistics(),
    )
    start = relaxing.Begin()
    results = [result for _, result in relaxer.stream(enumerate(molecules))]
    measured = relaxing.result(
        start,
        len(molecules),
        sum(r.steps for r in results),
        sum(r.converged for r in results),
        None,
        steps=[r.steps for r in results],
    )
    after, model_ms = relaxer.statistics(), 0.0
    for size in sorted({slot_size(len(atoms)) for atoms in molecules}):
        full_ms = FullBatch(relaxer, force_field, molecules, size).milliseconds()
        model_ms += full_ms["model_ms"] * sum(
            r.steps + 1 for r in results if slot_size(len(r.atoms)) == size
        )
    return (
        measured
        | full_ms
        | {
            "model_share": model_ms / (1e3 * measured["cpu_seconds"]),
            "compiles": compiles,
            "compiled_again": relaxer.num_compiles - compiles,
            "first_s": first,
            "sizes": len({slot_size(len(atoms)) for atoms in molecules}),
            "evaluations": after["iterations"] - before["iterations"],
        }
    )


class FullBatch:
    """Parts of an iteration on a full batch of molecules of one size, compiled separately."""

    def __init__(self, relaxer: Relaxer, force_field: Potential, molecules: list, size: int):
        (pool,) = (p for key, p in relaxer.pools.items() if key[1] == size)
        self._budget, self._potential, self._pool = pool._budgets[-1], force_field, pool
        chosen = [atoms for atoms in molecules if slot_size(len(atoms)) == size][: pool._slots]
        self._slots = slot_graphs.Slots(
            np.zeros((pool._slots, size), np.int32),
            np.zeros(pool._slots, np.int32),
            np.zeros(pool._slots, np.float32),
            np.zeros(pool._slots, np.float32),
        )
        self._positions = np.zeros((pool._slots, size, 3), np.float32)
        for m, atoms in enumerate(chosen):
            self._slots.count[m], self._slots.numbers[m, : len(atoms)] = len(atoms), atoms.numbers
            self._positions[m, : len(atoms)] = atoms.positions - atoms.positions.mean(0)

    def milliseconds(self) -> dict[str, float]:
        """Measure processor time per molecule in ms for neighbors, model and minimizer."""
        p, minimizer = self._potential, self._pool._options["minimizer"]
        build = jax.jit(
            lambda s, x: slot_graphs.build(s, x, self._budget, p.cutoff, p.long_range_cutoff)
        )
        batch = build(self._slots, self._positions)
        model = jax.jit(lambda w, graph: evaluate(p.model, w, graph, p.energy_scale))
        count, size = len(self._slots.count), self._positions[0].size
        state = jax.tree.map(
            lambda x: jnp.array(np.array(x)), minimizer.init(count, size, jnp.float32)
        )
        step = jax.jit(minimizer.step, donate_argnums=0)
        rng, active = np.random.default_rng(0), np.ones(count, bool)
        # forces of a quadratic potential, so that the minimizer works as it does near a minimum
        stiffness = rng.uniform(1.0, 50.0, size).astype(np.float32)
        held = [rng.normal(0, 0.05, (count, size)).astype(np.float32), state, True]

        def one_step():
            forces, is_first = -stiffness * held[0], np.full(count, held[2])
            x, held[1] = step(held[1], held[0], forces, is_first, active)
            held[:] = [x, held[1], False]
            return x

        taking_part = int(batch.takes_part.sum())
        return {
            "neighbors_ms": _median_ms(lambda: build(self._slots, self._positions)) / taking_part,
            "model_ms": _median_ms(lambda: model(p.params, batch.graph)) / taking_part,
            "minimizer_ms": _median_ms(one_step) / count,
        }


def _median_ms(function) -> float:
    jax.block_until_ready(function())
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        jax.block_until_ready(function())
        times.append(time.process_time() - start)
    return 1e3 * float(np.median(times))


def ase(job: dict[str, Any]) -> dict[str, Any]:
    return relaxing.one_by_one(molecules_of(job), MLIPCalculator(potential(job)))


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Compare each step with ASE's BFGS in float64: largest deviation, and numbers of steps."""
    molecules, force_field = molecules_of(job), potential(job)
    relaxer = Relaxer(
        force_field,
        fmax=relaxing.FMAX,
        max_steps=relaxing.MAX_STEPS,
        dtype="float64",
        trajectory_every=1,
    )
    calculator = MLIPCalculator(force_field, dtype="float64")
    deviation, others, steps = [], [], []
    for number, ours in relaxer.stream(enumerate(molecules)):
        frames = _frames_of_ase(molecules[number], calculator)
        compared = min(len(frames), len(ours.frames), CHECKED_STEPS + 1)
        deviation.append(
            max(float(np.abs(ours.frames[n].positions - frames[n]).max()) for n in range(compared))
        )
        if len(frames) != len(ours.frames):
            drift = [float(np.abs(a.positions - b).max()) for a, b in zip(ours.frames, frames)]
            others.append(
                {
                    "molecule": number,
                    "ours": ours.steps,
                    "ase": len(frames) - 1,
                    "first_step_off_by_1e-3": next(
                        (n for n, d in enumerate(drift) if d > 1e-3), None
                    ),
                }
            )
        steps.append(ours.steps)
    return {
        "molecules": len(molecules),
        "same_number_of_steps": len(molecules) - len(others),
        "others": others,
        "largest_deviation": max(deviation),
        "steps": [min(steps), float(np.median(steps)), max(steps)],
    }


def _frames_of_ase(start, calculator) -> list[np.ndarray]:
    atoms, frames = start.copy(), []
    atoms.calc = calculator
    with BFGS(atoms, logfile=None) as run:
        run.attach(lambda: frames.append(atoms.positions.copy()))
        run.run(fmax=relaxing.FMAX, steps=relaxing.MAX_STEPS)
    return frames


if __name__ == "__main__":
    clock.main({"batched": batched, "ase": ase, "check": check}, ("jax", "jaxlib", "ase"))
