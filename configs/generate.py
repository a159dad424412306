"""Generate the built-in data set: about 8,000 conformations of 461 small molecules.

The labels are GFN2-xTB energies and forces.

    pip install 'mlip-flax[data]'
    python -m mlip_jax.main --config=configs/generate.py --workdir=runs/data
    python -m mlip_jax.main --config=configs/generate.py --workdir=runs/data \\
        --config.data.molecules=mine.smi
    python -m mlip_jax.main --config=configs/generate.py --workdir=runs/pairs \\
        --config.data.molecules=mine.smi --config.data.kinds="('dimers','torsions')"

The kinds are conformations (thermal), torsions (bonds turned to any angle), dimers (pairs of
molecules) and stretches (molecules of 2 to 12 atoms); see docs/training.md.

Hardware: CPU only, all cores. Time: between 2 and 3 minutes on 2 cores; proportional to the
number of conformations, and to the number of atoms to a power between 2 and 3. Rerun the same
command to resume.

The file (5 MB) has SPICE's HDF5 layout, so every config that trains on SPICE can train on it.
Its labels are GFN2-xTB, not SPICE's wB97M-D3(BJ)/def2-TZVPPD; use it for trying things out.
"""

import ml_collections

from mlip_jax.defaults import generate_defaults


def get_config() -> ml_collections.ConfigDict:
    return generate_defaults()
