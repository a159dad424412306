"""Config fields of the tasks that relax molecules, search minima and predict properties."""

from __future__ import annotations

import dataclasses
import pkgutil
from pathlib import Path

from mlip_jax.defaults.bounds import AT_LEAST_ONE, FINITE, FRACTION, NOT_NEGATIVE, POSITIVE, Bounds
from mlip_jax.defaults.bundled import BUNDLED
from mlip_jax.defaults.data import DATA, dtype, num_processes, seed
from mlip_jax.defaults.field import Field, Part, optional, task

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
    symprec=optional(
        float,
        "Tolerance of the space groups that the structures keep, as with ASE's constraint "
        "FixSymmetry; requires spglib.",
        unit="Å",
        bounds=POSITIVE,
        unset="symmetry is not enforced",
        legacy_value=None,
    ),
)

EVALUATE = task(
    "evaluate",
    "Evaluation of a force field on a data set, or its predictions for structures without labels.",
    force_field=Field(
        BUNDLED,
        "Force field, in any form that task relax accepts; several separated by commas are an "
        'ensemble, as in "runs/a,runs/b".',
    ),
    data=Part("Structures to evaluate.", DATA.replace(require="none")),
    calibration=Field(
        "", "Calibration of the ensemble, the workdir of a run of task ensemble; if empty, none."
    ),
    max_structures=optional(
        int,
        "Maximum number of structures, which are drawn at random.",
        bounds=AT_LEAST_ONE,
        unset="all structures",
    ),
    dtype=dtype("the predictions"),
    batch_atoms=optional(
        int,
        "Average number of atoms per batch. Batches are smaller if the compiled program needs more "
        "memory than the device has.",
        bounds=AT_LEAST_ONE,
        unset="chosen for the device",
        changes_results=False,
    ),
    align_energies=Field(
        False,
        "Comparison of energies after a fit of per-element energies to their errors, for data of "
        "another level of theory than the force field.",
    ),
    write_structures=Field(
        True, "Writing of predictions.xyz, the structures with all predictions."
    ),
    seed=seed("the choice of structures and the embedding of SMILES"),
)

RELAX = task(
    "relax",
    "Relaxation of molecules or crystals with a force field.",
    FORCE_FIELD,
    SEPARATE_MOLECULES,
    MINIMIZER,
    CELL,
    num_conformers=Field(
        1, "Number of geometries that are embedded per SMILES.", bounds=AT_LEAST_ONE
    ),
    seed=seed("the embedding"),
    num_processes=num_processes("that embed SMILES, per process of the run"),
    trajectory_every=Field(
        0,
        "Number of steps between the frames of trajectories.xyz; 0 writes no frames.",
        bounds=NOT_NEGATIVE,
    ),
    formats=Field(
        ("xyz", "sdf"),
        "Formats of the relaxed molecules; relaxed.sdf requires known bonds.",
        choices=("xyz", "sdf"),
    ),
)

PREDICT = task(
    "predict",
    "Prediction of properties with a trained predictor.",
    Part(
        "",
        predictor=Field(
            "",
            'Workdir of a run of task "property"; several are an ensemble, as in '
            '"runs/gap-0,runs/gap-1".',
        ),
    ),
    SEPARATE_MOLECULES,
    force_field=optional(
        str,
        "Force field that relaxes the molecules first: a workdir, or another value that task relax "
        "accepts; "
        '"none" predicts at the given or embedded geometries.',
        unset="none; required for predictors of relaxed geometries",
    ),
    seed=seed("the embedding"),
    num_processes=num_processes("that embed SMILES, per process of the run"),
    fmax=LOOSE_FMAX,
    max_steps=MAX_STEPS,
    batch_size=Field(
        64,
        "Number of molecules per batch of the predictor.",
        bounds=AT_LEAST_ONE,
        changes_results=False,
    ),
)

