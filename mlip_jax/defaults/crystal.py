"""Config fields of the task that computes properties of crystals."""

from __future__ import annotations

import dataclasses

from mlip_jax.defaults.bounds import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, Bounds
from mlip_jax.defaults.field import Field, optional, task
from mlip_jax.defaults.shared_parts import FMAX, FORCE_FIELD, MAX_STEPS, SYMPREC

CRYSTAL = task(
    "crystal",
    "Relaxed cells, equations of state and phonons of crystals.",
    FORCE_FIELD.replace(force_field=""),  # the force field of the package is for molecules
    input=Field("", "File of crystals: .xyz, .db, .cif or another format that ASE reads."),
    limit=optional(
        int,
        "Maximum number of crystals, taken from the start of the file.",
        bounds=AT_LEAST_ONE,
        unset="all crystals",
        changes_results=False,
    ),
    fmax=dataclasses.replace(FMAX, default=1e-3),
    max_steps=dataclasses.replace(MAX_STEPS, default=1_000),
    symprec=SYMPREC,
    volume_range=Field(
        0.06,
        "Largest relative change of the volume in the equation of state.",
        bounds=Bounds("(0, 0.5)"),
    ),
    num_volumes=Field(
        9, "Number of volumes of the equation of state; 0 skips it.", bounds=NOT_NEGATIVE
    ),
    supercell_length=Field(
        12.0,
        "Minimum distance between lattice planes of the supercell for phonons. Below twice the "
        "distance up to which atoms interact, the report has a remark. 0 skips the phonons.",
        unit="Å",
        bounds=NOT_NEGATIVE,
    ),
    mesh=Field(
        12, "Number of wave vectors along each reciprocal lattice vector.", bounds=AT_LEAST_ONE
    ),
    temperature=Field(298.15, "Temperature of the heat capacity.", unit="K", bounds=POSITIVE),
)
