"""Config fields that several tasks share: molecules, force field, reference method, relaxation."""

from __future__ import annotations

import dataclasses
import pkgutil
from pathlib import Path

from mlip_jax.defaults.bounds import AT_LEAST_ONE, FINITE, FRACTION, NOT_NEGATIVE, POSITIVE
from mlip_jax.defaults.bundled import BUNDLED
from mlip_jax.defaults.data import dtype, num_processes
from mlip_jax.defaults.field import Field, Part, optional

# Minimizers: the files of that folder, which is listed rather than imported, because an import
# takes seconds.
MINIMIZERS = tuple(
    sorted(
        m.name
        for m in pkgutil.iter_modules(
            [str(Path(__file__).parents[1] / "simulation" / "relaxation" / "minimizers")]
        )
    )
)

# Importers of force fields, which are listed for the same reason.
IMPORTERS = tuple(
    sorted(
        m.name
        for m in pkgutil.iter_modules([str(Path(__file__).parents[1] / "importers")])
        if not m.ispkg
    )
)

MOLECULES = Part(
    "Molecules of a file.",
    input=Field(
        "",
        "File of molecules: .smi, .csv, .sdf, .xyz, .db, another format that ASE reads, or a "
        "store.",
    ),
    smiles_column=Field("", "Column of the SMILES in a CSV file; if empty, it is detected."),
    name_column=Field("", "Column of the names in a CSV file; if empty, it is detected."),
    limit=optional(
        int,
        "Number of molecules, taken from the start of the file.",
        bounds=AT_LEAST_ONE,
        unset="all molecules",
    ),
    mmff=Field(False, "Relaxation with MMFF94 of geometries that are embedded from SMILES."),
)
# Each molecule has its own result, so a rerun with another limit keeps the finished ones.
SEPARATE_MOLECULES = MOLECULES.replace(
    limit=dataclasses.replace(MOLECULES.members["limit"], changes_results=False)
)

FORCE_FIELD = Part(
    "Force field.",
    force_field=Field(
        BUNDLED,
        f"Force field: {BUNDLED}, which comes with the package, for molecules; the workdir of a "
        "training run; a file of MACE, SevenNet, NequIP, SchNetPack, TorchMD-Net or SO3LR, as in "
        "X.model or checkpoint.pth#modality=PBE; the name of a published force field, as in "
        "sevennet-0; or IMPORTER:FILE for weights of another program. "
        f"Importers: {', '.join(IMPORTERS)}.",
    ),
)

ORACLE = Part(
    "Reference method.",
    method=Field(
        "GFN2-xTB",
        'Name of the reference method, or "package.module:Class" of an ASE calculator, whose '
        "module is imported and run.",
        choices=("GFN2-xTB", "GFN1-xTB", "IPEA1-xTB"),
        free_mark=":",
    ),
    options=Field(
        "", 'Keyword arguments of the reference method, as in "accuracy=0.1; max_iterations=500".'
    ),
    num_processes=num_processes("that run the reference method"),
)

FMAX = Field(
    0.005, "Maximum force on an atom of a converged relaxation.", unit="eV/Å", bounds=POSITIVE
)
# As in Force2Geo, and for the geometries of predictors of properties, which were trained on these.
LOOSE_FMAX = dataclasses.replace(FMAX, default=0.05)
MAX_STEPS = Field(500, "Maximum number of steps of a relaxation.", bounds=AT_LEAST_ONE)
MINIMIZER = Part(
    "Relaxation.",
    optimizer=Field("bfgs", "Minimizer.", choices=MINIMIZERS),
    fmax=FMAX,
    max_steps=MAX_STEPS,
    maxstep=Field(0.2, "Maximum displacement of an atom per step.", unit="Å", bounds=POSITIVE),
    dtype=dtype("the relaxation"),
    batch_atoms=optional(
        int,
        "Number of atoms that are relaxed in parallel. Batches are smaller if the compiled program "
        "needs more memory than the device has.",
        bounds=NOT_NEGATIVE,
        unset="chosen for the device",
        changes_results=False,
    ),
)

SYMPREC = optional(
    float,
    "Tolerance of the space groups that the structures keep, as with ASE's constraint "
    "FixSymmetry; requires spglib.",
    unit="Å",
    bounds=POSITIVE,
    unset="symmetry is not enforced",
    legacy_value=None,
)
CELL = Part(
    "Relaxation of the cells of periodic structures.",
    cell=optional(
        str,
        "Filter that relaxes the cells of periodic structures together with the atoms.",
        choices={"frechet": "FrechetCellFilter of ASE", "unitcell": "UnitCellFilter of ASE"},
        unset="cells are kept",
        legacy_value=None,
    ),
    mask=Field(
        (1, 1, 1, 1, 1, 1),
        "Components of the strain that are relaxed (1) or fixed (0), in the order xx, yy, zz, yz, "
        "xz, xy.",
        bounds=FRACTION,
        only_with=("cell",),
    ),
    scalar_pressure=Field(
        0.0,
        "External pressure; 1 GPa is 0.00624 eV/Å³.",
        unit="eV/Å³",
        bounds=FINITE,
        only_with=("cell",),
    ),
    hydrostatic_strain=Field(False, "Fixed shape of the cells.", only_with=("cell",)),
    constant_volume=Field(False, "Fixed volume of the cells.", only_with=("cell",)),
    symprec=SYMPREC,
)
