"""Train the force field that comes with the package, "drugs-gfn2", on a file in SPICE's layout.

    python -m mlip_jax.main --config=configs/generate.py --workdir=runs/gfn2 \\
        --config.data.molecules=spice.smi --config.data.num_conformations=78000 \\
        --config.data.path=FILE.hdf5
    python -m mlip_jax.main --config=configs/bundled.py --config.data.path=FILE.hdf5 \\
        --workdir=runs/drugs
    python benchmarks/bundled.py pack runs/drugs

The first command labels conformations of a list of SMILES with GFN2-xTB in about half an hour on 2
cores. The last one writes the files of the package. Data, time and errors are in
docs/force_field.md. Charged molecules are included: the model embeds the total charge.
"""

import ml_collections

from mlip_jax.configs import train

ELEMENTS = ("H", "C", "N", "O", "F", "P", "S", "Cl", "Br", "I")


def get_config() -> ml_collections.ConfigDict:
    c = train.get_config("painn")
    c.data.elements = ELEMENTS
    c.data.split = "molecule"
    c.data.num_train, c.data.num_valid, c.data.num_test = 9_400_000, 200_000, 400_000

    c.model.options.num_features = 96
    # second derivatives are continuous at the cutoff, for vibrations
    c.model.options.cutoff_fn = "phys"
    c.model.options.charge_embedding = True

    c.train.num_steps = 24_000
    c.train.log_every = 100
    c.train.valid_every = c.train.checkpoint_every = 1_000
    c.train.max_valid = 500
    return c
