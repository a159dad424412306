"""Functions that all relaxing processes share: start geometries, ASE one by one, results.

This file runs in the environments of other packages and only imports NumPy, ASE and the standard
library.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import measure
import numpy as np

FMAX, MAX_STEPS = 0.05, 500
# Morse potential between all pairs, a cheap and smooth model of a drop.
MORSE = {"epsilon": 0.4, "r0": 2.5, "alpha": 1.6, "cutoff": 40.0}  # eV, Å, 1/Å, Å
MORSE_ATOMS = 40


def starts(job: dict[str, Any]) -> list:
    """Return the first start geometries as neutral `ase.Atoms`."""
    from ase import Atoms

    with np.load(job["work"]) as file:
        offsets, numbers, positions = (file[name] for name in ("offsets", "numbers", "positions"))
    return [
        Atoms(numbers=numbers[a:b], positions=positions[a:b], info={"charge": 0.0})
        for a, b in zip(offsets[: job["batch"]], offsets[1:])
    ]


def drops(count: int) -> list:
    """Return `count` drops of MORSE_ATOMS random atoms with distances above 1.8 Å."""
    from ase import Atoms

    atoms = []
    for number in range(count):
        rng, positions = np.random.default_rng(number), np.zeros((1, 3))
        while len(positions) < MORSE_ATOMS:
            new = rng.uniform(-4.5, 4.5, 3)
            if ((positions - new) ** 2).sum(1).min() > 1.8**2:
                positions = np.vstack([positions, new])
        atoms.append(Atoms(numbers=[18] * MORSE_ATOMS, positions=positions, info={"charge": 0.0}))
    return atoms


def one_by_one(molecules: Sequence, calculator) -> dict[str, Any]:
    """Relax the molecules one by one with ASE's BFGS, after a first evaluation of each."""
    from ase.optimize import BFGS

    calls = Clocked(calculator.calculate)
    calculator.calculate = calls
    for atoms in molecules:
        atoms.calc = calculator
        atoms.get_forces()
    calls.seconds, steps, converged, begin = 0.0, [], 0, Begin()
    for atoms in molecules:
        calculator.reset()
        optimizer = BFGS(atoms, logfile=None)
        converged += bool(optimizer.run(fmax=FMAX, steps=MAX_STEPS))
        steps.append(optimizer.nsteps)
    return result(begin, len(molecules), sum(steps), converged, calls.seconds, steps=steps)


class Clocked:
    """Function whose total wall time is added up in `seconds`."""

    def __init__(self, function):
        self._function, self.seconds = function, 0.0

    def __call__(self, *args, **kwargs):
        start = time.perf_counter()
        out = self._function(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return out


class Begin:
    """Wall time and processor time at the start of a measurement."""

    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()


def result(
    begin: Begin,
    molecules: int,
    moves: int,
    converged: int,
    model_seconds: float | None,
    *,
    steps: Sequence[int] = (),
    **more,
) -> dict[str, Any]:
    """Return the result of relaxations that have just ended.

    Args:
      begin: Start of the measurement.
      molecules: Number of molecules.
      moves: Total number of steps. The number of evaluations (molecule-steps) is larger by one per
        molecule.
      converged: Number of converged molecules.
      model_seconds: Wall time of the model in seconds, None if unknown.
      steps: Number of steps per molecule.
      **more: Further entries of the result.
    """
    wall, cpu = time.perf_counter() - begin.wall, time.process_time() - begin.cpu
    spread = (
        dict(zip(("lowest", "median", "highest"), np.percentile(steps, [0, 50, 100]).tolist()))
        if steps
        else None
    )
    return {
        "molecules": molecules,
        "seconds": wall,
        "cpu_seconds": cpu,
        "molecules_per_s": molecules / wall,
        "molecules_per_cpu_s": molecules / cpu,
        "cpu_ms_per_step": 1e3 * cpu / (moves + molecules),
        "molecule_steps": moves + molecules,
        "converged": converged,
        "steps": spread,
        "model_share": None if model_seconds is None else model_seconds / wall,
        "peak_mib": measure.peak_memory(),
    } | more
