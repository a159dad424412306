"""List the published force fields that can be used by name, and download one of them.

    python -m mlip_jax.main --config=configs/published.py
    python -m mlip_jax.main --config=configs/published.py --config.download=mace-mp-0-small

The table has elements, reference method, license, citation and source of each. It is printed; no
workdir is created. A download is stored in the folder MLIP_JAX_FORCE_FIELDS, by
default ~/.cache/mlip_jax/force_fields. You can use its name wherever a force field is expected, as in
--config.force_field=mace-mp-0-small; the file is then downloaded at first use.

Hardware: any. Takes a second, plus the download.
"""

import ml_collections

from mlip_jax.defaults import published_defaults


def get_config() -> ml_collections.ConfigDict:
    return published_defaults()
