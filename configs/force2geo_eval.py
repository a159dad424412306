"""Evaluate relaxations of held-out molecules with a reference method, as in Force2Geo.

    python -m mlip_jax.main --config=configs/force2geo_eval.py \\
        --config.force_field=runs/spice --workdir=runs/eval
    python -m mlip_jax.main --config=configs/force2geo_eval.py --workdir=runs/compare \\
        --config.force_field="so3krates=runs/spice,painn=runs/spice_painn" \\
        --config.data.path=molecules.smi
    python -m mlip_jax.main --config=configs/force2geo_eval.py \\
        --config.force_field=runs/pubchemqcr \\
        --config.data.stage=pm3 --workdir=runs/eval_pm3

The molecules are 1,000 diverse ones (MaxMin by Morgan fingerprints) of the test split of the
force field's own data, or of a file: SMILES, which RDKit embeds, or any data that training can
read. From such data, the first snapshot of each molecule is the start. Molecules with the same
connectivity as one in the training or validation split of a force field are skipped. Every
start is relaxed with each force field and with the reference method: GFN2-xTB,
--config.oracle.method=GFN1-xTB, or any ASE calculator as
--config.oracle.method=package.module:Class --config.oracle.options="name=value; name=value",
whose module is imported and run. Labels and reference method should agree; otherwise the
results include their difference.

report.html compares the force fields with each other, the starts, the reference method and the
paper (arXiv:2507.00407, equations 10 to 14). results.csv has one line per force field and
molecule. Rerun the same command to resume.

Hardware: relaxations with the reference method take the longest, on all cores. With GFN2-xTB on
one core they take about 2 s for a molecule of 20 atoms and 20 s for one of 40, that is, between
half an hour and five hours for 1,000 molecules. --config.oracle.cache=FILE shares them between
runs.
"""

import ml_collections

from mlip_jax.defaults import force2geo_defaults


def get_config() -> ml_collections.ConfigDict:
    return force2geo_defaults()
