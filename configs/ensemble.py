"""Calibrate an ensemble of force fields: the expected error for a given spread of its members.

    python -m mlip_jax.main --config=configs/ensemble.py \\
        --config.members=runs/spice-0,runs/spice-1,runs/spice-2 \\
        --workdir=runs/ensemble

The members are training runs that differ in their seed, data or model. ensemble.json in the
workdir contains two factors, for energies and for forces, which convert the standard deviation over
the members to that of the error of their mean. They are fitted to half of the first member's test
split, without structures that another member was trained or validated on. If the test split is
small, the validation split is used instead. It chose a checkpoint, so its errors are smaller.
report.html shows, for the structures of the fit and for others of the test split, how well the
spread detects large errors and how well the expected errors agree with the actual ones. Use the
calibration in the calculator:

    EnsembleCalculator.from_workdirs(
        ["runs/spice-0", "runs/spice-1", "runs/spice-2"], calibration="runs/ensemble"
    )

Hardware: one device; the time to evaluate up to 4,000 structures with forces by each member,
minutes on a CPU.
"""

import ml_collections

from mlip_jax.defaults import ensemble_defaults


def get_config() -> ml_collections.ConfigDict:
    return ensemble_defaults()
