"""What a data set is: the columns of the papers' tables, distributions as a figure, and what the checks say.

    python -m mlip_jax.main --config=configs/inspect_data.py --config.data.path=FILE_OR_STORE --workdir=runs/look

Prints a summary, and writes dataset.md, dataset.png, dataset.json and left_out.csv (what filters took) to the workdir.
A file is converted into a store first (configs/convert.py), whatever the checks find; the filters of config.data apply.
Hardware: CPU; some 10,000 structures a second and core for the conversion, about as long for the rest.
"""

import ml_collections

from mlip_jax.defaults import inspect_defaults


def get_config() -> ml_collections.ConfigDict:
    return inspect_defaults()
