"""A force field on SPICE: neutral molecules of H, C, N, O and S, split by molecule.

    python -m mlip_jax.main --config=configs/spice.py --workdir=runs/spice
    python -m mlip_jax.main --config=configs/spice.py:painn --workdir=runs/spice_painn
"""

import ml_collections
from ml_collections.config_dict import placeholder

MODELS = {
    # Frank et al., Nature Communications 15, 6539 (2024)
    "so3krates": dict(num_features=132, num_layers=3, num_heads=4, degrees=(1, 2, 3), cutoff=5.0, num_radial=32,
                      radial_filter="spline", num_knots=32, energy_act="silu",
                      layer_norm_1=False, layer_norm_2=False, residual_mlp_1=False, residual_mlp_2=False,
                      ev_init="zeros", message_normalization="sqrt_num_features", avg_num_neighbors=1.0),
    # Schütt, Unke, Gastegger, ICML 2021
    "painn": dict(num_features=128, num_layers=3, cutoff=5.0, num_radial=20),
}


def get_config(model: str = "so3krates") -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.task = "train"
    c.seed = 0

    c.data = ml_collections.ConfigDict()
    c.data.path = placeholder(str)  # unset: data/SPICE*.hdf5, else the embedded data set
    c.data.elements = ("H", "C", "N", "O", "S")
    c.data.charge = 0.0
    c.data.max_atoms = placeholder(int)
    c.data.max_force = placeholder(float)
    c.data.split = "molecule"  # or "random", as the paper has it
    c.data.num_train, c.data.num_valid, c.data.num_test = 100_000, 20_000, 20_000
    c.data.reference_energies = "least_squares"
    c.data.num_generated = 8_000

    c.model = ml_collections.ConfigDict()
    c.model.name = model
    c.model.options = ml_collections.ConfigDict(MODELS[model])

    c.loss = ml_collections.ConfigDict()
    c.loss.beta = 0.99
    c.loss.beta_end = 0.99
    c.loss.beta_begin = 0.5
    c.loss.energy_per_atom = True
    c.loss.penalty = "mse"

    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.name = "adam"
    c.optimizer.learning_rate = 1e-3
    c.optimizer.learning_rate_end = 1e-5
    c.optimizer.warmup_steps = 200
    c.optimizer.clip_norm = 10.0
    c.optimizer.weight_decay = 0.01
    c.optimizer.b2 = 0.999

    c.train = ml_collections.ConfigDict()
    c.train.num_steps = 10_000
    c.train.batch_size = 16
    c.train.ema_decay = 0.999
    c.train.log_every = 100
    c.train.valid_every = 1_000
    c.train.checkpoint_every = 1_000
    return c
