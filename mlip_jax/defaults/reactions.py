"""Config fields of the task that finds minimum-energy paths of reactions."""

from __future__ import annotations

import dataclasses

from mlip_jax.defaults.bounds import AT_LEAST_ONE, POSITIVE
from mlip_jax.defaults.data import dtype
from mlip_jax.defaults.field import Field, task
from mlip_jax.defaults.shared_parts import FMAX, FORCE_FIELD, MINIMIZER

NEB = task(
    "neb",
    "Minimum-energy paths of reactions by nudged elastic bands.",
    FORCE_FIELD.replace(force_field=""),  # the force field of the package is not for reactions
    MINIMIZER.replace(
        fmax=dataclasses.replace(FMAX, default=0.05),
        dtype=dataclasses.replace(dtype("the bands"), default="float64"),
        batch_atoms=dataclasses.replace(
            MINIMIZER.members["batch_atoms"],
            description="Number of atoms, summed over the images that are evaluated together.",
        ),
    ),
    input=Field(
        "",
        "File of structures: .xyz, .db or another format that ASE reads. Consecutive structures with "
        "the same name form a path; without names, structures 1 and 2, 3 and 4, ... are its ends.",
    ),
    num_images=Field(
        7, "Number of images between the ends of a path with two structures.", bounds=AT_LEAST_ONE
    ),
    interpolation=Field(
        "idpp",
        "Interpolation between two ends.",
        choices={"idpp": "image-dependent pair potential", "linear": ""},
    ),
    relax_ends=Field(True, "Relaxation of the ends before the band."),
    climb=Field(True, "Climbing of the highest image to the saddle point."),
    spring=Field(
        0.1, "Force constant of the springs between images.", unit="eV/Å²", bounds=POSITIVE
    ),
)
