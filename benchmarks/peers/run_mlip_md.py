"""Molecular dynamics with mlip: its on-device loop (jax-md's) against ASE's with its calculator.

    taskset -c 1 python benchmarks/peers/run_mlip_md.py MOLECULE.xyz --features=16,128

This script runs in an environment with mlip and jax-md (`pip install mlip jax-md`). The models are
untrained and do not hold molecules together, so the time step is 0.01 fs; constant energy, cutoff 5
Å. Both loops are measured alternately. Rates exclude compilation and episodes that are repeated
because a capacity was exceeded.
"""

import argparse
import logging
import time

import ase.io
import numpy as np
from ase import units
from ase.md.verlet import VelocityVerlet
from mlip.data.dataset_info import DatasetInfo
from mlip.models import ForceField, Mace, Visnet
from mlip.simulation.ase.mlip_ase_calculator import MLIPForceFieldASECalculator
from mlip.simulation.enums import MDIntegrator
from mlip.simulation.jax_md import JaxMDSimulationEngine

NETWORKS = {
    "visnet": (Visnet, dict(num_layers=3, l_max=2)),
    "mace": (Mace, dict(num_layers=2, l_max=3, node_symmetry=1, correlation=2)),
}
TIMESTEP = 0.01  # fs
EPISODE = 200  # steps
EDGE_CAPACITY_FACTOR = 1.25


class Episodes:
    """Times of the episodes of one run."""

    def __init__(self, atoms, force_field, count):
        config = JaxMDSimulationEngine.Config(
            num_steps=EPISODE * count,
            num_episodes=count,
            timestep_fs=TIMESTEP,
            snapshot_interval=EPISODE,
            temperature_kelvin=1e-3,
            md_integrator=MDIntegrator.NVE_VELOCITY_VERLET,
            edge_capacity_multiplier=EDGE_CAPACITY_FACTOR,
        )
        self.ends = [time.perf_counter()]
        engine = JaxMDSimulationEngine(atoms, force_field, config)
        engine.attach_logger(lambda state: self.ends.append(time.perf_counter()))
        engine.run()

    def rate(self):
        """Return steps per second, without the first two episodes, which compile."""
        return EPISODE / float(np.median(np.diff(self.ends)[2:]))


def rate_of_ase(atoms, force_field, seconds):
    atoms = atoms.copy()
    atoms.calc = MLIPForceFieldASECalculator(atoms, EDGE_CAPACITY_FACTOR, force_field)
    dynamics = VelocityVerlet(atoms, TIMESTEP * units.fs)
    dynamics.run(20)
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        dynamics.run(10)
        steps += 10
    return steps / (time.perf_counter() - begin)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("molecule")
    parser.add_argument("--model", choices=NETWORKS, default="visnet")
    parser.add_argument("--features", default="16,128")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of ASE's loop")
    parser.add_argument(
        "--episodes", type=int, default=8, help=f"number of episodes of {EPISODE} steps"
    )
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    atoms = ase.io.read(args.molecule)
    info = DatasetInfo(
        atomic_energies_map=dict.fromkeys(range(1, 18), 0.0),
        graph_cutoff_angstrom=5.0,
        avg_num_neighbors=15.0,
        avg_r_min_angstrom=1.0,
    )
    network, options = NETWORKS[args.model]
    for features in map(int, args.features.split(",")):
        force_field = ForceField.from_mlip_network(
            network(network.Config(num_channels=features, num_rbf=20, **options), info)
        )
        rates = np.array(
            [
                (
                    Episodes(atoms, force_field, args.episodes).rate(),
                    rate_of_ase(atoms, force_field, args.seconds),
                )
                for _ in range(args.rounds)
            ]
        )
        loop, other = np.median(rates, axis=0)
        ratios = rates[:, 0] / rates[:, 1]
        print(
            f"{args.model}, {features} features, {len(atoms)} atoms: mlip's loop {loop:.4g} "
            f"steps/s, ASE's loop with its calculator {other:.4g}, ratio {np.median(ratios):.2f} "
            f"({ratios.min():.2f} to {ratios.max():.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
