"""How long dynamics with a force field hold together: replicas of molecules at several temperatures, and energy drift.

    python -m mlip_jax.main --config=configs/stability.py --config.force_field=runs/spice --config.input=mols.smi \\
        --workdir=runs/stability

Each molecule is relaxed, then simulated in replicas at each temperature (Langevin) until it breaks or the time is over,
and once at constant energy from 300 K, which gives the drift of the energy. All replicas of all molecules at all
temperatures make their steps side by side.

With --config.compare_picoseconds=5 each molecule is also simulated by the reference method (GFN2-xTB, or
--config.oracle.method=package.module:Class of any ASE calculator), and the report has the distances between atoms and
the vibrational spectrum of both.

In the workdir: report.html with the share that has survived, by temperature; metrics.json; stability.csv with a line
for each replica, when it broke and why. A run that is killed goes on from its last restart file.

Hardware: one GPU, TPU core or CPU.
"""

import ml_collections

from mlip_jax.defaults import stability_defaults


def get_config() -> ml_collections.ConfigDict:
    return stability_defaults()
