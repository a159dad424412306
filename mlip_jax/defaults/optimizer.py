"""Config fields of the optimizer."""

from __future__ import annotations

from mlip_jax.defaults.bounds import BELOW_ONE, FRACTION, NOT_NEGATIVE, POSITIVE, Bounds
from mlip_jax.defaults.field import Field, Part, optional

OPTIMIZER = Part(
    "Optimizer and learning-rate schedule.",
    name=Field("adam", "Update rule.", choices=("adam", "amsgrad", "adamw", "muon")),
    learning_rate=Field(1e-3, "Learning rate after the warmup.", bounds=POSITIVE),
    learning_rate_end=Field(
        1e-5, "Learning rate at the end of the schedule, and its lower limit.", bounds=NOT_NEGATIVE
    ),
    schedule=Field(
        "cosine",
        "Decay of the learning rate.",
        choices={
            "cosine": "",
            "exponential": "",
            "step": "by decay_factor every decay_epochs",
            "plateau": "by decay_factor when validation stops improving",
            "constant": "no decay",
        },
    ),
    warmup_steps=optional(
        int,
        "Number of steps of linear warmup.",
        bounds=NOT_NEGATIVE,
        unset="a tenth of the steps, at most 200",
        default=200,
    ),
    decay_factor=Field(
        0.5,
        'Factor to the learning rate at a decay of the schedules "step" and "plateau".',
        bounds=FRACTION,
    ),
    decay_epochs=Field(
        40.0,
        'Number of epochs between two decays of the schedule "step".',
        bounds=Bounds("[0, inf]"),
    ),
    plateau_patience=Field(
        10,
        "Number of epochs without a better validation loss after which the schedule "
        '"plateau" decays.',
        bounds=NOT_NEGATIVE,
    ),
    plateau_threshold=Field(
        1e-4,
        'Relative decrease of the validation loss that the schedule "plateau" counts as '
        "an improvement.",
        bounds=BELOW_ONE,
    ),
    b1=Field(0.9, "Decay rate of the first moment.", bounds=BELOW_ONE),
    b2=Field(0.999, "Decay rate of the second moment.", bounds=BELOW_ONE),
    eps=Field(1e-8, "Constant added to the root of the second moment.", bounds=POSITIVE),
    weight_decay=Field(
        0.01, 'Decoupled weight decay of matrices by "adamw" and "muon".', bounds=NOT_NEGATIVE
    ),
    clip_norm=optional(
        float,
        "Maximum global norm of the gradient; 0 turns clipping off.",
        bounds=NOT_NEGATIVE,
        unset="no clipping",
        default=10.0,
    ),
    freeze=Field((), "Paths of parameters that are not trained, as in ('params/embedding/*',)."),
    lr_multipliers=Field(
        "",
        'Factors to the learning rate by parameter path, as in "params/backbone/*=0.1".',
        legacy_value="",
        former_name="rates",
    ),
    low_rank=Field(
        0,
        "Rank of the updates of linear layers (LoRA); all other parameters keep their values. 0 "
        "trains all parameters.",
        bounds=NOT_NEGATIVE,
        legacy_value=0,
    ),
)
