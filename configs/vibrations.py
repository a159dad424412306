"""Compute vibrations and thermochemistry of molecules with a force field.

    python -m mlip_jax.main --config=configs/vibrations.py --config.force_field=runs/spice \\
        --config.input=molecules.smi \\
        --workdir=runs/vibrations

Each molecule of the file is relaxed in float64 until no force exceeds 1e-4 eV/Å. Frequencies are
those of the exact Hessian without translations and rotations. Zero-point energy, enthalpy, entropy
and free energy are those of an ideal gas of rigid rotors with harmonic vibrations, or of the
vibrations alone (--config.approximation=harmonic). --config.isotopes="H=2.0141" replaces masses.

The workdir contains thermochemistry.csv with one line per molecule, vibrations.csv with one line
per mode (imaginary frequencies are negative), modes/ with the modes as extended XYZ, and
report.html. Molecules without a result are listed with the reason. Rerun the same command to resume
with the molecules that are not done.

Hardware: one GPU, TPU core or CPU. The Hessian of n atoms costs about 3 n evaluations.
"""

import ml_collections

from mlip_jax.defaults import vibrations_defaults


def get_config() -> ml_collections.ConfigDict:
    return vibrations_defaults()
