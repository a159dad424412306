"""Relax the cells of crystals, and compute equations of state and phonons with a force field.

    python -m mlip_jax.main --config=configs/crystal.py --config.force_field=runs/salts \\
        --config.input=crystals.xyz \\
        --workdir=runs/crystals

Each crystal of the file is relaxed with its cell in float64 (steps of ASE's FrechetCellFilter). A
Birch-Murnaghan equation of state is fitted to its energies at nine volumes, with relaxed atoms.
Phonons are those of the exact Hessian of a supercell, along the special points of the lattice and
on a mesh. All crystals and volumes are relaxed in batches. --config.symprec=0.01 refines the symmetry
of each crystal and keeps its space group at all volumes (needs spglib).

The workdir contains crystals.csv with one line per crystal, relaxed.xyz, equations_of_state.csv,
phonons/ with the frequencies of each crystal, and report.html. Crystals without a result are listed
with the reason. Rerun the same command to resume with the crystals that are not done.

Hardware: one GPU, TPU core or CPU. Phonons of a cell of n atoms cost about 3 n evaluations of the
supercell; --config.supercell_length=0 skips them.
"""

import ml_collections

from mlip_jax.defaults import crystal_defaults


def get_config() -> ml_collections.ConfigDict:
    return crystal_defaults()
