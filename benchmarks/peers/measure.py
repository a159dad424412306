"""Functions that all measuring processes share: workload, clocks, and format of the results.

This file runs in the environments of other packages and only imports NumPy, ASE and the standard
library. A process receives one job as JSON (`benchmarks/models.py: Job`) and prints one line of
JSON.
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
SHAKE = 0.005  # Å, standard deviation of the displacements before each call of a calculator


class Molecule(NamedTuple):
    """Molecule with labels.

    Attributes:
      numbers: Atomic numbers, (n,).
      positions: Positions in Å, (n, 3).
      energy: Energy minus a linear fit to the composition in eV.
      forces: Forces in eV/Å, (n, 3).
    """

    numbers: np.ndarray
    positions: np.ndarray
    energy: float
    forces: np.ndarray


class Times(NamedTuple):
    """Times in seconds.

    Attributes:
      first: Wall time of the first call.
      first_cpu: Processor time of the first call.
      wall: Wall time of each timed call.
      cpu: Processor time of each timed call.
    """

    first: float
    first_cpu: float
    wall: list[float]
    cpu: list[float]


def main(
    parts: dict[str, Callable[[dict[str, Any]], dict[str, Any]]], packages: Sequence[str]
) -> None:
    """Run the job of the command line and print its result with the versions of `packages`."""
    job = json.loads(sys.argv[1])
    result = parts[job["part"]](job)
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps(result | {"versions": versions, "load": os.getloadavg()[0]}))


def read_molecules(path: str, count: int | None = None) -> list[Molecule]:
    """Return the first `count` structures of the workload."""
    with np.load(path) as file:
        offsets = file["offsets"][: None if count is None else count + 1]
        if count is not None and len(offsets) != count + 1:
            raise ValueError(f"{path}: {len(offsets) - 1} structures, but {count} are required")
        numbers, positions, forces, energy = (
            file[name] for name in ("numbers", "positions", "forces", "energy")
        )
    return [
        Molecule(numbers[a:b], positions[a:b], float(e), forces[a:b])
        for a, b, e in zip(offsets[:-1], offsets[1:], energy)
    ]


def read_system(path: str, name: str):
    """Return one of SYSTEMS as neutral `ase.Atoms`."""
    from ase import Atoms

    with np.load(path) as file:
        return Atoms(
            numbers=file[f"{name}_numbers"],
            positions=file[f"{name}_positions"],
            info={"charge": 0.0},
        )


def batches(job: dict[str, Any]) -> list[list[Molecule]]:
    """Return the first structures in lists of the batch size."""
    size, count = job["batch"], job["batches"]
    molecules = read_molecules(job["work"], size * count)
    return [molecules[i * size : (i + 1) * size] for i in range(count)]


def edges(positions: np.ndarray, cutoff: float = CUTOFF) -> tuple[np.ndarray, np.ndarray]:
    """Return receivers and senders of directed pairs within the cutoff, (E,), by receiver."""
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
    """Time `step` on all of `data`, repeatedly for at least `seconds` seconds.

    Args:
      step: Function to time.
      data: Arguments of the calls.
      seconds: Minimum duration in seconds; there is at least one pass over the data.
      wait: Function that returns when the device has finished all work.
      each: Whether to wait after each step. Otherwise, wait after each pass over the data, so that
        work is queued on the device; the time of a step is then the mean over its pass.
    """
    start, start_cpu = time.perf_counter(), time.process_time()
    step(data[0])
    wait()
    first, first_cpu = time.perf_counter() - start, time.process_time() - start_cpu
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
    return Times(first, first_cpu, wall, cpu)


def training_result(
    times: Times, real: Sequence[tuple[int, int, int]], parameters: int, **more
) -> dict[str, Any]:
    """Return the result of part `train`.

    Args:
      times: Times of the steps.
      real: Numbers of structures, atoms and directed edges of each batch, without padding.
      parameters: Number of parameters.
      **more: Further entries of the result.
    """
    structures = float(np.mean([r[0] for r in real]))
    # Use the median step, because a stall of the machine would dominate the mean.
    middle = float(np.median(times.wall))
    return {
        "structures_per_s": structures / middle,
        "structures_per_cpu_s": structures / float(np.median(times.cpu)),
        "step_ms": spread_ms(times.wall),
        "compile_s": max(times.first - middle, 0.0),
        "compile_cpu_s": max(times.first_cpu - float(np.median(times.cpu)), 0.0),
        "peak_mib": peak_memory(),
        "parameters": int(parameters),
        "steps": len(times.wall),
        "real_per_batch": dict(
            zip(("structures", "atoms", "edges"), np.mean(real, axis=0).tolist())
        ),
    } | more


def real_sizes(groups: Sequence[Sequence[Molecule]]) -> list[tuple[int, int, int]]:
    """Return the numbers of structures, atoms and directed edges of each list of molecules."""
    return [
        (len(g), sum(len(m.numbers) for m in g), sum(len(edges(m.positions)[0]) for m in g))
        for g in groups
    ]


def latency(job: dict[str, Any], make: Callable[[Any], Any]) -> dict[str, Any]:
    """Time energy and forces of one structure with an ASE calculator.

    The atoms are slightly displaced before each call.

    Args:
      job: Job of part latency.
      make: Function that returns the calculator for an `ase.Atoms`.
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
    """Return median, lowest and highest in ms."""
    low, middle, high = 1e3 * np.percentile(seconds, [0, 50, 100])
    return {"median": middle, "lowest": low, "highest": high}


def peak_memory() -> float:
    """Return the peak resident memory of this process in MiB.

    The value is the kernel's. That of getrusage includes memory of the parent process at the start.
    """
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def xla_cost(compiled) -> dict[str, Any]:
    """Return the FLOPs and bytes of a compiled function, as counted by XLA after fusion."""
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return {
        "flops": cost.get("flops"),
        "bytes": cost.get("bytes accessed"),
        "counted_by": "XLA, after fusion",
    }
