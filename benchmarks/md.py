"""Molecular dynamics: the on-device loop against ASE's and jax-md's, with one force field.

    taskset -c 1 python benchmarks/md.py --force_field=runs/spice
    taskset -c 1 python benchmarks/md.py --force_field=runs/spice --sizes=20 --replicas=32
    taskset -c 1 python benchmarks/md.py --model=painn --features=16,32,64,128

The systems are paracetamol (20 atoms), a glyceride (61 atoms), and 50 separate molecules of
paracetamol (1000 atoms), all non-periodic, at constant energy in float32 with steps of 0.5 fs,
starting at 300 K. The loops are measured alternately, without compilation. jax-md is measured if it
is installed (`pip install jax-md`), with its own integrator and neighbor list, a skin of the same
width, and our force field.

With --model, untrained models of several widths show how the ratio to ASE's loop depends on the
cost of the model. These simulations have no physical meaning: the models do not hold molecules
together, so only a few steps at a temperature close to zero are performed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine
from mlip_jax import MLIPCalculator, MolecularDynamics, models, relax
from mlip_jax.datasets.smiles.embedding import EmbeddingOptions, embed_entry
from mlip_jax.datasets.smiles.entries import Entry
from mlip_jax.importers import load_force_field
from mlip_jax.potential import Potential, evaluate, example_graph
from mlip_jax.simulation.dynamics import settings

try:
    import jax_md
except ImportError:
    jax_md = None

PARACETAMOL = "CC(=O)Nc1ccc(O)cc1"
GLYCERIDE = "CCCCCCCCCCCCCCCC(=O)OCC(O)CO"  # only H, C and O
SPACING = 11.0  # Å between the molecules of the 1000 atoms


def start(size: int, potential, relaxed: bool = True) -> Atoms:
    """Return a structure with about `size` atoms, relaxed or as embedded by RDKit."""
    if size == 1000:
        one, rng = start(20, potential, relaxed), np.random.default_rng(0)
        centers = SPACING * np.stack(np.unravel_index(np.arange(50), (4, 4, 4)), 1)  # (50, 3)
        copies = []
        for center in centers:
            copy = one.copy()
            copy.euler_rotate(*rng.uniform(0, 360, 3), center="COM")
            copy.positions += center - copy.get_center_of_mass()
            copies.append(copy)
        return sum(copies[1:], copies[0])
    smiles = PARACETAMOL if size == 20 else GLYCERIDE
    (record,) = embed_entry((Entry(0, "", smiles, smiles), EmbeddingOptions(1, True, 0)))
    if not relaxed:
        return record.atoms
    (result,) = relax([record.atoms], potential, max_steps=300)
    return result.atoms


def untrained(name: str, features: int) -> Potential:
    """Return a force field with random parameters. Its energy is zero but as costly to compute."""
    model = models.create(name, num_features=features)
    return Potential(
        model,
        model.init(jax.random.key(0), example_graph()),
        cutoff=model.cutoff,
        reference_energies=np.zeros(119),
        energy_scale=1.0,
        elements=tuple(range(1, 90)),
    )


class Device:
    """Loop on the device."""

    def __init__(self, atoms: Atoms, potential, replicas: int = 1, temperature: float = 300.0):
        self.dynamics = MolecularDynamics(
            atoms,
            potential,
            replicas=replicas,
            ensemble="nve",
            temperature=temperature,
            timestep=0.5,
            record_every=20,
            frame_every=100,
        )

    def steps(self, count: int) -> None:
        """Perform `count` steps."""
        for _ in self.dynamics.stream(count):
            pass
        if self.dynamics.broken:
            raise RuntimeError(f"the dynamics broke: {self.dynamics.broken}")


class Ase:
    """ASE's loop with our calculator, which rebuilds the neighbor list at each step."""

    def __init__(self, atoms: Atoms, potential):
        self._atoms = atoms.copy()
        self._atoms.calc = MLIPCalculator(potential)
        self._run = VelocityVerlet(self._atoms, 0.5 * units.fs)

    def steps(self, count: int) -> None:
        """Perform `count` steps."""
        self._run.run(count)


