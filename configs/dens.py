"""Pre-train with DeNS (Liao et al., arXiv:2403.09549).

It is compared with force fields and denoising as initialization (Table 10).

    python -m mlip_jax.main --config=configs/dens.py --config.data.path=DATA --workdir=runs/dens
    python -m mlip_jax.main --config=configs/force2prop.py --config.data.path=DATA \\
        --config.init.workdir=runs/dens \\
        --workdir=runs/gap_dens

Energies and forces are learned as with configs/pubchemqcr.py. In addition, a quarter of the
structures is displaced by noise of 0.05 Å, which the model predicts from the forces of the
original structure. "small" is for about 50,000 structures, as in that config.
"""

import ml_collections

from mlip_jax.configs import force2prop, pubchemqcr


def get_config(size: str = "published") -> ml_collections.ConfigDict:
    c = force2prop.get_config(f"scratch,{size}")
    c.property.targets = ()
    c.data.test_geometries = ()
    c.model.options.force_encoding = True
    c.dens.weight, c.dens.share, c.align.noise = 0.1, 0.25, 0.05
    if size == "small":
        reference = pubchemqcr.get_config("small")
        c.optimizer.learning_rate = reference.optimizer.learning_rate
        c.train.num_epochs, c.train.num_steps = None, reference.train.num_steps
        c.train.batch_size, c.train.max_valid = (
            reference.train.batch_size,
            reference.train.max_valid,
        )
        c.train.valid_every = c.train.checkpoint_every = 2_000
        c.train.ema_decay = reference.train.ema_decay
    return c
