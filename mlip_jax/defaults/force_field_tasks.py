"""Config fields of the tasks that calibrate, export and download force fields."""

from __future__ import annotations

from mlip_jax.defaults.bounds import AT_LEAST_ONE
from mlip_jax.defaults.bundled import BUNDLED
from mlip_jax.defaults.data import dtype, seed
from mlip_jax.defaults.field import Field, optional, task

ENSEMBLE = task(
    "ensemble",
    "Calibration of the uncertainty of an ensemble of force fields.",
    members=Field(
        "",
        'Workdirs of training runs, as in "runs/a,runs/b,runs/c"; the data are those of the first.',
    ),
    max_structures=Field(
        2_000, "Maximum number of structures of the fit, and of the check.", bounds=AT_LEAST_ONE
    ),
    seed=seed("the choice of the structures"),
)

EXPORT = task(
    "export",
    "Export of a force field as a StableHLO program and a file of parameters.",
    force_field=Field(BUNDLED, "Force field: a workdir, or another value that task relax accepts."),
    max_atoms=Field(64, "Maximum number of atoms of a structure.", bounds=AT_LEAST_ONE),
    max_pairs=optional(
        int,
        "Maximum number of pairs within the cutoff, each counted once.",
        bounds=AT_LEAST_ONE,
        unset="all pairs of max_atoms atoms, or those of a dense solid",
    ),
    max_long_range_pairs=optional(
        int,
        "Maximum number of pairs within the long-range cutoff, each counted once.",
        bounds=AT_LEAST_ONE,
        unset="as for max_pairs",
    ),
    periodic=Field(False, "Support of periodic cells, with stress."),
    dtype=dtype("the program"),
    platforms=Field(
        ("cpu", "cuda", "tpu"), "Platforms of the program.", choices=("cpu", "cuda", "rocm", "tpu")
    ),
)

PUBLISHED = task(
    "published",
    "List of published force fields, and the download of one of them.",
    download=Field("", "Name of a force field to download into the cache."),
)
