"""Three structures, and the file with the results of a program for them.

Each script in this folder runs in the environment of one program. It writes models as the program
saves them, and the energies (eV), forces (eV/Å) and stress (eV/Å³) of each model as .npz.
"""

from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule


def structures(symbols=("H", "C", "O")):
    """Return a molecule, a crystal smaller than the cutoff, and a cluster of all elements."""
    rng = np.random.default_rng(3)
    ethanol = molecule("CH3CH2OH")
    ethanol.positions += rng.normal(0.0, 0.05, ethanol.positions.shape)
    crystal = bulk(symbols[1], "diamond", a=3.7) * (1, 1, 2)
    crystal.numbers[::2] = Atoms(symbols[2]).numbers[0]
    crystal.positions += rng.normal(0.0, 0.08, crystal.positions.shape)
    crystal.set_cell(crystal.cell @ (np.eye(3) + rng.normal(0.0, 0.02, (3, 3))), scale_atoms=True)
    grid = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1]), -1).reshape(-1, 3) * 1.5
    cluster = Atoms([symbols[k % len(symbols)] for k in range(8)], grid)
    cluster.positions += rng.normal(0.0, 0.1, (8, 3))
    return [ethanol, crystal, cluster]


def write_results(path, results, **more):
    """Write the structures and (energy, forces, stress or None) of each.

    Args:
      path: Path of the .npz file.
      results: One tuple for each of `structures`.
      **more: Further arrays.
    """
    arrays = dict(more)
    for k, (atoms, (energy, forces, stress)) in enumerate(results):
        arrays |= {
            f"{k}/numbers": atoms.numbers,
            f"{k}/positions": atoms.positions,
            f"{k}/energy": np.float64(energy),
            f"{k}/forces": np.asarray(forces, np.float64),
        }
        if atoms.pbc.all():
            arrays[f"{k}/cell"] = np.asarray(atoms.cell)
            if stress is not None:
                arrays[f"{k}/stress"] = np.asarray(stress, np.float64)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
