"""Config fields of the task that fine-tunes a force field by the best of several recipes."""

from __future__ import annotations

from mlip_jax.defaults.bounds import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, POSITIVE, Bounds
from mlip_jax.defaults.data import DATA, SPLIT, num_processes, seed
from mlip_jax.defaults.field import Field, Part, optional, task
from mlip_jax.defaults.shared_parts import FORCE_FIELD
from mlip_jax.defaults.training import LOSS

# Recipes by name, with their meaning.
RECIPES = {
    "frozen": "embeddings and the first half of the layers keep their values",
    "low_rank": "low-rank updates of linear layers (LoRA)",
    "full": "all parameters",
    "low_rank_replay": "low-rank updates, with old structures in each batch",
    "full_replay": "all parameters, with old structures in each batch",
}

FINE_TUNE = task(
    "fine_tune",
    "Fine-tuning of a force field on labeled structures by the best of several recipes.",
    FORCE_FIELD,
    seed=seed("the splits of the old domain, the batches and the learning curve"),
    data=Part(
        "Labeled structures of the new domain, and their split.",
        DATA,
        SPLIT.replace(split="auto", num_train=0.8, num_valid=0.1, num_test=0.1),
    ),
    recipes=Field(tuple(RECIPES), "Recipes that are tried.", choices=RECIPES),
    learning_rates=Field(
        (1e-3, 3e-4), "Learning rates that are tried with each recipe.", bounds=POSITIVE
    ),
    rank=Field(8, "Rank of the low-rank updates.", bounds=AT_LEAST_ONE),
    optimizer=Field("adam", "Update rule.", choices=("adam", "amsgrad", "adamw", "muon")),
    num_steps=Field(
        1_000,
        "Number of training steps of the last two candidates. All candidates train for a quarter of "
        "them first.",
        bounds=AT_LEAST_ONE,
    ),
    batch_size=Field(8, "Average number of structures per training step.", bounds=AT_LEAST_ONE),
    ema_decay=Field(
        0.99, "Decay rate per step of the moving average of the parameters.", bounds=BELOW_ONE
    ),
    loss=LOSS.replace(penalty="mae", energy_per_atom=False, beta=0.95, beta_end=0.8),
    max_minutes=optional(
        float,
        "Time after which no further training starts; the best candidate so far is chosen.",
        unit="min",
        bounds=POSITIVE,
        unset="no limit",
        changes_results=False,
    ),
    max_forgetting=optional(
        float,
        "Maximum relative increase of the force error in the old domain, as in 0.2. Candidates "
        "beyond it are chosen only if no other is left.",
        bounds=NOT_NEGATIVE,
        unset="only the new domain decides",
    ),
    curve=Field(
        (25, 50, 100, 200),
        "Numbers of labels of the learning curve; those below the number of training structures "
        "are used.",
        bounds=AT_LEAST_ONE,
    ),
    old=Part(
        "Structures of the old domain, for replay and for the test of forgetting.",
        path=optional(
            str,
            "File of structures of the old domain, with or without labels.",
            unset="the data of the run of the force field if they exist, otherwise generated "
            "conformations of built-in molecules inside its domain",
        ),
        num_replay=Field(300, "Maximum number of structures for replay.", bounds=AT_LEAST_ONE),
        share=Field(
            0.5,
            "Fraction of old structures in each batch with replay. A larger one forgets less and "
            "learns less; it is limited by the number of old structures per label.",
            bounds=Bounds("(0, 1)"),
            legacy_value=0.5,
        ),
        num_probe=Field(
            100, "Maximum number of structures for the test of forgetting.", bounds=AT_LEAST_ONE
        ),
        num_processes=num_processes("that generate structures"),
    ),
    pool=Part(
        "Unlabeled structures that may be labeled next.",
        path=optional(str, "File of the structures.", unset="no proposal"),
        num_next=Field(50, "Number of proposed structures.", bounds=AT_LEAST_ONE),
        max_structures=Field(
            5_000, "Maximum number of structures that are compared.", bounds=AT_LEAST_ONE
        ),
    ),
)
