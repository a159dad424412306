"""Config fields of the tasks that relax molecules, search minima and predict properties."""

from __future__ import annotations

import dataclasses

from mlip_jax.defaults.bounds import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, PROBABILITY, Bounds
from mlip_jax.defaults.bundled import BUNDLED
from mlip_jax.defaults.data import DATA, dtype, num_processes, seed
from mlip_jax.defaults.field import Field, Part, optional, task
from mlip_jax.defaults.shared_parts import (
    CELL,
    FMAX,
    FORCE_FIELD,
    LOOSE_FMAX,
    MAX_STEPS,
    MINIMIZER,
    MOLECULES,
    ORACLE,
    SEPARATE_MOLECULES,
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
    num_conformers=Field(
        1,
        "Number of geometries that are embedded per SMILES; predictions are their average.",
        bounds=AT_LEAST_ONE,
    ),
    conformer_weights=Field(
        "mean",
        "Weights of the conformers in the average.",
        choices={"mean": "equal", "boltzmann": "by the energy of force_field"},
    ),
    temperature=Field(298.15, "Temperature of the Boltzmann weights.", unit="K", bounds=POSITIVE),
    coverage=Field(
        0.9,
        "Probability that the interval from PREDICTION_lower to PREDICTION_upper contains the "
        "property.",
        bounds=PROBABILITY,
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
