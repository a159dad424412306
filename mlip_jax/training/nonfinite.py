"""Handling of non-finite losses: report the structures, then stop, skip the step or roll back."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlip_jax.config import ConfigError, unknown_name
from mlip_jax.training.data import Split, StepPlan

log = logging.getLogger(__name__)

CHOICES = ("stop", "skip", "rollback")
# Above these numbers the cause is not a single batch, so the run stops.
MOST_ROLLBACKS, MOST_SKIPPED = 10, 100

# Hint for the first step, before which nothing was trained: the learning rate cannot be the cause.
_AT_THE_START = (
    "In the first step it is a label that is too large, or the model as it begins: a deep one may need "
    "layer norms, as so3krates of more than four layers does (model.options.layer_norm_1=True). "
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
        names = [(step, name) for step, group in bad for name in self._names(group)]
        if write:
            self._record(names)
        first = bad[0][0]
        of_first = [name for step, name in names if step == first]
        shown, more = (
            ", ".join(of_first[:20]),
            f" and {len(of_first) - 20} more" if len(of_first) > 20 else "",
        )
        text = f"the loss or its gradient is not finite in step {first}, whose batch holds {shown}{more}"
        if self._choice == "stop":
            raise TrainingError(
                f"{text}; all are in {self._file.name}. Parameters and checkpoints are from before. "
                f"{_AT_THE_START if first == 1 else ''}Look at these "
                "structures, lower optimizer.learning_rate, leave out the largest forces (data.max_force), or pass "
                "over such batches: --config.train.on_nonfinite=skip (or rollback)"
            )
        self._skipped += len(bad)
        if self._choice == "rollback":
            if rollbacks >= MOST_ROLLBACKS:
                raise TrainingError(
                    f"{text}; the run has gone back {rollbacks} times. Lower optimizer.learning_rate."
                )
            log.warning("%s. Going back to the last checkpoint, and on with other batches", text)
            return True
        if self._skipped > MOST_SKIPPED:
            raise TrainingError(
                f"{text}; {self._skipped} updates were passed over. Lower optimizer.learning_rate."
            )
        log.warning("%s. The update is passed over", text)
        return False

    def _names(self, group: StepPlan) -> list[str]:
        """Return the name of each structure of a step: "source#conformer"."""
        columns = self._split.columns(np.concatenate(group.places))
        return [
            f"{source}#{conformer}" for source, conformer in zip(columns.source, columns.conformer)
        ]

    def _record(self, names: list[tuple[int, str]]) -> None:
        """Append new rows to the file. A run that is resumed can meet the same structures again."""
        header = ("step", "structure")
        try:
            with open(self._file, "a+", newline="") as file:
                file.seek(0)
                known = {tuple(row) for row in csv.reader(file)}
                csv.writer(file).writerows(
                    row
                    for row in dict.fromkeys([header, *((str(s), n) for s, n in names)])
                    if row not in known
                )
        except OSError as error:  # the report of the loss is more important
            log.warning("%s: cannot be written: %s", self._file, error)
