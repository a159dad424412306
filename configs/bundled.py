"""Train the force field that comes with the package, "drugs-gfn2", in two stages.

    python -m mlip_jax.main --config=configs/generate.py --workdir=runs/gfn2 \\
        --config.data.molecules=spice.smi --config.data.num_conformations=78000 \\
        --config.data.path=first.hdf5
    python -m mlip_jax.main --config=configs/bundled.py --config.data.path=first.hdf5 \\
        --workdir=runs/first

The second stage adds turned bonds, dimers, small molecules, and compounds of phosphorus and sulfur.
The lists of molecules are in benchmarks/molecules; docs/force_field.md has the commands that
generate the files.

    python benchmarks/bundled.py records runs/first
    python -m mlip_jax.main --config=configs/bundled.py:second --workdir=runs/drugs \\
        --config.data.path=first.hdf5,small.hdf5,special.hdf5,torsions.hdf5,dimers.hdf5 \\
        --config.data.held_out=runs/first/split_records.json --config.init.workdir=runs/first
    python benchmarks/bundled.py pack runs/drugs

Hardware and time: CPU, one core; about an hour per stage. Charged molecules are included: the model
embeds the total charge. The last command writes the files of the package.
"""

import ml_collections

from mlip_jax.configs import train

ELEMENTS = ("H", "C", "N", "O", "F", "P", "S", "Cl", "Br", "I")


def get_config(stage: str = "first") -> ml_collections.ConfigDict:
    if stage not in ("first", "second"):
        raise ValueError(f"expected 'first' or 'second', received {stage!r}")
    c = train.get_config("painn")
    c.data.elements = ELEMENTS
    c.data.split = "molecule"
    c.data.num_train, c.data.num_valid, c.data.num_test = 9_400_000, 200_000, 400_000

    c.model.options.num_features = 96
    # second derivatives are continuous at the cutoff, for vibrations
    c.model.options.cutoff_fn = "phys"
    c.model.options.charge_embedding = True

    c.train.num_steps = 24_000
    if stage == "second":
        c.optimizer.learning_rate, c.train.num_steps = 1e-3, 20_000
    c.train.log_every = 100
    c.train.valid_every = c.train.checkpoint_every = 1_000
    c.train.max_valid = 500
    return c
