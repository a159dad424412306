"""Test the stability of dynamics with a force field at several temperatures.

Replicas run at each temperature, and the energy drift is measured at constant energy.

    python -m mlip_jax.main --config=configs/stability.py --config.force_field=runs/spice \\
        --config.input=mols.smi \\
        --workdir=runs/stability

Each molecule is relaxed. Then its replicas are simulated at each temperature (Langevin) until
they break or the time is over, and once at constant energy from 300 K for the drift of the
energy. All replicas of all molecules at all temperatures run in parallel.

With --config.compare_picoseconds=5 each molecule is also simulated with the reference method
(GFN2-xTB, or any ASE calculator as --config.oracle.method=package.module:Class), and the report
compares interatomic distances and vibrational spectra of both.

The workdir contains report.html with the fraction of intact replicas by temperature,
metrics.json, and stability.csv with one line per replica: when it broke and why. Rerun the same
command to resume from the last restart file.

Hardware: one GPU, TPU core or CPU.
"""

import ml_collections

from mlip_jax.defaults import stability_defaults


def get_config() -> ml_collections.ConfigDict:
    return stability_defaults()
