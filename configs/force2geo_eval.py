"""How well a force field relaxes molecules that it never saw, by a reference method: Force2Geo's evaluation.

    python -m mlip_jax.main --config=configs/force2geo_eval.py --config.force_field=runs/spice --workdir=runs/eval
    python -m mlip_jax.main --config=configs/force2geo_eval.py --workdir=runs/compare \\
        --config.force_field="so3krates=runs/spice,painn=runs/spice_painn" --config.data.path=molecules.smi
    python -m mlip_jax.main --config=configs/force2geo_eval.py --config.force_field=runs/pubchemqcr \\
        --config.data.stage=pm3 --workdir=runs/eval_pm3

1,000 diverse molecules (MaxMin by Morgan fingerprints) of the test part of the force field's own data, or of a file:
SMILES, which RDKit embeds, or whatever training can read, of which each molecule starts from its first snapshot.
Molecules that are connected like one of a force field's training or validation part are left out. Each start is
relaxed by each force field, and by the oracle itself: GFN2-xTB, or --config.oracle.method=GFN1-xTB, or any ASE
calculator, --config.oracle.method=package.module:Class --config.oracle.options="name=value; name=value", whose module
is imported and run. Labels and oracle should be of one method: else the report is of the difference between them, too.

report.html compares the force fields with each other, the starts, the oracle and the paper (arXiv:2507.00407, equations
10 to 14); results.csv has a line for each force field and molecule. Killed, the same command goes on.

Hardware: the oracle's own relaxations take the longest, on all cores: with GFN2-xTB about 2 s for a molecule of 20
atoms and 20 s for one of 40 on one core, so between half an hour and five hours for 1,000 molecules.
--config.oracle.cache=FILE shares them between runs.
"""

import ml_collections

from mlip_jax.defaults import force2geo_defaults


def get_config() -> ml_collections.ConfigDict:
    return force2geo_defaults()
