"""Adapt a property predictor to relaxed geometries (Fu et al., arXiv:2507.00407, section 2.4).

    python -m mlip_jax.main --config=configs/force2prop.py:scratch --config.data.path=DATA \\
        --workdir=runs/gap
    python -m mlip_jax.main --config=configs/geometry_finetune.py --config.data.path=DATA \\
        --config.init.workdir=runs/gap --config.data.force_field=runs/qcr \\
        --config.align.frames=pm3,DFT_1st \\
        --workdir=runs/gap_relaxed

Half of the inputs are geometries of the labels with noise of 0.1 Å. The other half are random
frames of the relaxation trajectories in the data (config.align.frames; if unset, all inputs
have noise). The loss is that of the property plus 0.1 times 1 - cosine between a vector per
atom and the displacement from the input to the geometry of the labels, with the same sign in
both halves. Validation and tests use geometries that the force field relaxed from the first
snapshot of a cheap stage. --config.data.valid_geometry and test_geometries select others:
"relaxed(etkdg)" starts from RDKit geometries.

The vectors require features of degree 1, as those of painn, painn_oc, equivariant_transformer,
allegro, equiformer, mace or pace. Other architectures (schnet, dimenetpp, spherenet, comenet, ...)
can be trained on displaced geometries with --config.align.weight=0.

"small" is for about 2,000 molecules on a CPU, see configs/force2prop.py.
"""

import ml_collections

from mlip_jax.configs import force2prop


def get_config(size: str = "published") -> ml_collections.ConfigDict:
    c = force2prop.get_config(f"all,{size}")
    c.align.weight = 0.1
    c.align.loss = "cosine"
    c.align.noise = 0.1
    c.align.frames_share = 0.5
    c.data.valid_geometry = "relaxed(pm3:first)"
    c.data.test_geometries = ("relaxed(pm3:first)", "labels", "pm3", "pm3:first")
    c.train.num_epochs = 100.0 if size == "published" else 10.0
    return c
