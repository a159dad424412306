"""From molecules to properties in one command: embeds, relaxes, predicts, and says how far to trust each number.

    python -m mlip_jax.main --config=configs/predict.py --config.predictor=runs/gap --config.input=molecules.csv \\
        --workdir=runs/predicted
    python -m mlip_jax.main --config=configs/predict.py --config.predictor=runs/gap-0,runs/gap-1,runs/gap-2 \\
        --config.force_field=runs/qcr --config.input=molecules.smi --workdir=runs/predicted

The input is whatever configs/relax.py takes: SMILES (.smi, .csv), SDF, extended XYZ, ASE databases, stores. In the
workdir: predictions.csv with a line for each molecule in the order of the input, those that failed and why among them,
and report.html. For each property PREDICTION and

    PREDICTION_expected_error   |error| of validation molecules that lie as far from the training molecules
    PREDICTION_std              standard deviation over the predictors, where there are several
    domain_distance             distance from the training molecules in the model's features; 1 is the border
    outside_domain              beyond it: farther away than 99 % of the validation molecules

Killed, the same command goes on; no molecule is done twice. Hardware: any number of GPUs, TPU cores or CPU cores.
"""

import ml_collections

from mlip_jax.defaults import predict_defaults


def get_config() -> ml_collections.ConfigDict:
    return predict_defaults()
