"""Search for the minima of molecules with a force field; compare with a reference method.

    python -m mlip_jax.main --config=configs/minima.py --config.force_field=runs/spice \\
        --config.input=molecules.smi \\
        --workdir=runs/minima

For each SMILES, `geometries` are embedded (RDKit's ETKDG) and relaxed. Then, in `rounds`,
dynamics at `temperature` start from the lowest minima, and frames of these trajectories are
relaxed. Geometries that agree in energy and heavy atoms, with symmetry taken into account, are
one minimum. For a file with positions, the search starts from these.

With --config.num_reference_minima=10 the reference method (GFN2-xTB, or any ASE calculator as
--config.oracle.method=package.module:Class) evaluates the ten lowest minima of each molecule
and relaxes them. The report shows the order of the minima by both methods.

The workdir contains minima.xyz and minima.csv with all minima by molecule and energy,
report.html and metrics.json. Rerun the same command to resume with the molecules that are not
done. `batch_molecules` molecules are searched in parallel.

Hardware: one GPU, TPU core or CPU.
"""

import ml_collections

from mlip_jax.defaults import minima_defaults


def get_config() -> ml_collections.ConfigDict:
    return minima_defaults()
