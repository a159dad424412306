"""Molecular dynamics of molecules or cells, all of a file and many replicas of each side by side on the device.

    python -m mlip_jax.main --config=configs/md.py --config.force_field=runs/spice --config.input=molecule.xyz \\
        --workdir=runs/md
    python -m mlip_jax.main --config=configs/md.py --config.force_field=runs/spice --config.input=molecule.xyz \\
        --config.ensemble=nve --config.replicas=20 --config.num_steps=200_000 --workdir=runs/nve

The input is a file of SMILES (.smi, .csv; embedded by RDKit's ETKDG), SDF, extended XYZ, an
ASE database, anything else that ASE reads, or a store; the force field a workdir of ours, or so3lr:params.pkl,
schnetpack:FILE, torchmdnet:FILE. Geometries should be near a minimum; configs/relax.py brings them there. Momenta are
drawn from the Maxwell-Boltzmann distribution.

In the workdir: thermo.csv, trajectories/NUMBER.xyz for each molecule (replicas follow each other), report.html and
metrics.json. --config.trajectory_format=hdf5 writes NUMBER.h5 in their place: H5MD, without forces, a sixth of the size
for ethanol. Killed, the same command goes on from the last restart file; on a CPU what it writes is the same to the
bit. With a larger --config.num_steps it goes on where it ended. A molecule that breaks is stopped and told of.

Hardware: one GPU, TPU core or CPU.
"""

import ml_collections

from mlip_jax.defaults import md_defaults


def get_config() -> ml_collections.ConfigDict:
    return md_defaults()
