"""Inspect a data set: a table, a figure of its distributions, and the results of the checks.

    python -m mlip_jax.main --config=configs/inspect_data.py --config.data.path=FILE_OR_STORE \\
        --workdir=runs/look

The task prints a summary and writes dataset.md, dataset.png, dataset.json and left_out.csv
(structures removed by filters) to the workdir. A file is first converted into a store
(configs/convert.py), whether or not it passes the checks; the filters of config.data apply.

Hardware: CPU; about 10,000 structures per second and core for the conversion, about as long for
the rest.
"""

import ml_collections

from mlip_jax.defaults import inspect_defaults


def get_config() -> ml_collections.ConfigDict:
    return inspect_defaults()
