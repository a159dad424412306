"""Relax the same molecules on all devices and write the results; started by test_relax.py."""

import sys

import jax
import numpy as np

from mlip_jax import Relaxer
from tests.simulation.conftest import random_potential
from tests.simulation.relaxation.test_relax import displaced_methanol


def main():
    starts = displaced_methanol(23, seed=5)
    # small batches, so that every device gets some; enough steps to notice mixed-up molecules
    relaxer = Relaxer(
        random_potential("tiny"), max_steps=15, fmax=1e-3, dtype="float64", batch_atoms=18
    )
    results = dict(relaxer.stream(enumerate(starts)))
    used = {key[0] for key in relaxer.pools}
    np.savez(
        sys.argv[1],
        devices=len(jax.devices()),
        used=len(used),
        compiles=relaxer.num_compiles,
        positions=[results[n].atoms.positions for n in range(len(starts))],
        energies=[results[n].energy for n in range(len(starts))],
    )


if __name__ == "__main__":
    main()
