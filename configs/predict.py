"""Predict properties of molecules: embed, relax, predict, and estimate the errors.

    python -m mlip_jax.main --config=configs/predict.py --config.predictor=runs/gap \\
        --config.input=molecules.csv \\
        --workdir=runs/predicted
    python -m mlip_jax.main --config=configs/predict.py \\
        --config.predictor=runs/gap-0,runs/gap-1,runs/gap-2 \\
        --config.force_field=runs/qcr --config.input=molecules.smi --workdir=runs/predicted

The input is any that configs/relax.py accepts: SMILES (.smi, .csv), SDF, extended XYZ, ASE
databases, stores. The workdir contains report.html and predictions.csv with one line per
molecule in the order of the input, including failed molecules with the reason. The columns of
each property are PREDICTION and

    PREDICTION_expected_error   mean |error| of validation molecules at this distance from the
                                training molecules
    PREDICTION_lower, _upper    interval that contains the property with probability `coverage`,
                                by split conformal prediction on the validation molecules
    PREDICTION_std              standard deviation over the predictors, if there are several
    domain_distance             distance from the training molecules in the features of the model;
                                1 is the border
    outside_domain              1 beyond the border: farther than 99 % of the validation molecules

With --config.num_conformers=10, predictions of SMILES are means over 10 geometries, and with
--config.conformer_weights=boltzmann weighted by the energies of force_field. Predictors that read
bonds, such as GIN-virtual, need SMILES and no geometries.

Rerun the same command to resume; finished molecules are not repeated.

Hardware: any number of GPUs, TPU cores or CPU cores.
"""

import ml_collections

from mlip_jax.defaults import predict_defaults


def get_config() -> ml_collections.ConfigDict:
    return predict_defaults()
