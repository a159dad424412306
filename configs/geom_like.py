"""Generate conformers of your own molecules with GFN2-xTB energies and forces, similar to GEOM.

    pip install 'mlip-flax[data]'
    python -m mlip_jax.main --config=configs/geom_like.py --workdir=runs/geom_drugs \\
        --config.smiles=drugs.smi
    python -m mlip_jax.main --config=configs/geom_like.py:small --workdir=runs/geom_small \\
        --config.smiles=gdb.csv

The first command is for drug-like molecules to train on. The second is for small molecules,
such as those of QM9 with at most 9 heavy atoms, on which a force field of the first is tested
out of distribution. ETKDG generates twice as many geometries as required, MMFF94 relaxes them,
those within 0.25 Å of another are removed, and GFN2-xTB labels the rest. conformers.gfn2_steps
relaxes them with GFN2-xTB first, at that many times the cost.

Hardware: CPU only, all cores. Cost: 0.06 s of one core per conformer of a molecule of 30 atoms,
two thirds of it GFN2-xTB; 0.03 s per conformer of a QM9 molecule; 4 s for a molecule whose
stereochemistry has no geometry. Rerun the same command to resume. The files have SPICE's
layout: "--config.data.path=runs/geom_drugs/data/*.hdf5" trains on them.
"""

import ml_collections

from mlip_jax.config import unknown_name
from mlip_jax.defaults import conformers_defaults

SETS = ("drugs", "small")


def get_config(which: str = "drugs") -> ml_collections.ConfigDict:
    if which not in SETS:
        raise ValueError(unknown_name("set of this config", which, SETS))
    c = conformers_defaults()
    c.select.elements = ("H", "C", "N", "O", "F", "S", "Cl")
    c.subset = "Drug-like conformers"
    c.num_molecules = 1_500
    c.select.max_atoms = 34  # for a low cost; most drugs have about 50
    c.select.min_rotatable = 3
    c.conformers.num_conformers = 20
    c.conformers.min_conformers = 10
    if which == "small":
        c.subset = "Small-molecule conformers"
        c.num_molecules = 300
        c.select.max_atoms = 29
        c.select.min_rotatable = 0
        c.conformers.num_conformers = 4
        c.conformers.min_conformers = 1
    return c
