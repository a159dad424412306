"""Train a force field on your own data, without filters.

    python -m mlip_jax.main --config=configs/train.py --config.data.path=mine.xyz
    mlip-jax train:painn mine.xyz --train.num_steps=5000

All elements and charges are used. The data are split by molecule if there are enough molecules,
otherwise by structure; the log states which. Rerun the command with more steps to continue a run.
Fine-tune another force field on the data: --config.init.workdir=runs/spice --config.model.name=''.
"""

import ml_collections

from mlip_jax.configs import spice


def get_config(model: str = "so3krates") -> ml_collections.ConfigDict:
    c = spice.get_config(model)
    c.data.elements = None
    c.data.charge = None
    c.data.split = "auto"
    # scaled down to the size of the data: 80 %, 10 % and 10 %
    c.data.num_train, c.data.num_valid, c.data.num_test = 8_000_000, 1_000_000, 1_000_000
    # warmup and intervals that follow the number of steps
    c.optimizer.warmup_steps = None
    c.train.log_every = c.train.valid_every = c.train.checkpoint_every = None
    return c
