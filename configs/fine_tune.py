"""Fine-tune a force field on labeled structures, and find the best recipe for it.

    mlip-jax fine_tune mine.xyz --workdir=runs/tuned
    python -m mlip_jax.main --config=configs/fine_tune.py --config.data.path=mine.xyz \\
        --config.force_field=runs/spice --config.pool.path=candidates.xyz --workdir=runs/tuned

The start is the force field of the package, a workdir, a file of another program or a published
force field. Reference energies are refitted. Freezing, low-rank adapters and full training are
tried with and without replay of the old domain, each with several learning rates. All candidates
train for a quarter of config.num_steps, and the best one with and without replay continue.
The test structures are used only for the errors in the report.

The workdir then is the workdir of the fine-tuned force field: mlip-jax relax molecules.smi
--force_field=runs/tuned. report.html and metrics.json contain the comparison of the recipes, the
expected error, the learning curve and the errors in the old domain before and after.
next_structures.xyz contains the structures of config.pool.path whose labels would help most.
Rerun the same command to resume.

Hardware: CPU, GPU or TPU. Time: that of 4 trainings of config.num_steps steps, and of one more for
each point of the learning curve; see docs/results/fine_tuning.md.
"""

import ml_collections

from mlip_jax.defaults import fine_tune_defaults


def get_config() -> ml_collections.ConfigDict:
    return fine_tune_defaults()
