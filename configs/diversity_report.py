"""Report on a diversity study: curves, errors by distance, a table and confirmed findings.

    python -m mlip_jax.main --config=configs/diversity_report.py --workdir=runs/diversity \\
        --config.sweeps=runs/n_fixed,runs/ns_fixed

The report covers the runs that are evaluated so far and takes seconds. The page is
runs/diversity/diversity.html.
"""

import ml_collections

from mlip_jax.defaults import diversity_report_defaults


def get_config() -> ml_collections.ConfigDict:
    return diversity_report_defaults()
