"""Run molecular dynamics of molecules or cells, with all replicas in parallel on the device.

    python -m mlip_jax.main --config=configs/md.py --config.force_field=runs/spice \\
        --config.input=molecule.xyz \\
        --workdir=runs/md
    python -m mlip_jax.main --config=configs/md.py --config.force_field=runs/spice \\
        --config.input=molecule.xyz \\
        --config.ensemble=nve --config.replicas=20 --config.num_steps=200_000 --workdir=runs/nve

The input is a file of SMILES (.smi, .csv; embedded by RDKit's ETKDG), SDF, extended XYZ, an ASE
database, any other format ASE can read, or a store. The force field is the workdir of a
training run, so3lr:params.pkl, schnetpack:FILE or torchmdnet:FILE. Geometries should be close
to a minimum; relax them with configs/relax.py. Momenta are drawn from the Maxwell-Boltzmann
distribution.

The workdir contains thermo.csv, trajectories/NUMBER.xyz for each molecule (one after another
for replicas), report.html and metrics.json. --config.trajectory_format=hdf5 writes NUMBER.h5
instead: H5MD without forces, a sixth of the size for ethanol. Rerun the same command to resume
from the last restart file; on a CPU, the output is bitwise identical. With a larger
--config.num_steps, a finished run continues. A molecule that breaks is frozen and reported.

Hardware: one GPU, TPU core or CPU.
"""

import ml_collections

from mlip_jax.defaults import md_defaults


def get_config() -> ml_collections.ConfigDict:
    return md_defaults()
