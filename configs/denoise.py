"""Pre-train by denoising of coordinates (Zaidi et al., arXiv:2206.00133).

It is compared with force fields as initialization (Table 10).

    python -m mlip_jax.main --config=configs/denoise.py --config.data.path=DATA \\
        --workdir=runs/denoise
    python -m mlip_jax.main --config=configs/force2prop.py --config.data.path=DATA \\
        --config.init.workdir=runs/denoise \\
        --workdir=runs/gap_denoise

Noise of 0.05 Å is added to every coordinate, and a vector per atom predicts the displacement.
Use geometries at minima; of trajectories, choose the stage. Keep test molecules out of training
(data.held_out).
"""

import ml_collections

from mlip_jax.configs import force2prop


def get_config(size: str = "published") -> ml_collections.ConfigDict:
    c = force2prop.get_config(f"scratch,{size}")
    c.property.targets = ()
    c.data.test_geometries = ()
    c.align.weight, c.align.loss, c.align.noise = 1.0, "mse", 0.05
    return c
