"""What processes that relax molecules share: the common starts, ASE one by one, and the shape of a result.

Runs in the environment of each peer: NumPy, ASE and the standard library alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import measure
import numpy as np

FMAX, MAX_STEPS = 0.05, 500
# Morse potential of all pairs, which holds molecules together as drops: cheap, and smooth.
MORSE = {"epsilon": 0.4, "r0": 2.5, "alpha": 1.6, "cutoff": 40.0}  # eV, Å, 1/Å, Å
MORSE_ATOMS = 40


def starts(job: dict[str, Any]) -> list:
    """The first molecules of the common starts as `ase.Atoms`, neutral."""
    from ase import Atoms

    with np.load(job["work"]) as file:
        offsets, numbers, positions = (file[name] for name in ("offsets", "numbers", "positions"))
    return [
        Atoms(numbers=numbers[a:b], positions=positions[a:b], info={"charge": 0.0})
        for a, b in zip(offsets[: job["batch"]], offsets[1:])
    ]


def drops(count: int) -> list:
    """So many drops of MORSE_ATOMS for the Morse potential: atoms at random, none closer than 1.8 Å."""
    from ase import Atoms

    found = []
    for number in range(count):
        rng, positions = np.random.default_rng(number), np.zeros((1, 3))
        while len(positions) < MORSE_ATOMS:
            new = rng.uniform(-4.5, 4.5, 3)
            if ((positions - new) ** 2).sum(1).min() > 1.8**2:
                positions = np.vstack([positions, new])
        found.append(Atoms(numbers=[18] * MORSE_ATOMS, positions=positions, info={"charge": 0.0}))
    return found


def one_by_one(molecules: Sequence, calculator) -> dict[str, Any]:
    """ASE's BFGS on one molecule after another; the calculator has seen them before the clock starts."""
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
    """A function whose time is added up in `seconds`."""

    def __init__(self, function):
        self._function, self.seconds = function, 0.0

    def __call__(self, *args, **kwargs):
        start = time.perf_counter()
        out = self._function(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return out


class Begin:
    """Both clocks, now."""

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
    """Result of a relaxation that began at `begin` and has just ended.

    Args:
      moves: Of all molecules together; a molecule-step is an evaluation, and there is one more of each molecule.
      model_seconds: Of wall time inside the model; None if not known.
      steps: Of each molecule.
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
