"""Several force fields as an ensemble: what error to expect where they spread so much.

    python -m mlip_jax.main --config=configs/ensemble.py --config.members=runs/spice-0,runs/spice-1,runs/spice-2 \\
        --workdir=runs/ensemble

The members are training runs that differ in their seed, their data or their model. In the workdir: ensemble.json with
the factors from the standard deviation over the members to that of their mean's error, one for energies and one for
forces, fitted on structures of the first member's validation part that no member was trained on; and report.html, which
shows on the validation and the test part how well the spread tells large errors and how well the expected errors agree
with them. The calculator takes it:

    EnsembleCalculator.from_workdirs(["runs/spice-0", "runs/spice-1", "runs/spice-2"], calibration="runs/ensemble")

Hardware: one device; as long as evaluating up to 4,000 structures with forces by each member, minutes on a CPU.
"""

import ml_collections

from mlip_jax.defaults import ensemble_defaults


def get_config() -> ml_collections.ConfigDict:
    return ensemble_defaults()