MINIMA = task(
    "minima",
    "Search for the low-energy minima of molecules.",
    FORCE_FIELD,
    MOLECULES,
    num_conformers=Field(
        20,
        "Number of geometries that are embedded per SMILES.",
        bounds=AT_LEAST_ONE,
        former_name="geometries",
    ),
    batch_molecules=Field(
        16,
        "Number of molecules that are searched in parallel.",
        bounds=AT_LEAST_ONE,
        former_name="batch",
    ),
    search=Part(
        "Search by relaxation and short dynamics; see simulation/relaxation/minima.py.",
        rounds=Field(
            2,
            "Number of rounds of dynamics; 0 only relaxes the embedded geometries.",
            bounds=NOT_NEGATIVE,
        ),
        replicas=Field(8, "Number of trajectories per molecule and round.", bounds=AT_LEAST_ONE),
        temperature=Field(600.0, "Temperature of the dynamics.", unit="K", bounds=POSITIVE),
        picoseconds=Field(1.0, "Length of each trajectory.", unit="ps", bounds=POSITIVE),
        frames=Field(4, "Number of frames per trajectory that are relaxed.", bounds=AT_LEAST_ONE),
        window=Field(
            0.5,
            "Energy above the lowest minimum up to which minima are kept.",
            unit="eV",
            bounds=POSITIVE,
        ),
        fmax=dataclasses.replace(FMAX, default=0.02),
        final_fmax=Field(
            0.001,
            "Maximum force on an atom of the minima, which are relaxed further in float64 after "
            "the search.",
            unit="eV/Å",
            bounds=POSITIVE,
        ),
        max_steps=MAX_STEPS,
        energy_tolerance=Field(
            0.005,
            "Energy difference below which two minima can be the same.",
            unit="eV",
            bounds=POSITIVE,
            former_name="same_energy",
        ),
        rmsd_tolerance=Field(
            0.125,
            "RMSD below which two minima of the same energy are the same.",
            unit="Å",
            bounds=POSITIVE,
            former_name="same_rmsd",
        ),
        merge_mirror_images=Field(
            False, "Counting of a minimum and its mirror image as one minimum."
        ),
        timestep=Field(0.5, "Time step of the dynamics.", unit="fs", bounds=POSITIVE),
        dtype=dtype("relaxations and dynamics of the search"),
        seed=seed("the dynamics"),
    ),
    population_temperature=Field(
        298.15, "Temperature of the Boltzmann populations.", unit="K", bounds=POSITIVE
    ),
    num_reference_minima=Field(
        0,
        "Number of lowest minima per molecule that the reference method evaluates.",
        bounds=NOT_NEGATIVE,
        former_name="judged",
    ),
    oracle=ORACLE,
)

FORCE2GEO = task(
    "force2geo_eval",
    "Evaluation of relaxed geometries by a reference method, as in Force2Geo.",
    seed=seed("the selection of molecules, the embedding of SMILES and the bootstrap"),
    force_field=optional(
        str,
        'Workdir of a training run, or several to compare, as in "name=path,name2=path2".',
        unset="not allowed",
    ),
    data=Part(
        "Molecules and their starting geometries.",
        DATA.replace(require="none"),
        stage=optional(
            str,
            'Subset of the data, such as "pm3", whose first snapshot is the start of a molecule.',
            unset="any subset",
        ),
        reference=Field(
            "oracle",
            "Minimum that relaxed geometries are compared with.",
            choices={
                "oracle": "relaxed by the reference method from the same start",
                "data": "the last snapshot of data.reference_stage",
            },
        ),
        reference_stage=optional(
            str,
            'Subset of the data, such as "DFT_1st", with the minima of data.reference="data".',
            unset="none",
        ),
        num_molecules=Field(1_000, "Maximum number of molecules.", bounds=AT_LEAST_ONE),
        selection=Field(
            "maxmin",
            "Selection of the molecules.",
            choices={"maxmin": "most dissimilar fingerprints", "random": "", "all": ""},
            legacy_value="random",
        ),
        first=optional(
            str,
            "Name of the molecule that the selection by dissimilarity starts with.",
            unset="a random molecule",
        ),
        allow_seen=Field(
            False, "Use of molecules from the training or validation split of a force field."
        ),
    ),
    relax=MINIMIZER.replace(
        fmax=LOOSE_FMAX, max_steps=dataclasses.replace(MAX_STEPS, bounds=NOT_NEGATIVE)
    ),
    oracle=Part(
        "Reference method.",
        ORACLE,
        fmax=Field(
            0.05,
            "Maximum force on an atom of a converged relaxation by the reference method.",
            unit="eV/Å",
            bounds=POSITIVE,
        ),
        max_steps=Field(
            500,
            "Maximum number of steps of a relaxation by the reference method.",
            bounds=NOT_NEGATIVE,
        ),
        cache=Field(
            "",
            "File with the results of the reference method, which runs may share; if empty, "
            "oracle.jsonl in the workdir.",
            changes_results=False,
        ),
    ),
    metrics=Part(
        "Limits of the metrics.",
        chemical_accuracy=Field(
            1.0,
            "Energy above the minimum of the reference method up to which a relaxation succeeds.",
            unit="kcal/mol",
            bounds=NOT_NEGATIVE,
        ),
        fmax=Field(
            0.05,
            "Maximum force on an atom, by the reference method, of a converged geometry.",
            unit="eV/Å",
            bounds=NOT_NEGATIVE,
        ),
        min_gap=Field(
            1e-3,
            "Energy between start and minimum below which a percentage is undefined.",
            unit="eV",
            bounds=NOT_NEGATIVE,
        ),
        num_bootstrap=Field(1_000, "Number of bootstrap samples.", bounds=Bounds("[2, inf)")),
    ),
)
