"""Metrics of a run to metrics.csv and TensorBoard; rows after the step that a run resumes from are dropped."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

COLUMNS = ("step", "epoch", "seconds", "learning_rate", "beta", "train_loss", "train_energy_mae_mev_per_atom",
           "train_energy_mae_mev", "train_force_mae_mev_per_ang", "valid_loss", "valid_energy_mae_mev_per_atom",
           "valid_energy_mae_mev", "valid_force_mae_mev_per_ang", "structures_per_second", "atoms_per_second",
           "edges_per_second", "input_share", "checkpoint_share", "mfu")


class Recorder:
    """Writes rows of metrics, in the order of steps."""

    def __init__(self, workdir: Path, step: int):
        self.path = workdir / "metrics.csv"
        kept = [row for row in self._read() if int(row["step"]) <= step]
        temporary = self.path.with_suffix(".csv.tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        os.replace(temporary, self.path)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1 if step else None)

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            # a row that a killed run left half-written has too few fields
            return [row for row in csv.DictReader(file) if row.get("step", "").isdigit() and None not in row.values()]

    def write(self, row: dict[str, float]) -> None:
        """Append one row; columns that are not in it stay empty."""
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(
                {k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()})
        for name, value in row.items():
            if name != "step" and np.isfinite(value):  # NaN where the data have no such label
                self._board.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Flush TensorBoard's file."""
        self._board.close()
