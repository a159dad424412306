"""Makes the embedded data set: some 8,000 conformations of 460 small molecules with GFN2-xTB energies and forces.

    pip install 'mlip-flax[data]'
    python -m mlip_jax.main --config=configs/generate.py --workdir=runs/data
    python -m mlip_jax.main --config=configs/generate.py --workdir=runs/data --config.data.molecules=mine.smi

Hardware: CPU only, all cores. Time: between 2 and 3 minutes on 2 cores; proportional to conformations, and to some
power between 2 and 3 of the number of atoms. An interrupted run goes on where it stopped when started again.

The file (5 MB) is in SPICE's HDF5 layout, so every config that trains on SPICE trains on it. Its labels are
GFN2-xTB, not SPICE's wB97M-D3(BJ)/def2-TZVPPD: a model trained on it is for trying things out.
"""

import ml_collections

from mlip_jax.defaults import generate_defaults


def get_config() -> ml_collections.ConfigDict:
    return generate_defaults()
