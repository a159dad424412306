"""Convert a data set to a store: memory-mapped columns, for training in bounded memory.

    python -m mlip_jax.main --config=configs/convert.py --config.data.path=SPICE-2.0.1.hdf5 \\
        --workdir=stores/spice
    python -m mlip_jax.main --config=configs/spice.py --config.data.path=stores/spice \\
        --workdir=runs/spice

The format is detected (SPICE, GEOM, PubChemQCR, QM9, QM7-X, MD17/rMD17, ANI-1/ANI-1x,
Molecule3D, nabla2DFT, and any format ASE can read) or selected with --config.data.reader.
--config.data.reader_options="NAME=VALUE; NAME=VALUE" sets the options, which are described in
each file of mlip_jax/datasets/readers/. Every conversion is checked: units and signs of forces
against energies, distances, net forces, duplicates, missing labels. A file that fails is
rejected, unless --config.data.reject_invalid=False is set.

Training on a file first converts the file into a store in data/stores/. Convert it yourself to
filter it permanently, to choose the location of the store, or to use one conversion on many
machines. Rerun the same command to resume.

Hardware: CPU, all cores; 10,000 to 30,000 structures per second on one core, fewer if records
hold few conformations.
"""

import ml_collections

from mlip_jax.defaults import convert_defaults


def get_config() -> ml_collections.ConfigDict:
    return convert_defaults()
