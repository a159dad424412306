"""Pre-train PaiNN on relaxation trajectories (PubChemQCR), as in Force2Geo; split by molecule.

    python -m mlip_jax.main --config=configs/pubchemqcr.py --config.data.path=PubChemQCR-S.lmdb --workdir=runs/qcr
    python -m mlip_jax.main --config=configs/pubchemqcr.py:small --config.data.path=trajectories.lmdb --workdir=runs/qcr
    python -m mlip_jax.main --config=configs/pubchemqcr.py:small,nequip --config.data.path=trajectories.lmdb \\
        --workdir=runs/qcr_nequip

PaiNN has 4 layers, 128 features, 128 Gaussians and a cutoff of 4.5 Å. The loss is the mean absolute error of the energy
per atom and the root mean square error of the forces per structure. Adam's learning rate is halved after two epochs
without a better validation loss (Fu et al., arXiv:2507.00407). Unlike in the paper, the energy is a sum over atoms,
forces are its derivative, and filters have a smooth cutoff. "published" has not been trained to its end.

"small" is for about 50,000 snapshots and one hour on one CPU core: 3 layers, 32 Gaussians, and a loss of total energies
and of the lengths of the force error vectors. It requires off-equilibrium geometries in addition to the trajectories,
which benchmarks/off_equilibrium.py generates. Snapshots close to minima have forces of about 0.03 eV/Å, and training on
only these hardly improves on predicting zero forces (docs/results/force2geo.md). The optimizer is Adam, as in older
results. --config.optimizer.name=muon --config.optimizer.learning_rate=2e-3 --config.train.batch_size=8 is more accurate
in the same time.

The other models ("small,nequip", "small,sevennet") have the layers and channels of the Table 8 of Fu et al. They take
several times as long per step; batch sizes are 16 there.
"""

import ml_collections

from mlip_jax.config import unknown_name
from mlip_jax.defaults import train_defaults

SIZES = ("published", "small")
MODELS = {
    "painn": {"published": dict(num_features=128, num_layers=4, cutoff=4.5, num_radial=128),
              "small": dict(num_features=128, num_layers=3, cutoff=4.5, num_radial=32)},
    # Table 8: layers and channels; even irreps up to degree 2
    "nequip": dict.fromkeys(SIZES, dict(num_features=64, num_layers=5, max_degree=2, parity="even", cutoff=4.5)),
    "sevennet": dict.fromkeys(SIZES, dict(num_features=128, num_layers=5, max_degree=2, parity="even", cutoff=4.5,
                                          self_connection="linear")),
}


def get_config(what: str = "published") -> ml_collections.ConfigDict:
    size, _, model = what.partition(",")
    model = model or "painn"
    if size not in SIZES:
        raise ValueError(unknown_name("size of this config", size, SIZES))
    if model not in MODELS:
        raise ValueError(unknown_name("model of this config", model, MODELS))
    c = train_defaults()
    c.data.reader = "pubchemqcr"
    c.data.elements = None
    c.data.split = "molecule"  # whole trajectories
    c.data.num_train, c.data.num_valid, c.data.num_test = 80_000_000, 10_000_000, 10_000_000

    c.model.name = model
    c.model.options = ml_collections.ConfigDict(MODELS[model][size])

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
    c.train.batch_size = 128 if model == "painn" else 16
    c.train.log_every = 100
    c.train.valid_every = 2_000
    c.train.checkpoint_every = 2_000

    if size == "small":
        # with few epochs, the schedule must end with them
        c.optimizer.learning_rate, c.optimizer.schedule = 1e-3, "cosine"
        c.train.num_epochs, c.train.num_steps, c.train.batch_size = None, 62_000, 4
        # Lengths of the force error vectors and absolute errors of total energies, as for SPICE: with squared errors of
        # energies per atom, the energies are not learned at all in this time.
        c.loss.penalty, c.loss.force_penalty, c.loss.energy_per_atom = "mae", "norm", False
        c.loss.beta, c.loss.beta_end = 0.95, 0.9
        c.train.max_valid = 600
    return c
