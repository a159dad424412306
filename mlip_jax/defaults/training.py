"""Config fields of training a force field."""

from __future__ import annotations

import pkgutil
from pathlib import Path

from mlip_jax.defaults.bounds import (
    AT_LEAST_ONE,
    BELOW_ONE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_OR_INFINITE,
    Bounds,
)
from mlip_jax.defaults.data import DATA, SPLIT, seed
from mlip_jax.defaults.field import Field, Part, optional, task
from mlip_jax.defaults.optimizer import OPTIMIZER

# Energy terms that can be added to a model: the files of mlip_jax/terms. The folder is listed
# rather than imported, because an import takes seconds.
TERMS = tuple(
    sorted(
        m.name
        for m in pkgutil.iter_modules([str(Path(__file__).parents[1] / "terms")])
        if not m.ispkg
    )
)

PENALTIES = {
    "mse": "squared error",
    "mae": "absolute error",
    "huber": "Huber loss",
    "rmse": "root mean square error per structure",
}
FORCE_PENALTIES = PENALTIES | {
    "norm": "length of the error vector of an atom",
    "relative": "squared error over the squared force plus loss.force_floor squared",
}

_TERM_FIELDS = {
    name: member
    for term in TERMS
    for name, member in (
        (
            term,
            Field(
                False,
                f"Use of the energy term {term!r}, whose energy is added to that of the model.",
            ),
        ),
        (
            f"{term}_options",
            Field({}, f"Options of the energy term {term!r}: fields of its class."),
        ),
    )
}
POTENTIAL = Part(
    "Energy terms that are added to the energy of the model.",
    only_with=[f"potential.{term}" for term in TERMS],
    **_TERM_FIELDS,
    long_range_cutoff=Field(
        12.0,
        "Cutoff radius of electrostatics and dispersion; inf includes all pairs, for "
        "non-periodic structures only. The term d3 has a cutoff of its own.",
        unit="Å",
        bounds=POSITIVE_OR_INFINITE,
    ),
)

MODEL = Part(
    "Architecture of the model.",
    name=Field("so3krates", "Name of the model; if empty, that of the model of init.workdir."),
    options=Field({}, "Options of the model: fields of its class."),
)

LOSS = Part(
    "Training loss, (1 - beta) * energy loss + beta * force loss + stress * stress loss.",
    beta=Field(0.99, "Weight of the forces at the start.", bounds=FRACTION),
    beta_end=Field(0.99, "Weight of the forces at the end.", bounds=FRACTION),
    beta_begin=Field(
        0.5,
        "Fraction of the training steps at which the weight of the forces starts to change.",
        bounds=FRACTION,
    ),
    beta_schedule=Field(
        "geometric",
        "Path of the weight of the forces from beta to beta_end.",
        choices={"geometric": "geometric in 1 - beta", "linear": "", "step": "all at once"},
    ),
    penalty=Field(
        "mse",
        "Penalty of an energy error, and of a force error unless force_penalty is set.",
        choices=PENALTIES,
    ),
    force_penalty=optional(
        str, "Penalty of a force error.", choices=FORCE_PENALTIES, unset="loss.penalty"
    ),
    huber_delta=Field(
        0.05,
        'Error at which the penalty "huber" becomes linear.',
        unit="eV and eV/Å",
        bounds=Bounds("[0, inf]"),
    ),
    force_floor=Field(
        0.1,
        'Force below which the force penalty "relative" stops growing.',
        unit="eV/Å",
        bounds=Bounds("[0, inf]"),
    ),
    energy_per_atom=Field(True, "Penalty of energies per atom rather than total energies."),
    stress=Field(
        0.0,
        "Weight of the stress of structures that are periodic in three directions; 0 computes no "
        "stress. The penalty is loss.penalty, applied to errors in eV/Å³.",
        bounds=NOT_NEGATIVE,
        legacy_value=0.0,
    ),
)

# Fields of the length of a run. A rerun with a larger value continues the run.
LENGTH = ("train.num_steps", "train.num_epochs")

