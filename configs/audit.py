"""Audit a force field: examine it with generated geometries of small molecules.

    python -m mlip_jax.main --config=configs/audit.py
    python -m mlip_jax.main --config=configs/audit.py --config.force_field=sevennet-0 \\
        --workdir=runs/audit_sevennet

The checks are bond scans (smoothness), torsion scans, conformer energies, dimers, relaxed aromatic
rings (planarity, bond lengths) and dynamics (energy drift, broken bonds). Torsions, conformers,
dimers and bond lengths are compared with GFN2-xTB if tblite is installed, or with any ASE
calculator as --config.oracle.method=package.module:Class. For a force field of another reference
method, these differences are not errors. RDKit generates the geometries.

The workdir contains report.html and metrics.json. Hardware: CPU. Time: 3 CPU-minutes.
"""

import ml_collections

from mlip_jax.defaults import audit_defaults


def get_config() -> ml_collections.ConfigDict:
    return audit_defaults()
