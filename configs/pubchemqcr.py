"""Pre-train a model on relaxation trajectories (PubChemQCR), as in Force2Geo; split by molecule.

    python -m mlip_jax.main --config=configs/pubchemqcr.py \\
        --config.data.path=PubChemQCR-S.lmdb --workdir=runs/qcr
    python -m mlip_jax.main --config=configs/pubchemqcr.py:small \\
        --config.data.path=trajectories.lmdb --workdir=runs/qcr
    python -m mlip_jax.main --config=configs/pubchemqcr.py:small,faenet \\
        --config.data.path=trajectories.lmdb --workdir=runs/qcr_faenet

PaiNN has 4 layers, 128 features, 128 Gaussians and a cutoff of 4.5 Å. The loss is the mean
absolute error of the energy per atom and the root mean square error of the forces per
structure. Adam's learning rate is halved after two epochs without a better validation loss (Fu
et al., arXiv:2507.00407). Unlike in the paper, the energy is a sum over atoms, forces are its
derivative, and filters have a smooth cutoff. "published" has not been trained to its end.

"small" is for about 50,000 snapshots and one hour on one CPU core: 3 layers, 32 Gaussians, and
a loss of total energies and of the lengths of the force error vectors. It requires
off-equilibrium geometries in addition to the trajectories, which benchmarks/off_equilibrium.py
generates. Snapshots close to minima have forces of about 0.03 eV/Å, and training on only these
hardly improves on predicting zero forces (docs/results/force2geo.md). The optimizer is Adam, as
in older results. --config.optimizer.name=muon --config.optimizer.learning_rate=2e-3
--config.train.batch_size=8 is more accurate in the same time.

A model after the size ("published,schnet", "small,painn_oc") has the width and depth of the
comparison of models in Force2Geo (Table 8); "published" then has the batch size of that table, too.
painn_oc is the PaiNN that the paper trains, with a smooth cutoff. With
--config.model.options.direct_forces=True it predicts forces instead of differentiating its energy.
equiformer predicts forces, as in the paper.
nequip and sevennet have even irreps up to degree 2. Models with tensor products take several
times as long per step.
"""

import ml_collections

from mlip_jax.config import unknown_name
from mlip_jax.defaults import train_defaults

MODELS = {
    "published": dict(num_features=128, num_layers=4, cutoff=4.5, num_radial=128),
    "small": dict(num_features=128, num_layers=3, cutoff=4.5, num_radial=32),
}
# Comparison of models in the paper: batch size and options of each model.
COMPARED = {
    "painn": (32, MODELS["published"]),
    "painn_oc": (
        32,
        dict(num_features=128, num_layers=4, cutoff=4.5, num_radial=128, direct_forces=False),
    ),
    "schnet": (128, dict(num_features=128, num_layers=4, cutoff=4.5, num_radial=50)),
    "faenet": (64, dict(num_features=128, num_layers=4, cutoff=4.5, num_radial=50)),
    # irreps with the parity of harmonics up to degree 2
    "allegro": (
        8,
        dict(
            num_features=128,
            num_tensor_features=128,
            num_layers=2,
            max_degree=2,
            parity="natural",
            cutoff=4.5,
            embedding_widths=(128,),
            latent_widths=(128,),
        ),
    ),
    # 128x0e+64x1e; everything else is half of the Open Catalyst form
    "equiformer": (
        32,
        dict(
            num_features=128,
            num_layers=4,
            num_heads=8,
            max_degree=1,
            cutoff=4.5,
            num_radial=128,
            direct_forces=True,
        ),
    ),
    # sums over neighbors and features up to degree 2, with residual blocks
    "mace": (
        8,
        dict(
            num_features=128,
            num_layers=2,
            max_degree=2,
            feature_degree=2,
            cutoff=4.5,
            avg_num_neighbors=15.0,
        ),
    ),
    "pace": (
        8,
        dict(
            num_features=128,
            num_layers=2,
            max_degree=2,
            feature_degree=2,
            cutoff=4.5,
            avg_num_neighbors=15.0,
        ),
    ),
    # even irreps up to degree 2
    "nequip": (16, dict(num_features=64, num_layers=5, max_degree=2, parity="even", cutoff=4.5)),
    "sevennet": (
        16,
        dict(
            num_features=128,
            num_layers=5,
            max_degree=2,
            parity="even",
            cutoff=4.5,
            self_connection="linear",
        ),
    ),
}


def get_config(what: str = "published") -> ml_collections.ConfigDict:
    size, _, model = what.partition(",")
    if model and model not in COMPARED:
        raise ValueError(unknown_name("model of this config", model, COMPARED))
    if size not in MODELS:
        raise ValueError(unknown_name("size of this config", size, MODELS))
    c = train_defaults()
    c.data.reader = "pubchemqcr"
    c.data.elements = None
    c.data.split = "molecule"  # whole trajectories
    c.data.num_train, c.data.num_valid, c.data.num_test = 80_000_000, 10_000_000, 10_000_000

    batch_size, options = COMPARED[model] if model else (128, MODELS[size])
    c.model.name = model or "painn"
    c.model.options = ml_collections.ConfigDict(options)

    c.loss.penalty, c.loss.force_penalty = "mae", "rmse"
    c.loss.energy_per_atom = True
    c.loss.beta = c.loss.beta_end = 0.5

    c.optimizer.name = "adam"
    c.optimizer.learning_rate = 5e-4
    c.optimizer.learning_rate_end = 1e-6
    c.optimizer.schedule = "plateau"
    c.optimizer.plateau_patience = 2
    c.optimizer.decay_factor = 0.5

    c.train.num_epochs = 100.0
    c.train.batch_size = batch_size
    c.train.log_every = 100
    c.train.valid_every = 2_000
    c.train.checkpoint_every = 2_000

    if size == "small":
        # with few epochs, the schedule must end with them
        c.optimizer.learning_rate, c.optimizer.schedule = 1e-3, "cosine"
        c.train.num_epochs, c.train.num_steps, c.train.batch_size = None, 62_000, 4
        # Lengths of the force error vectors and absolute errors of total energies, as for SPICE:
        # with squared errors of energies per atom, the energies are not learned in this time.
        c.loss.penalty, c.loss.force_penalty, c.loss.energy_per_atom = "mae", "norm", False
        c.loss.beta, c.loss.beta_end = 0.95, 0.9
        c.train.max_valid = 600
    return c
