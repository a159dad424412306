"""Export a force field for other programs: a StableHLO program and open parameter files.

    python -m mlip_jax.main --config=configs/export.py --config.force_field=runs/spice \\
        --config.max_atoms=64 \\
        --workdir=runs/exported

In the workdir:

    force_field.stablehlo, force_field.json    energies and forces of up to max_atoms atoms, with
                                               the parameters, and a description of the inputs;
                                               mlip_jax/simulation/export.py shows how to evaluate
                                               the program in Python
    parameters.safetensors, parameters.json    the same force field as arrays and a description,
                                               which can be used as the force field
                                               parameters:runs/exported
    domain.npz                                 domain of the force field, if it is known, for
                                               warnings about structures unlike the training data

Hardware: any; the platforms of the program are not required. Takes seconds.
"""

import ml_collections

from mlip_jax.defaults import export_defaults


def get_config() -> ml_collections.ConfigDict:
    return export_defaults()