LOOP = Part(
    "Length of training, batches, and intervals between outputs.",
    num_steps=Field(
        10_000,
        "Number of training steps. A rerun with more steps continues the run.",
        bounds=AT_LEAST_ONE,
    ),
    num_epochs=optional(
        float,
        "Number of epochs, which replaces num_steps; a command that sets only num_steps unsets it.",
        bounds=POSITIVE,
        unset="num_steps",
    ),
    batch_size=optional(
        int,
        "Average number of structures per training step, over all devices.",
        bounds=AT_LEAST_ONE,
        unset="schedule_batch_size on CPUs, up to 8 times as many on GPUs and TPUs",
        unset_field="schedule_batch_size",
    ),
    schedule_batch_size=Field(
        16,
        "Batch size that steps, intervals, decay and learning rates refer to if batch_size is "
        "unset; a larger batch has as many fewer steps.",
        bounds=AT_LEAST_ONE,
    ),
    micro_batches=optional(
        int,
        "Number of micro-batches per training step, over all devices.",
        bounds=AT_LEAST_ONE,
        unset="one per device of the first start",
    ),
    matmul_precision=optional(
        str,
        "Precision of the products of float32 matrices in training steps; validation and reports "
        "have full precision.",
        choices={
            "default": "that of the device: TF32 on GPUs, bfloat16 on TPUs",
            "tensorfloat32": "TF32 on GPUs",
            "float32": "full precision",
        },
        unset="JAX's option jax_default_matmul_precision, or that of the device",
        legacy_value=None,
    ),
    ema_decay=Field(
        0.999,
        "Decay rate per step of the moving average of the parameters; 0 turns averaging off.",
        bounds=BELOW_ONE,
    ),
    log_every=optional(
        int,
        "Number of steps between log lines.",
        bounds=AT_LEAST_ONE,
        unset="a hundredth of the steps, at most 100",
        default=50,
    ),
    valid_every=optional(
        int,
        "Number of steps between validations.",
        bounds=AT_LEAST_ONE,
        unset="a twentieth of the steps, at most 1,000",
        default=500,
    ),
    checkpoint_every=optional(
        int,
        "Number of steps between checkpoints.",
        bounds=AT_LEAST_ONE,
        unset="a twentieth of the steps, at most 1,000",
        default=500,
    ),
    max_valid=Field(
        2_000,
        "Maximum number of structures of a validation during training; the report uses all.",
        bounds=AT_LEAST_ONE,
    ),
    on_nonfinite=Field(
        "stop",
        "Reaction to a loss or gradient that is not finite.",
        choices={
            "stop": "end the run",
            "skip": "skip the step",
            "rollback": "return to the checkpoint",
        },
        changes_results=False,
    ),
    resident=optional(
        bool,
        "Storage of the training data on the device, which then assembles the batches.",
        unset="on a GPU or TPU if the data need little of its memory",
        changes_results=False,
    ),
    steps_per_dispatch=Field(
        0,
        "Number of training steps per call to the device; 0 chooses it.",
        bounds=NOT_NEGATIVE,
        changes_results=False,
    ),
    profile_steps=Field(
        0,
        "Number of steps that are profiled into trace/ in the workdir; also --profile.",
        bounds=NOT_NEGATIVE,
        changes_results=False,
    ),
)

REFERENCE_ENERGIES = Field(
    "least_squares",
    "Reference energies of the elements, which are subtracted before training, or their "
    'values in eV as in "H=-13.6,C=-1029.4". With init.workdir, "least_squares" fits the '
    "difference to its force field.",
    choices={
        "least_squares": "fitted to the training energies, or isolated atoms if the "
        "compositions do not determine the fit",
        "isolated_atoms": "those that the data set states or contains",
        "none": "zero",
    },
    free_mark="=",
)

TRAIN = task(
    "train",
    "Training of a force field.",
    seed=seed("the initial parameters and of the order of the training data"),
    data=Part(
        "Training, validation and test structures.",
        DATA.replace(elements=("H", "C", "N", "O", "S")),
        SPLIT,
        reference_energies=REFERENCE_ENERGIES,
    ),
    init=Part(
        "Start of the parameters.",
        only_with=["init.workdir"],
        workdir=Field(
            "",
            "Force field to fine-tune: a workdir, or another value that task relax accepts, such as "
            '"X.model"; if empty, training starts from random parameters.',
        ),
    ),
    model=MODEL,
    potential=POTENTIAL,
    loss=LOSS,
    optimizer=OPTIMIZER,
    train=LOOP,
    report=Part(
        "Size of the report.",
        max_train=Field(
            5_000,
            "Maximum number of training structures that the report evaluates.",
            bounds=NOT_NEGATIVE,
        ),
        max_test=Field(
            50_000,
            "Maximum number of validation structures, and of test structures, that the report "
            "evaluates.",
            bounds=NOT_NEGATIVE,
        ),
        max_domain=Field(
            1_000,
            "Maximum number of structures per split that calibrate the detection of inputs "
            "outside the training domain; 0 turns it off.",
            bounds=NOT_NEGATIVE,
            legacy_value=1_000,
        ),
    ),
)
