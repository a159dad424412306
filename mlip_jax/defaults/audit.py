"""Config fields of the task that audits force fields."""

from __future__ import annotations

import dataclasses

from mlip_jax.defaults.bounds import AT_LEAST_ONE, POSITIVE
from mlip_jax.defaults.data import dtype
from mlip_jax.defaults.field import Field, Part, task
from mlip_jax.defaults.shared_parts import FORCE_FIELD, ORACLE

CHECKS = ("bonds", "torsions", "conformers", "dimers", "rings", "dynamics")

AUDIT = task(
    "audit",
    "Audit of a force field: bond and torsion scans, conformers, dimers, rings and dynamics of small "
    "molecules.",
    FORCE_FIELD,
    checks=Field(CHECKS, "Checks to run.", choices=CHECKS),
    oracle=Part(
        ORACLE.description,
        method=Field(
            "GFN2-xTB",
            'Name of the reference method, "package.module:Class" of an ASE calculator, whose module '
            "is imported and run, or none.",
            choices=("GFN2-xTB", "GFN1-xTB", "IPEA1-xTB", "none"),
            free_mark=":",
        ),
        options=ORACLE.members["options"],
    ),
    num_conformers=Field(8, "Number of conformers per molecule.", bounds=AT_LEAST_ONE),
    picoseconds=Field(2.0, "Length of each trajectory.", unit="ps", bounds=POSITIVE),
    temperature=Field(
        500.0, "Temperature of the dynamics that test the stability.", unit="K", bounds=POSITIVE
    ),
    dtype=dataclasses.replace(dtype("scans and relaxations"), default="float64"),
)
