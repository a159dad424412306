"""What every measuring process shares: the common structures, the clocks, and the shape of a result.

Runs in the environment of each peer: NumPy, ASE and the standard library alone. A process is given one job as JSON and
prints one line of JSON; the fields of a job are those of `benchmarks/models.py: Job`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

CUTOFF = 5.0
SYSTEMS = ("small", "medium", "cluster")
LEARNING_RATE = 1e-3
ENERGY_WEIGHT, FORCE_WEIGHT = 0.01, 0.99
SHAKE = 0.005  # Å, standard deviation of what moves between two calls of a calculator


class Molecule(NamedTuple):
    """numbers (n,), positions (n, 3) in Å, energy in eV (remainder), forces (n, 3) in eV/Å."""

    numbers: np.ndarray
    positions: np.ndarray
    energy: float
    forces: np.ndarray


class Times(NamedTuple):
    """Seconds: of the first call, then of every timed call; processor seconds of those."""

    first: float
    wall: list[float]
    cpu: list[float]


def main(
    parts: dict[str, Callable[[dict[str, Any]], dict[str, Any]]], packages: Sequence[str]
) -> None:
    """Do the job of the command line and print its result with the versions of `packages`."""
    job = json.loads(sys.argv[1])
    result = parts[job["part"]](job)
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps(result | {"versions": versions, "load": os.getloadavg()[0]}))


def read_molecules(path: str, count: int | None = None) -> list[Molecule]:
    """The first `count` structures of the common work, in its order."""
    with np.load(path) as file:
        offsets = file["offsets"][: None if count is None else count + 1]
        if count is not None and len(offsets) != count + 1:
            raise ValueError(f"{path} holds {len(offsets) - 1} structures, {count} are needed")
        numbers, positions, forces, energy = (
            file[name] for name in ("numbers", "positions", "forces", "energy")
        )
    return [
        Molecule(numbers[a:b], positions[a:b], float(e), forces[a:b])
        for a, b, e in zip(offsets[:-1], offsets[1:], energy)
    ]


def read_system(path: str, name: str):
    """One of SYSTEMS as `ase.Atoms`, neutral."""
    from ase import Atoms

    with np.load(path) as file:
        return Atoms(
            numbers=file[f"{name}_numbers"],
            positions=file[f"{name}_positions"],
            info={"charge": 0.0},
        )


def batches(job: dict[str, Any]) -> list[list[Molecule]]:
    """The first structures, in lists of the batch size."""
    size, count = job["batch"], job["batches"]
    molecules = read_molecules(job["work"], size * count)
    return [molecules[i * size : (i + 1) * size] for i in range(count)]


def edges(positions: np.ndarray, cutoff: float = CUTOFF) -> tuple[np.ndarray, np.ndarray]:
    """Receivers and senders of all directed pairs within the cutoff, (E,) int64, sorted by receiver."""
    squares = ((positions[:, None] - positions[None]) ** 2).sum(-1)
    np.fill_diagonal(squares, np.inf)
    return np.nonzero(squares < cutoff**2)


def time_steps(
    step: Callable[[Any], Any],
    data: Sequence[Any],
    seconds: float,
    wait: Callable[[], None] = lambda: None,
    each: bool = True,
) -> Times:
    """Time `step` over all of `data`, again and again for so many seconds, once at least.

    Args:
      wait: Returns when the device has done all that was asked of it.
      each: Wait after each step; else after each pass over the data, so that a device has work queued, and a step's
        time is the mean of its pass.
    """
    start = time.perf_counter()
    step(data[0])
    wait()
    first = time.perf_counter() - start
    step(data[0])
    wait()
    wall, cpu, stop = [], [], time.perf_counter() + seconds
    groups = [[item] for item in data] if each else [list(data)]
    while not wall or time.perf_counter() < stop:
        for group in groups:
            begin, begin_cpu = time.perf_counter(), time.process_time()
            for item in group:
                step(item)
            wait()
            wall += [(time.perf_counter() - begin) / len(group)] * len(group)
            cpu += [(time.process_time() - begin_cpu) / len(group)] * len(group)
    return Times(first, wall, cpu)


def training_result(
    times: Times, real: Sequence[tuple[int, int, int]], parameters: int, **more
) -> dict[str, Any]:
    """Result of `train`; `real` are structures, atoms and directed edges of each batch, padding not counted."""
    structures = float(np.mean([r[0] for r in real]))
    middle = float(np.median(times.wall))
    # of the median step: a stall of the machine would weigh on a mean
    return {
        "structures_per_s": structures / middle,
        "structures_per_cpu_s": structures / float(np.median(times.cpu)),
        "step_ms": spread_ms(times.wall),
        "compile_s": max(times.first - middle, 0.0),
        "peak_mib": peak_memory(),
        "parameters": int(parameters),
        "steps": len(times.wall),
        "real_per_batch": dict(
            zip(("structures", "atoms", "edges"), np.mean(real, axis=0).tolist())
        ),
    } | more


def real_sizes(groups: Sequence[Sequence[Molecule]]) -> list[tuple[int, int, int]]:
    """Structures, atoms and directed edges of each list of molecules."""
    return [
        (len(g), sum(len(m.numbers) for m in g), sum(len(edges(m.positions)[0]) for m in g))
        for g in groups
    ]


def latency(job: dict[str, Any], make: Callable[[Any], Any]) -> dict[str, Any]:
    """Time energy and forces of one structure through an ASE calculator; the atoms move a little before each call.

    Args:
      make: Gives the calculator for an `ase.Atoms`.
    """
    from ase.calculators.calculator import all_changes

    systems = {}
    for name in job["systems"]:
        atoms = read_system(job["work"], name)
        rng, rest, calculator = np.random.default_rng(0), atoms.get_positions(), make(atoms)

        def call(_, atoms=atoms, rng=rng, rest=rest, calculator=calculator):
            atoms.set_positions(rest + rng.normal(0, SHAKE, rest.shape))
            calculator.calculate(atoms, ["energy", "forces"], all_changes)

        times = time_steps(call, [0], job["seconds"])
        if not np.isfinite(calculator.results["forces"]).all():
            raise ValueError(f"{name}: the forces are not finite")
        systems[name] = {
            "atoms": len(atoms),
            "ms": spread_ms(times.wall),
            "cpu_ms": 1e3 * float(np.median(times.cpu)),
            "first_s": times.first,
        }
    return {"systems": systems, "peak_mib": peak_memory()}


def spread_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest in ms."""
    low, middle, high = 1e3 * np.percentile(seconds, [0, 50, 100])
    return {"median": middle, "lowest": low, "highest": high}


def peak_memory() -> float:
    """Largest resident memory of this process so far in MiB: the kernel's own, not getrusage's, which starts with what
    the parent process held."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def xla_cost(compiled) -> dict[str, Any]:
    """FLOPs and bytes by XLA's own count, fusions counted once, of a compiled function."""
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return {
        "flops": cost.get("flops"),
        "bytes": cost.get("bytes accessed"),
        "counted_by": "XLA, after fusion",
    }
