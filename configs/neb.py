"""Find minimum-energy paths and barriers of reactions with a force field.

    python -m mlip_jax.main --config=configs/neb.py --config.force_field=runs/spice \\
        --config.input=reactions.xyz \\
        --workdir=runs/reactions

The input contains both ends of each reaction, with the atoms in the same order, or all images of a
path. Structures with the same name are one path; without names, each two consecutive structures are
the ends of a path. The ends are relaxed, images between them are interpolated, and all images of
all paths are optimized in one program, with the steps of ASE's NEB (improved tangent, climbing
image).

The workdir contains barriers.csv with one line per path, paths.xyz with all images, and report.html
with the energy profiles. Paths without a result are listed with the reason. Rerun the same command
to resume with the paths that are not done.

Hardware: one GPU, TPU core or CPU.
"""

import ml_collections

from mlip_jax.defaults import neb_defaults


def get_config() -> ml_collections.ConfigDict:
    return neb_defaults()
