"""Relaxes molecules: their geometries are moved to the nearest minimum of a force field, in batches on the device.

    python -m mlip_jax.main --config=configs/relax.py --config.force_field=runs/spice --config.input=molecules.smi \\
        --workdir=runs/relaxed
    launch/local.sh -n 2 -- --config=configs/relax.py --config.force_field=runs/spice --config.input=molecules.smi \\
        --workdir=runs/relaxed

The input is a file of SMILES (.smi, .csv; embedded by RDKit's ETKDG), SDF, extended XYZ, an ASE database, anything else
that ASE reads, or a store; the force field a workdir of ours, or so3lr:params.pkl, schnetpack:FILE, torchmdnet:FILE.

In the workdir: relaxed.xyz and relaxed.sdf in the order of the input, results.csv with a line for each molecule, those
that failed and why among them, and whether a relaxed geometry lies outside of the domain of the force field, if that is
known; and report.html. Any number of molecules streams through a bounded amount of memory.
Killed, the same command goes on where it was, with any number of processes; no molecule is relaxed twice. First
--config.limit=100 and then all is one run in one workdir.

Hardware: any number of GPUs, TPU cores or CPU cores.
"""

import ml_collections

from mlip_jax.defaults import relax_defaults


def get_config() -> ml_collections.ConfigDict:
    return relax_defaults()
