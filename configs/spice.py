"""So3krates on SPICE: neutral molecules of H, C, N, O and S, split by molecule."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.task = "train"
    c.seed = 0

    c.data = ml_collections.ConfigDict()
    c.data.path = ml_collections.config_dict.placeholder(str)
    c.data.elements = ("H", "C", "N", "O", "S")
    c.data.charge = 0.0
    c.data.max_atoms = ml_collections.config_dict.placeholder(int)
    c.data.split = "molecule"
    c.data.num_train, c.data.num_valid, c.data.num_test = 100_000, 20_000, 20_000

    c.model = ml_collections.ConfigDict()
    c.model.name = "so3krates"
    c.model.options = ml_collections.ConfigDict()
    c.model.options.num_features = 132
    c.model.options.num_layers = 3
    c.model.options.degrees = (1, 2, 3)
    c.model.options.cutoff = 5.0
    c.model.options.radial_filter = "spline"
    c.model.options.num_knots = 32
    c.model.options.layer_norm_1 = False
    c.model.options.layer_norm_2 = False
    c.model.options.residual_mlp_1 = False
    c.model.options.residual_mlp_2 = False
    c.model.options.ev_init = "zeros"
    c.model.options.energy_act = "silu"
    c.model.options.qk_activation = "silu"
    c.model.options.message_normalization = "sqrt_num_features"
    c.model.options.avg_num_neighbors = 1.0
    c.model.options.num_radial = 32
    c.model.options.radial_basis = "physnet"
    c.model.options.num_heads = 4

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
    c.optimizer.b2 = 0.999

    c.train = ml_collections.ConfigDict()
    c.train.num_steps = 10_000
    c.train.batch_size = 16
    c.train.ema_decay = 0.999
    c.train.valid_every = 1000
    c.train.checkpoint_every = 1000
    c.train.log_every = 100
    return c
