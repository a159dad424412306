"""Handling of non-finite losses: report the structures, then stop, skip the step or roll back."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlip_jax.config import ConfigError, unknown_name
from mlip_jax.files import open_in_place
from mlip_jax.foreign_text import TableWriter
from mlip_jax.training.data import Split, StepPlan

log = logging.getLogger(__name__)

CHOICES = ("stop", "skip", "rollback")
# Above these numbers the cause is not a single batch, so the run stops.
MAX_ROLLBACKS, MAX_SKIPPED = 10, 100

# Hint for the first step, before which nothing was trained: the learning rate cannot be the cause.
_FIRST_STEP_HINT = (
    "In the first step, the cause is a label that is too large or the initial model: a deep model, "
    "such as so3krates with more than four layers, may need layer norms "
    "(model.options.layer_norm_1=True). "
)


class TrainingError(RuntimeError):
    """Training cannot continue."""


class NonFinite:
    """Policy for steps whose loss or gradient was not finite. Such steps have changed no parameter.

    Args:
      choice: One of CHOICES.
      split: Training split, which the plans of the steps refer to.
      workdir: Directory of the run. The structures of all such steps are written to nonfinite.csv.

    Raises:
      ConfigError: The choice is unknown.
    """

    def __init__(self, choice: str, split: Split, workdir: Path):
        if choice not in CHOICES:
            raise ConfigError(unknown_name("train.on_nonfinite", choice, CHOICES))
        self._choice, self._split, self._file = choice, split, workdir / "nonfinite.csv"
        self._skipped = 0

    def should_roll_back(
        self, bad: Sequence[tuple[int, StepPlan]], rollbacks: int, write: bool = True
    ) -> bool:
        """Return whether to roll back to the last checkpoint.

        Args:
          bad: Non-finite steps, [(step, plan), ...].
          rollbacks: Number of rollbacks so far.
          write: Whether to write the structures to nonfinite.csv.

        Raises:
          TrainingError: Training has to stop. The message lists the structures.
        """
        names = [(step, name) for step, plan in bad for name in self._names(plan)]
        if write:
            self._record(names)
        first = bad[0][0]
        of_first = [name for step, name in names if step == first]
        shown = ", ".join(of_first[:20])
        more = f" and {len(of_first) - 20} more" if len(of_first) > 20 else ""
        text = f"non-finite loss or gradient in step {first} with the structures {shown}{more}"
        if self._choice == "stop":
            raise TrainingError(
                f"{text}; {self._file.name} lists all of them. Parameters and checkpoints are from "
                f"before this step. {_FIRST_STEP_HINT if first == 1 else ''}Inspect these "
                "structures, lower optimizer.learning_rate, exclude the largest forces "
                "(data.max_force), or skip such batches: --config.train.on_nonfinite=skip (or "
                "rollback)."
            )
        self._skipped += len(bad)
        if self._choice == "rollback":
            if rollbacks >= MAX_ROLLBACKS:
                raise TrainingError(
                    f"{text}; the run was rolled back {rollbacks} times. Lower "
                    "optimizer.learning_rate."
                )
            log.warning(
                "%s. Rolling back to the last checkpoint and continuing with different batches",
                text,
            )
            return True
        if self._skipped > MAX_SKIPPED:
            raise TrainingError(
                f"{text}; {self._skipped} steps were skipped. Lower optimizer.learning_rate."
            )
        log.warning("%s. Skipping this step", text)
        return False

    def _names(self, plan: StepPlan) -> list[str]:
        """Return the name of each structure of a step: "source#conformer"."""
        columns = self._split.columns(np.concatenate(plan.members))
        return [
            f"{source}#{conformer}" for source, conformer in zip(columns.source, columns.conformer)
        ]

    def _record(self, names: list[tuple[int, str]]) -> None:
        """Append new rows to the file. A run that is resumed can meet the same structures again."""
        header = ("step", "structure")
        try:
            with open_in_place(self._file, "a+", newline="") as file:
                file.seek(0)
                known = {tuple(row) for row in csv.reader(file)}
                TableWriter(file).writerows(
                    row
                    for row in dict.fromkeys([header, *((str(s), n) for s, n in names)])
                    if row not in known
                )
        except OSError as error:  # the report of the loss is more important
            log.warning("%s: cannot be written: %s", self._file, error)
