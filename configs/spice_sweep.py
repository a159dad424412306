"""Compare So3krates with PaiNN on SPICE, with three seeds each and a small budget.

    python -m mlip_jax.main --config=configs/spice_sweep.py --workdir=runs/spice_sweep --sweep

Six runs of 6,000 steps with batches of 8 structures, one after another. Rerun the same command
to run those that are not complete. The table runs/spice_sweep/sweep.md has means and standard
deviations over the seeds. Without a SPICE file, the data are the built-in data set with
GFN2-xTB labels. As a job array on SLURM with one variant per task:

    sbatch --array=0-5 launch/slurm.sbatch --config=configs/spice_sweep.py \\
        --workdir=runs/spice_sweep
"""

import ml_collections

from mlip_jax.configs import spice
from mlip_jax.sweeps import product


def get_config() -> ml_collections.ConfigDict:
    c = spice.get_config()
    c.train.num_steps = 6_000
    c.train.valid_every = 500
    c.train.checkpoint_every = 500
    return c


def sweep() -> list[dict]:
    return [
        {
            "name": f"{v['model.name']}-{v['seed']}",
            **v,
            "model.options": spice.MODELS[v["model.name"]],
        }
        for v in product({"model.name": ["so3krates", "painn"], "seed": [0, 1, 2]})
    ]
