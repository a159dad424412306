"""Molecular dynamics: the loop on the device against ASE's loop with our calculator, with one force field.

    taskset -c 1 python benchmarks/md.py --force_field=runs/spice
    taskset -c 1 python benchmarks/md.py --force_field=runs/spice --sizes=20 --replicas=32 --rounds=5

Paracetamol (20 atoms), a glyceride (61 atoms), and 50 molecules of paracetamol beside each other (1000 atoms), all
open, at constant energy in float32 with steps of 0.5 fs, from 300 K. Rounds are interleaved; compiling is part of no
rate.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine
from mlip_jax import MLIPCalculator, MolecularDynamics, relax
from mlip_jax.datasets.embedding import Options, make
from mlip_jax.datasets.molecule_entries import Entry
from mlip_jax.importers import load_force_field

PARACETAMOL = "CC(=O)Nc1ccc(O)cc1"
GLYCERIDE = "CCCCCCCCCCCCCCCC(=O)OCC(O)CO"  # of H, C and O alone
SPACING = 11.0  # Å between the molecules of the 1000 atoms


def start(size: int, potential) -> Atoms:
    """A relaxed structure of about this size."""
    if size == 1000:
        one, rng = start(20, potential), np.random.default_rng(0)
        places = SPACING * np.stack(np.unravel_index(np.arange(50), (4, 4, 4)), 1)
        parts = []
        for place in places:
            part = one.copy()
            part.euler_rotate(*rng.uniform(0, 360, 3), center="COM")
            part.positions += place - part.get_center_of_mass()
            parts.append(part)
        return sum(parts[1:], parts[0])
    smiles = PARACETAMOL if size == 20 else GLYCERIDE
    record, = make((Entry(0, "", smiles, smiles), Options(1, True, 0)))
    found, = relax([record.atoms], potential, max_steps=300)
    return found.atoms


class Device:
    """The loop on the device."""

    def __init__(self, atoms: Atoms, potential, replicas: int = 1):
        self.dynamics = MolecularDynamics(atoms, potential, replicas=replicas, ensemble="nve", temperature=300.0,
                                          timestep=0.5, record_every=20, frame_every=100)

    def steps(self, count: int) -> None:
        """Make so many."""
        for _ in self.dynamics.stream(count):
            pass
        if self.dynamics.broken:
            raise RuntimeError(f"the dynamics broke: {self.dynamics.broken}")


class Ase:
    """ASE's loop with our calculator, which finds neighbours anew at each step."""

    def __init__(self, atoms: Atoms, potential):
        self._atoms = atoms.copy()
        self._atoms.calc = MLIPCalculator(potential)
        self._run = VelocityVerlet(self._atoms, 0.5 * units.fs)

    def steps(self, count: int) -> None:
        """Make so many."""
        self._run.run(count)


def rate(engine, seconds: float) -> float:
    """Steps in a second, of as many as take about so long."""
    engine.steps(30)
    begin = time.perf_counter()
    engine.steps(10)
    count = max(10, int(10 * seconds / (time.perf_counter() - begin)))
    begin = time.perf_counter()
    engine.steps(count)
    return count / (time.perf_counter() - begin)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--force_field", required=True)
    parser.add_argument("--sizes", default="20,60,1000")
    parser.add_argument("--replicas", type=int, default=16, help="of the smallest molecule, beside each other")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a measurement")
    args = parser.parse_args()
    potential = load_force_field(args.force_field)
    print(machine.describe(["jax", "ase", "numpy"]))
    print("| atoms | loop on the device, steps/s | ASE's loop, steps/s | ratio |\n|---|---|---|---|")
    for size in map(int, args.sizes.split(",")):
        atoms = start(size, potential)
        device = Device(atoms, potential)
        ase = Ase(device.dynamics.molecules[0], potential)
        rates = np.array([[rate(engine, args.seconds) for engine in (device, ase)] for _ in range(args.rounds)])
        ratio = rates[:, 0] / rates[:, 1]
        print(f"| {len(atoms)} | {machine.spread(rates[:, 0])} | {machine.spread(rates[:, 1])} | "
              f"{machine.spread(ratio)} |", flush=True)
    if args.replicas > 1:
        size = int(args.sizes.split(",")[0])
        atoms = start(size, potential)
        many = Device(atoms, potential, args.replicas)
        rates = [rate(many, args.seconds) * args.replicas for _ in range(args.rounds)]
        print(f"| {args.replicas} × {len(atoms)} | {machine.spread(rates)} in all | | |")


if __name__ == "__main__":
    main()