class JaxMd:
    """jax-md's velocity Verlet and neighbor list, with the energy of our force field."""

    def __init__(self, atoms: Atoms, potential):
        displacement, shift = jax_md.space.free()
        self._find = jax_md.partition.neighbor_list(
            displacement,
            box=1e3,
            r_cutoff=potential.cutoff,
            dr_threshold=settings.Settings().skin,
            format=jax_md.partition.OrderedSparse,
            disable_cell_list=True,
        )
        # the additional last atom belongs to the empty entries of a list
        numbers = jnp.append(jnp.asarray(atoms.numbers, jnp.int32), 0)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), potential.params)

        def energy(positions, neighbor):
            graph = open_graph(
                jnp.concatenate([positions, jnp.zeros((1, 3))]), numbers, neighbor.idx
            )
            return evaluate(
                potential.model, params, graph, potential.energy_scale, with_forces=False
            ).energy[0]

        init, self._apply = jax_md.simulate.nve(energy, shift, 0.5 * units.fs)
        positions = jnp.asarray(atoms.positions, jnp.float32)
        self._neighbors = self._find.allocate(positions)
        self._state = init(
            jax.random.key(0),
            positions,
            kT=0.0,
            mass=jnp.asarray(atoms.get_masses(), jnp.float32),
            neighbor=self._neighbors,
        )
        self._state = self._state.set(momentum=jnp.asarray(atoms.get_momenta(), jnp.float32))
        self._run = jax.jit(self._many)

    def _many(self, state, neighbors, count):
        def step(_, carry):
            state, neighbors = carry
            state = self._apply(state, neighbor=neighbors)
            return state, neighbors.update(state.position)

        return jax.lax.fori_loop(0, count, step, (state, neighbors))

    def steps(self, count: int) -> None:
        """Perform `count` steps."""
        state, neighbors = jax.block_until_ready(self._run(self._state, self._neighbors, count))
        if neighbors.did_buffer_overflow:
            self._neighbors = self._find.allocate(self._state.position)
            self.steps(count)
            return
        self._state, self._neighbors = state, neighbors


def open_graph(positions, numbers, pairs) -> jraph.GraphsTuple:
    """Return a graph of jax-md's pairs (2, P).

    Empty entries of the list contain the number of atoms, which is the index of the padding atom.
    """
    forward = jnp.concatenate([pairs[0], pairs[1]])
    num, edges = len(numbers), len(forward)
    real = 2 * (pairs[0] < num - 1).sum()
    return jraph.GraphsTuple(
        nodes={"positions": positions, "numbers": numbers},
        edges={"pair_order": jnp.arange(edges)},
        receivers=forward,
        senders=jnp.concatenate([pairs[1], pairs[0]]),
        globals={"charge": jnp.zeros(2, positions.dtype)},
        n_node=jnp.array([num - 1, 1]),
        n_edge=jnp.stack([real, edges - real]),
    )


def rate(engine, seconds: float) -> float:
    """Return steps per second, measured for about `seconds` seconds."""
    engine.steps(30)
    begin = time.perf_counter()
    engine.steps(10)
    count = max(10, int(10 * seconds / (time.perf_counter() - begin)))
    begin = time.perf_counter()
    engine.steps(count)
    return count / (time.perf_counter() - begin)


def compare(size: int, potential, args, features: int | None = None) -> None:
    """Print a row of the table; `features` is the width of an untrained model."""
    atoms = start(size, potential, relaxed=features is None)
    device = Device(atoms, potential, temperature=300.0 if features is None else 1e-3)
    engines = [device] + [
        engine(device.dynamics.molecules[0], potential)
        for engine in (Ase, *([JaxMd] if jax_md else []))
    ]
    rates = np.array(
        [[rate(engine, args.seconds) for engine in engines] for _ in range(args.rounds)]
    ).T
    ratios = [rates[0] / rates[n] for n in range(1, len(engines))]
    name = len(atoms) if features is None else f"{len(atoms)}, {features} features"
    cells = [name, *map(machine.spread, [*rates, *ratios])]
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    """Measure the loops and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--force_field")
    chosen.add_argument("--model", help="name of the untrained models, with widths --features")
    parser.add_argument("--features", default="16,32,64,128")
    parser.add_argument("--sizes", default=None, help="default: 20,60,1000, or 20 with --model")
    parser.add_argument(
        "--replicas", type=int, default=16, help="parallel replicas of the smallest molecule"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of a measurement")
    args = parser.parse_args()
    sizes = [
        int(size) for size in (args.sizes or ("20" if args.model else "20,60,1000")).split(",")
    ]
    print(machine.describe(["jax", "ase", "numpy", "jax-md"]))
    columns = [
        "atoms",
        "on-device loop, steps/s",
        "ASE's loop, steps/s",
        *(["jax-md, steps/s"] if jax_md else []),
        "ratio to ASE",
        *(["ratio to jax-md"] if jax_md else []),
    ]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    if args.model:
        for features in map(int, args.features.split(",")):
            for size in sizes:
                compare(size, untrained(args.model, features), args, features)
        return
    potential = load_force_field(args.force_field)
    for size in sizes:
        compare(size, potential, args)
    if args.replicas > 1:
        many = Device(start(sizes[0], potential), potential, args.replicas)
        rates = [rate(many, args.seconds) * args.replicas for _ in range(args.rounds)]
        print(
            f"{args.replicas} molecules of {sizes[0]} atoms in parallel: {machine.spread(rates)} "
            "steps/s in total"
        )


if __name__ == "__main__":
    main()
