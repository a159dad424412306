"""Turns any data set into a store: memory-mapped columns that training reads at random, in a bounded amount of memory.

    python -m mlip_jax.main --config=configs/convert.py --config.data.path=SPICE-2.0.1.hdf5 --workdir=stores/spice
    python -m mlip_jax.main --config=configs/spice.py --config.data.path=stores/spice --workdir=runs/spice

The format is recognised (SPICE, GEOM, PubChemQCR, QM9, QM7-X, MD17/rMD17, ANI-1/ANI-1x, Molecule3D, nabla2DFT, and what
ASE reads); --config.data.reader names it, --config.data.reader_options="NAME=VALUE; NAME=VALUE" gives the options that
each file of mlip_jax/datasets/readers/ has. Every conversion is checked: units and signs of forces against energies,
distances, net forces, duplicates, missing labels. A file that fails is refused; --config.data.refuse=False takes it all
the same.

Training on a file converts it by itself, into data/stores/. Convert by hand to filter for good, to choose where the
store lies, or for data sets of which one conversion should serve many machines. Killed, the same command goes on.

Hardware: CPU, all cores; 10,000 to 30,000 structures a second on one, less where records hold few conformations.
"""

import ml_collections

from mlip_jax.defaults import convert_defaults


def get_config() -> ml_collections.ConfigDict:
    return convert_defaults()
