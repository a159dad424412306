"""Compare mlip_jax with the results that the other scripts wrote: `compare.py FILE=RESULTS.npz ...`.

Prints the largest differences of energy (eV), forces (eV/Å) and stress (eV/Å³), in float64.
"""

import sys

import numpy as np
from ase import Atoms

from mlip_jax import MLIPCalculator


def main(pairs):
    for pair in pairs:
        file, _, results = pair.rpartition("=")
        calculator = MLIPCalculator.load(file, dtype="float64")
        with np.load(results, allow_pickle=False) as data:
            arrays = dict(data)
        largest = np.zeros(3)
        for k in sorted({key.partition("/")[0] for key in arrays}):
            atoms = Atoms(
                arrays[f"{k}/numbers"],
                arrays[f"{k}/positions"],
                cell=arrays.get(f"{k}/cell"),
                pbc=f"{k}/cell" in arrays,
            )
            atoms.calc = calculator
            outputs = [atoms.get_potential_energy(), atoms.get_forces()]
            outputs += [atoms.get_stress(voigt=False)] if f"{k}/stress" in arrays else []
            for n, (name, values) in enumerate(zip(("energy", "forces", "stress"), outputs)):
                largest[n] = max(largest[n], np.abs(values - arrays[f"{k}/{name}"]).max())
        print(f"{file}: energy {largest[0]:.1e}, forces {largest[1]:.1e}, stress {largest[2]:.1e}")


if __name__ == "__main__":
    main(sys.argv[1:])
