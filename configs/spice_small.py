"""Train So3krates on the smaller molecules of SPICE in 15 minutes on one CPU core.

    taskset -c 0 python -m mlip_jax.main --config=configs/spice_small.py \\
        --config.data.path=FILE.hdf5 \\
        --workdir=runs/spice_small

The data are neutral molecules of H, C, N, O and S with at most 25 atoms, as in a comparison
with other packages at an equal number of core minutes.
"""

import ml_collections

from mlip_jax.configs import spice


def get_config() -> ml_collections.ConfigDict:
    c = spice.get_config()
    c.data.max_atoms = 25
    c.data.num_train, c.data.num_valid, c.data.num_test = 5_600, 93, 800
    c.loss.beta = c.loss.beta_end = (
        0.98  # more weight on forces, because energies are learned faster here
    )
    c.model.options.cutoff = (
        4.0  # as accurate per step as 5 Å on molecules of this size, with a quarter fewer edges
    )
    c.optimizer.name, c.optimizer.learning_rate = "adam", 1e-3  # as in the comparison
    c.train.num_steps = 23_000
    c.train.valid_every = 2_000
    c.train.checkpoint_every = 2_000
    return c
