"""The minima of molecules on a force field's energy surface, from SMILES or geometries, beside the reference method.

    python -m mlip_jax.main --config=configs/minima.py --config.force_field=runs/spice --config.input=molecules.smi \\
        --workdir=runs/minima

Of each SMILES `geometries` are embedded (RDKit's ETKDG) and relaxed; then, in `rounds`, dynamics at `temperature` begin
from the lowest minima, and their frames are relaxed. What is found twice (energies and heavy atoms alike, symmetries
considered) is one minimum. Molecules of a file with positions begin from those.

With --config.judged=10 the reference method (GFN2-xTB, or --config.oracle.method=package.module:Class of any ASE
calculator) gives the energies of the ten lowest minima of each molecule, where the force field has them and after its
own relaxation from there: the report has both orders beside each other.

In the workdir: minima.xyz and minima.csv with all minima by molecule and energy, report.html, metrics.json. A run that
is killed goes on with the molecules that are not done, `batch` of which are searched side by side.

Hardware: one GPU, TPU core or CPU.
"""

import ml_collections

from mlip_jax.defaults import minima_defaults


def get_config() -> ml_collections.ConfigDict:
    return minima_defaults()
