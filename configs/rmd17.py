"""Train on one molecule of revised MD17 with the official split 01.

The split has 950 training, 50 validation and 1,000 test structures.

    python -m mlip_jax.main --config=configs/rmd17.py --workdir=runs/ethanol
    python -m mlip_jax.main --config=configs/rmd17.py:aspirin,painn --workdir=runs/aspirin_painn

Ethanol on one CPU core: So3krates 30 minutes, 1.1 meV and 7.3 meV/Å; PaiNN 16 minutes, 1.2 meV
and 7.8 meV/Å; MACE 52 minutes, 0.6 meV and 3.7 meV/Å.

Put the files of figshare 12672038 (rmd17_ethanol.npz, ...) and the folder splits/ into
data/rmd17/, or set --config.data.path.
"""

import ml_collections

from mlip_jax.config import unknown_name
from mlip_jax.configs import spice
from mlip_jax.defaults import train_defaults

MOLECULES = (
    "aspirin",
    "azobenzene",
    "benzene",
    "ethanol",
    "malonaldehyde",
    "naphthalene",
    "paracetamol",
    "salicylic",
    "toluene",
    "uracil",
)
# rMD17 has no other elements; few neighbors, as molecules are small
MACE = {"elements": (1, 6, 7, 8), "avg_num_neighbors": 8.0}
MODELS = {name: spice.MODELS[name] for name in ("so3krates", "painn", "mace")}
# Steps, and beta at the start and at the end.
TRAINING = {
    "so3krates": (100_000, 0.95, 0.8),
    "painn": (50_000, 0.98, 0.95),
    "mace": (110_000, 0.98, 0.95),
}


def get_config(argument: str = "ethanol,so3krates") -> ml_collections.ConfigDict:
    molecule, _, model = argument.partition(",")
    model = model or "so3krates"
    if molecule not in MOLECULES:
        raise ValueError(unknown_name("molecule of rMD17", molecule, MOLECULES))
    if model not in MODELS:
        raise ValueError(unknown_name("model of this config", model, MODELS))
    c = train_defaults()
    c.data.path = f"data/rmd17/rmd17_{molecule}.npz"
    c.data.split = "official"
    c.data.num_train, c.data.num_valid, c.data.num_test = 950, 50, 1_000
    c.data.reference_energies = "least_squares"

    c.model.name = model
    c.model.options = ml_collections.ConfigDict(MODELS[model] | (MACE if model == "mace" else {}))

    c.loss.penalty = "mae"
    c.loss.energy_per_atom = False
    c.train.num_steps, c.loss.beta, c.loss.beta_end = TRAINING[model]

    c.optimizer.learning_rate = 1e-3
    if model == "mace":  # with smaller rates its errors are twice as large
        c.optimizer.name, c.optimizer.learning_rate = "muon", 1e-2
    c.optimizer.learning_rate_end = 1e-6
    c.optimizer.warmup_steps = 200

    c.train.batch_size = 5
    c.train.log_every = 500
    c.train.valid_every = 2_000
    c.train.checkpoint_every = 2_000
    return c
