"""Train a property predictor from a force field: Force2Prop (Fu et al., arXiv:2507.00407).

The method is that of section 2.3.

    python -m mlip_jax.main --config=configs/force2prop.py --config.data.path=DATA \\
        --config.init.workdir=runs/qcr \\
        --workdir=runs/gap
    python -m mlip_jax.main --config=configs/force2prop.py:scratch --config.data.path=DATA \\
        --workdir=runs/gap_scratch
    python -m mlip_jax.main --config=configs/force2prop.py:heads --config.data.path=DATA \\
        --config.init.workdir=runs/qcr --workdir=runs/gap_heads

The argument selects the trained parameters: all of them ("all"), only the head on fixed
features ("heads"; "random_heads" on features of an untrained model), or the same architecture from
random parameters ("scratch", PaiNN). A name of configs/spice.py selects another architecture:
"scratch,dimenetpp", "random_heads,comenet". "scratch,gin_virtual" is a model that reads only the
bonds of the SMILES; a table of SMILES is not embedded for it. "scratch,unimol_plus" reads bonds and
RDKit geometries of a table of SMILES. Adam starts at 5e-4, which is halved
every 40 epochs, with batches of 256 molecules, as published. The data must contain properties:
Molecule3D, QM9, ∇²DFT, PubChemQCR with a summary.csv, or your own table of SMILES and numbers.
--config.property.targets="('homo','lumo')" selects other properties than the gap. If a finished
run is rerun with other config.data.test_geometries, it is tested on these.

"small" after a comma is for about 2,000 molecules and two minutes on one CPU core: batches of
16, 30 epochs. Architectures other than PaiNN, GIN-virtual and Uni-Mol+ keep their size, and take
longer. mace, pace, nequip, sevennet and nequix have weights for H, C, N, O and S;
--config.model.options.elements=1,6,7,8,9,16,17 adds others.
"""

import ml_collections

from mlip_jax.config import unknown_name
from mlip_jax.configs import spice
from mlip_jax.defaults import property_defaults

MODES = ("all", "heads", "scratch", "random_heads")
SIZES = ("published", "small")
# The same as in configs/pubchemqcr.py.
PAINN = {
    "published": dict(num_features=128, num_layers=4, cutoff=4.5, num_radial=128),
    "small": dict(num_features=128, num_layers=3, cutoff=4.5, num_radial=32),
}


# Models of bonds: Hu et al., arXiv:2103.09430; Lu et al., arXiv:2303.16982
BOND_MODELS = {
    "gin_virtual": {
        "published": dict(num_features=600, num_layers=5),
        "small": dict(num_features=128, num_layers=3),
    },
    "unimol_plus": {
        "published": dict(num_features=768, num_layers=12, num_tokens=64),
        "small": dict(
            num_features=64,
            pair_features=32,
            pair_width=8,
            num_layers=3,
            num_heads=8,
            hidden_width=64,
            num_radial=32,
            num_tokens=32,
        ),
    },
}


def get_config(argument: str = "all") -> ml_collections.ConfigDict:
    words = [w.strip() for w in argument.split(",")]
    for word in words:
        if word not in (known := (*MODES, *SIZES, *spice.MODELS, *BOND_MODELS)):
            raise ValueError(unknown_name("word of this config", word, list(known)))
    mode = next((w for w in words if w in MODES), "all")
    size = next((w for w in words if w in SIZES), "published")
    sizes_of = {"painn": PAINN, **BOND_MODELS}
    model = next((w for w in words if w in spice.MODELS or w in BOND_MODELS), "painn")
    c = property_defaults()
    c.property.targets = ("gap",)
    c.property.pooling = "mean"
    if mode in ("scratch", "random_heads"):
        c.model.name = model
        c.model.options = ml_collections.ConfigDict(
            sizes_of[model][size] if model in sizes_of else spice.MODELS[model]
        )
    c.init.train = "heads" if mode.endswith("heads") else "all"

    c.data.split = "molecule"
    c.optimizer.name = "adam"
    c.optimizer.learning_rate = 5e-4
    c.optimizer.learning_rate_end = 0.0
    c.optimizer.schedule = "step"
    c.optimizer.decay_epochs, c.optimizer.decay_factor = 40.0, 0.5
    c.optimizer.warmup_steps = 0
    c.train.num_epochs = 200.0
    c.train.batch_size = 256
    # at most 100, 1,000 and 1,000 steps, less in short runs
    c.train.log_every = c.train.valid_every = c.train.checkpoint_every = None
    if size == "small":
        c.optimizer.schedule, c.optimizer.warmup_steps = "cosine", 100
        c.optimizer.learning_rate_end = 1e-6
        c.train.num_epochs, c.train.batch_size = 30.0, 16
        c.train.ema_decay = 0.99
    return c
