"""Evaluate a force field on labeled structures, or predict for structures without labels.

    python -m mlip_jax.main --config=configs/evaluate.py --config.force_field=runs/spice \\
        --config.data.path=molecules.xyz \\
        --workdir=runs/evaluated
    python -m mlip_jax.main --config=configs/evaluate.py \\
        --config.force_field=runs/a,runs/b,runs/c --config.calibration=runs/ensemble \\
        --config.data.path=DATA.hdf5 --workdir=runs/evaluated

The force field is the workdir of a training run, so3lr:params.pkl, schnetpack:FILE or
torchmdnet:FILE; several separated by commas are an ensemble. The data are any data set that
training reads, with the same fields of config.data, or a store. A file without energies and
forces, also SMILES (.smi, .csv) and SDF, is predicted without errors.

The workdir contains

    report.html       errors, parity plots, errors by size, element and subset, outliers, domain
    metrics.json      the numbers of the report
    predictions.xyz   the structures with energy, forces, charges (if the force field predicts them)
                      and, for periodic cells, stress; labels as reference_energy and
                      reference_forces; forces_expected_error, domain_distance, outside_domain;
                      standard deviations of an ensemble
    predictions.npz   labels and predictions as arrays
    skipped.csv       structures that the force field cannot evaluate, with the reason

Labels are compared as they are. If the level of theory of the data differs from that of the force
field, --config.align_energies compares energies after a fit of per-element energies; the report
names both levels. Rerun the same command to resume, with any number of processes.

Hardware: any number of GPUs, TPU cores or CPU cores.
"""

import ml_collections

from mlip_jax.defaults import evaluate_defaults


def get_config() -> ml_collections.ConfigDict:
    return evaluate_defaults()
