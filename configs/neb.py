"""Find minimum-energy paths and barriers of reactions with a force field.

    python -m mlip_jax.main --config=configs/neb.py --config.force_field=runs/spice \\
        --config.input=reactions.xyz \\
        --workdir=runs/reactions

The input contains both ends of each reaction, or all images of its path, with the atoms in the same
order. Consecutive structures with the same name form a path. In a file without names, structures 1
and 2, 3 and 4, ... are the ends of a path. The ends are relaxed, images between them are
interpolated, and all images of many paths are optimized in parallel, with the steps of ASE's NEB
(improved tangent, climbing image).

The workdir contains barriers.csv with one line per path, paths.xyz with all images, and report.html
with the energy profiles. Paths without a result are listed with the reason. Rerun the same command
to resume with the paths that are not done.

Hardware: one GPU, TPU core or CPU.
"""

import ml_collections

from mlip_jax.defaults import neb_defaults


def get_config() -> ml_collections.ConfigDict:
    return neb_defaults()
