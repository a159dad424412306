"""Relax molecules or crystals to the nearest minimum of a force field, in batches on the device.

    python -m mlip_jax.main --config=configs/relax.py --config.force_field=runs/spice \\
        --config.input=molecules.smi \\
        --workdir=runs/relaxed
    launch/local.sh -n 2 -- --config=configs/relax.py --config.force_field=runs/spice \\
        --config.input=molecules.smi \\
        --workdir=runs/relaxed

The input is a file of SMILES (.smi, .csv; embedded by RDKit's ETKDG), SDF, extended XYZ, an ASE
database, any other format ASE can read, or a store. The force field is the workdir of a
training run, a file of another program, the name of a published force field, or IMPORTER:FILE;
by default that of the package (docs/force_field.md).

The cells of periodic structures are fixed. --config.cell=frechet relaxes them with the steps of
ASE's FrechetCellFilter; see --config.mask and --config.scalar_pressure. --config.symprec=0.01 keeps
the space groups.

The workdir contains relaxed.xyz and relaxed.sdf in the order of the input, results.csv with one
line per molecule, and report.html. results.csv includes failed molecules with the reason, and,
if the domain of the force field is known, whether a relaxed geometry is outside of it. Any
number of molecules is processed in a bounded amount of memory. Rerun the same command to
resume, with any number of processes; finished molecules are not repeated. You can start with
--config.limit=100 and rerun without it in the same workdir.

Hardware: any number of GPUs, TPU cores or CPU cores.
"""

import ml_collections

from mlip_jax.defaults import relax_defaults


def get_config() -> ml_collections.ConfigDict:
    return relax_defaults()
