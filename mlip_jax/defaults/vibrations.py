"""Config fields of the task that computes vibrations and thermochemistry."""

from __future__ import annotations

import dataclasses

from mlip_jax.defaults.bounds import AT_LEAST_ONE, POSITIVE
from mlip_jax.defaults.data import num_processes, seed
from mlip_jax.defaults.field import Field, optional, task
from mlip_jax.defaults.shared_parts import FMAX, FORCE_FIELD, MAX_STEPS, SEPARATE_MOLECULES

VIBRATIONS = task(
    "vibrations",
    "Vibrations and thermochemistry of molecules.",
    FORCE_FIELD,
    SEPARATE_MOLECULES,
    temperature=Field(298.15, "Temperature.", unit="K", bounds=POSITIVE),
    pressure=Field(1.01325, "Pressure of the ideal gas.", unit="bar", bounds=POSITIVE),
    symmetry_number=optional(
        int,
        "Rotational symmetry number of all molecules.",
        bounds=AT_LEAST_ONE,
        unset="found from each geometry",
    ),
    approximation=Field(
        "ideal_gas",
        "Approximation of the free energy.",
        choices={
            "ideal_gas": "translation, rigid rotor and harmonic vibrations",
            "harmonic": "harmonic vibrations alone",
        },
    ),
    isotopes=Field(
        "", 'Masses (amu) of elements in place of the average ones, as in "H=2.0141,C=13.0034".'
    ),
    relaxed=Field(
        False,
        "Use of the geometries as they are: stationary points, which may be transition states.",
    ),
    fmax=dataclasses.replace(FMAX, default=1e-4),
    max_steps=dataclasses.replace(MAX_STEPS, default=1_000),
    seed=seed("the embedding"),
    num_processes=num_processes("that embed SMILES"),
)
