"""A force field for programs without this package: StableHLO that JAX alone runs, and open parameter files.

    python -m mlip_jax.main --config=configs/export.py --config.force_field=runs/spice --config.max_atoms=64 \\
        --workdir=runs/exported

In the workdir:

    force_field.stablehlo, force_field.json          energies and forces of up to max_atoms atoms, parameters included,
                                                     and what to hand over; mlip_jax/simulation/export.py shows the
                                                     lines of Python that evaluate it
    parameters.safetensors, parameters.json          the same force field as arrays and a description; it is read back
                                                     wherever a force field is named, as parameters:runs/exported

Hardware: none is needed for the platforms that are exported for; takes seconds.
"""

import ml_collections

from mlip_jax.defaults import export_defaults


def get_config() -> ml_collections.ConfigDict:
    return export_defaults()
