"""Drift of the total energy of molecules at constant energy, in float32.

    python benchmarks/drift.py --force_field=DIR --picoseconds=100

Molecules of --smiles are relaxed and heated by 5 ps of Langevin dynamics. Then they move at
constant energy. The drift is the slope of the total energy, the fluctuation its standard deviation.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mlip_jax import MolecularDynamics, relax
from mlip_jax.datasets.smiles.embedding import EmbeddingOptions, Entry, embed_entry
from mlip_jax.potential import Potential

_CHUNK, _RECORD_EVERY = 10_000, 100  # steps


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--force_field", required=True, help="workdir of a training run")
    parser.add_argument(
        "--smiles", default="CCO,CC(C)=O,C[C@H](N)C(=O)O", help="separated by commas"
    )
    parser.add_argument("--picoseconds", type=float, default=100.0)
    parser.add_argument("--timestep", type=float, default=0.5, help="fs")
    parser.add_argument("--temperature", type=float, default=300.0, help="K")
    a = parser.parse_args()
    smiles, force_field = a.smiles.split(","), Potential.load(a.force_field)
    starts = [
        embed_entry((Entry(i, s, s, s), EmbeddingOptions()))[0].atoms for i, s in enumerate(smiles)
    ]
    molecules = [result.atoms for result in relax(starts, force_field)]
    warm = MolecularDynamics(
        molecules,
        force_field,
        ensemble="langevin",
        temperature=a.temperature,
        timestep=a.timestep,
        record_every=_RECORD_EVERY,
        frame_every=1_000,
        seed=1,
    )
    molecules = [t.frames[-1] for t in warm.run(round(5_000 / a.timestep / 1_000) * 1_000)]
    dynamics = MolecularDynamics(
        molecules,
        force_field,
        ensemble="nve",
        timestep=a.timestep,
        record_every=_RECORD_EVERY,
        frame_every=0,
    )
    energies, temperatures = ([[] for _ in smiles] for _ in range(2))
    steps = round(1e3 * a.picoseconds / a.timestep)
    while dynamics.step < steps:
        for m, trajectory in enumerate(dynamics.run(min(_CHUNK, steps - dynamics.step))):
            energies[m] += (trajectory.thermo.potential + trajectory.thermo.kinetic).tolist()
            temperatures[m] += trajectory.thermo.temperature.tolist()
        print_drift(smiles, molecules, energies, temperatures, dynamics, a.timestep)


def print_drift(smiles, molecules, energies, temperatures, dynamics, timestep):
    picoseconds = 1e-3 * timestep * dynamics.step
    print(
        f"{picoseconds:.1f} ps, {dynamics.steps_per_second:.0f} steps/s, "
        f"broken: {dynamics.broken or 'none'}"
    )
    for name, atoms, energy, temperature in zip(smiles, molecules, energies, temperatures):
        per_atom = 1e3 * np.array(energy) / len(atoms)
        slope = np.polyfit(np.linspace(0.0, picoseconds, len(per_atom)), per_atom, 1)[0]
        print(
            f"  {name}: drift {slope:+.4f} meV/atom/ps, fluctuation {per_atom.std():.3f} meV/atom, "
            f"{np.mean(temperature):.0f} K",
            flush=True,
        )


if __name__ == "__main__":
    main()
