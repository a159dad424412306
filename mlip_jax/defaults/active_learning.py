"""Config fields of active learning: a budget of labels, candidates, choice and training."""

from __future__ import annotations

import dataclasses

from mlip_jax.defaults.bounds import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, Bounds
from mlip_jax.defaults.data import seed
from mlip_jax.defaults.field import Field, Part, optional, task
from mlip_jax.defaults.optimizer import OPTIMIZER
from mlip_jax.defaults.shared_parts import MOLECULES, ORACLE
from mlip_jax.defaults.training import LOOP, LOSS, MODEL, POTENTIAL, REFERENCE_ENERGIES

KINDS = {
    "conformers": "geometries that RDKit embeds",
    "modes": "displaced along normal modes of MMFF94 or UFF",
    "random": "displaced at random",
    "md": "snapshots of hot dynamics of the current force field",
    "relaxations": "snapshots of relaxations by the current force field",
}
STRATEGIES = {
    "both": "uncertain and far from all labeled structures",
    "uncertainty": "the most uncertain",
    "diversity": "the farthest from all labeled structures",
    "random": "random",
}
_UNSET_WITH_STEPS = {"warmup_steps": None}

ACTIVE_LEARNING = task(
    "active_learning",
    "Training of a force field within a budget of labels, which active learning spends: rounds of "
    "candidates, choice, labels and training.",
    MOLECULES.replace(
        input=Field(
            "",
            "Molecules to learn: a file of SMILES (.smi, .csv), of structures (.sdf, .xyz, .db), "
            "or a store; labels that it has are not used.",
        ),
        mmff=True,
    ),
    seed=seed("all random choices"),
    budget=Field(
        500,
        "Number of calculations of the reference method for training and validation; failed ones "
        "count.",
        bounds=Bounds("[10, inf)"),
    ),
    target_error=optional(
        float,
        "Expected mean absolute error of the force components on new molecules at which the run "
        "ends before the budget is spent.",
        unit="meV/Å",
        bounds=POSITIVE,
        unset="the whole budget is spent",
    ),
    control=Field(
        "none",
        "Runs for comparison with the same budget, first round, validation and test.",
        choices={
            "none": "",
            "random": "random choice among candidates that need no force field",
            "ablation": "random choice, uncertainty only, diversity only",
        },
        changes_results=False,
    ),
    held_out=Part(
        "Molecules that are not used for training.",
        valid_fraction=Field(
            0.1,
            "Fraction of the molecules for validation: early stopping and the expected error.",
            bounds=Bounds("(0, 0.5]"),
        ),
        valid_labels=Field(
            0.1, "Fraction of the budget that labels them.", bounds=Bounds("(0, 0.5]")
        ),
        test_fraction=Field(
            0.15,
            "Fraction of the molecules for the test, which no decision uses.",
            bounds=Bounds("[0, 0.5]"),
        ),
        num_test=Field(
            100,
            "Number of test structures, labeled in addition to the budget; 0 tests nothing.",
            bounds=NOT_NEGATIVE,
        ),
    ),
    rounds=Part(
        "Rounds of choice, labels and training.",
        num_rounds=Field(5, "Number of rounds.", bounds=AT_LEAST_ONE),
        first_fraction=Field(
            0.25,
            "Fraction of the training labels in the first round, which is random.",
            bounds=Bounds("(0, 1]"),
        ),
        warm_start=Field(
            True,
            "Start of each training from the force field of the round before; otherwise each round "
            "trains from the start. All labels are used in either case.",
        ),
        members=Field(
            2,
            "Number of force fields that are trained per round; their mean is the result.",
            bounds=AT_LEAST_ONE,
        ),
    ),
    propose=Part(
        "Candidates for labels.",
        kinds=Field(("conformers", "modes", "random", "md"), "Kinds of candidates.", choices=KINDS),
        num_conformers=Field(4, "Number of conformers per SMILES.", bounds=AT_LEAST_ONE),
        per_molecule=Field(
            16,
            "Number of candidates per molecule from conformers, modes and random displacements.",
            bounds=AT_LEAST_ONE,
        ),
        temperatures=Field(
            (100.0, 1500.0),
            "Lowest and highest temperature of displacements along normal modes.",
            unit="K",
            bounds=POSITIVE,
        ),
        amplitude=Field(
            0.06,
            "Largest standard deviation of random displacements.",
            unit="Å",
            bounds=NOT_NEGATIVE,
        ),
        num_molecules=Field(
            32,
            "Number of molecules per round for dynamics, and for relaxations.",
            bounds=AT_LEAST_ONE,
        ),
        md_temperature=Field(800.0, "Temperature of the dynamics.", unit="K", bounds=POSITIVE),
        md_steps=Field(1_000, "Number of steps of 0.5 fs per trajectory.", bounds=AT_LEAST_ONE),
        md_frames=Field(4, "Number of snapshots per trajectory.", bounds=AT_LEAST_ONE),
        relaxation_steps=Field(60, "Maximum number of steps per relaxation.", bounds=AT_LEAST_ONE),
        relaxation_frames=Field(
            3, "Maximum number of snapshots per relaxation.", bounds=AT_LEAST_ONE
        ),
        max_force=Field(
            25.0, "Largest predicted force component of a candidate.", unit="eV/Å", bounds=POSITIVE
        ),
    ),
    choose=Part(
        "Choice of the candidates that are labeled.",
        strategy=Field("both", "Preferred candidates.", choices=STRATEGIES),
        uncertainty=Field(
            "ensemble",
            "Measure of the uncertainty.",
            choices={
                "ensemble": "spread of the forces over the members",
                "domain": "distance of the atoms from labeled atoms",
                "features": "leverage of the last-layer features",
            },
        ),
    ),
    oracle=Part(
        ORACLE.description,
        ORACLE,
        timeout=Field(
            600.0,
            "Time limit of a calculation, after which it counts as failed.",
            unit="s",
            bounds=POSITIVE,
            changes_results=False,
        ),
    ),
    data=Part(
        "Reference energies of the trainings.",
        reference_energies=dataclasses.replace(
            REFERENCE_ENERGIES,
            choices={"least_squares": "fitted to the labels", "none": "zero"},
            legacy_value="least_squares",
        ),
    ),
    init=Part(
        "Start of the parameters.",
        only_with=["init.workdir"],
        workdir=Field(
            "",
            "Force field to fine-tune, in any form that task relax accepts; if empty, training "
            "starts from random parameters.",
        ),
    ),
    model=MODEL,
    potential=POTENTIAL,
    loss=LOSS,
    optimizer=OPTIMIZER.replace(**_UNSET_WITH_STEPS),
    train=LOOP.replace(
        num_steps=dataclasses.replace(
            LOOP.members["num_steps"],
            default=1_000,
            description="Number of training steps per round and member.",
        ),
        log_every=None,
        valid_every=None,
        checkpoint_every=None,
    ),
)
