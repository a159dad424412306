"""The training loop: steps, validation, checkpoints, and going on exactly where a run was stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mlip_jax.checkpoint import CheckpointStore, from_arrays
from mlip_jax.potential import BEST
from mlip_jax.training.data import Batches, Split
from mlip_jax.training.evaluation import add, averages, validate
from mlip_jax.training.losses import Sums
from mlip_jax.training.recorder import Recorder
from mlip_jax.training.step import Trainer, TrainState

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on."""


@dataclasses.dataclass
class Position:
    """Where a run stands: what a checkpoint stores beside the arrays."""

    step: int = 0
    epoch: int = 0
    input: dict[str, Any] | None = None  # of the stream of batches
    seconds: float = 0.0
    best_loss: float = float("inf")


@dataclasses.dataclass
class Loop:
    """Trains to `num_steps`.

    Attributes:
      trainer, batches, train, valid: What to train with. valid is the part used while training.
      workdir: Checkpoints go to workdir/checkpoints and workdir/best.
      metadata: Goes into every checkpoint (config, statistics, versions).
      schedules: Functions of the step to record: {"learning_rate": ..., "beta": ...}.
      options: config.train. seed: Of the batch order. beta_valid: Of the validation loss.
    """

    trainer: Trainer
    batches: Batches
    train: Split
    valid: Split
    workdir: Path
    metadata: dict[str, Any]
    schedules: dict[str, Any]
    options: Any
    seed: int
    beta_valid: float

    def run(self, params: Any) -> Position:
        """Train from the newest checkpoint, or from `params` where there is none."""
        self._latest = CheckpointStore(self.workdir / "checkpoints", keep=2)
        self._best = CheckpointStore(self.workdir / BEST, keep=2)
        state, position = self._start(params)
        self._recorder = Recorder(self.workdir, position.step)
        self._begin = time.monotonic() - position.seconds
        try:
            with self._progress() as self._bar:
                self._task = self._bar.add_task(
                    "training", total=self.options.num_steps, completed=position.step, text="")
                self._steps(state, position)
        finally:
            self._recorder.close()
            self._latest.close()
            self._best.close()
        return position

    def _start(self, params) -> tuple[TrainState, Position]:
        state = self.trainer.init(params)
        restored = self._latest.restore()
        if restored is None:
            return state, Position()
        position = Position(**restored.metadata["position"])
        log.info("going on from the checkpoint of step %d", position.step)
        return self.trainer.replicate(from_arrays(self.trainer.single(state), restored.arrays)), position

    def _steps(self, state: TrainState, position: Position) -> TrainState:
        sums, structures, since = [], 0, time.monotonic()
        with contextlib.closing(self.batches.training(self.train, self.seed, position.input)) as stream:
            while position.step < self.options.num_steps:
                group, graphs = next(stream)
                state, step_sums = self.trainer.train(state, graphs)
                position.step, position.epoch = position.step + 1, group.epoch
                sums.append(step_sums)
                structures += sum(len(g) for g in group.places)
                if self._due(position.step, self.options.log_every):
                    totals = add(sums)  # waits for the devices, so that the rate is that of work done
                    self._log(position, totals, structures / (time.monotonic() - since))
                    sums, structures, since = [], 0, time.monotonic()
                if self._due(position.step, self.options.valid_every):
                    self._validate(state, position)
                    since = time.monotonic()
                if self._due(position.step, self.options.checkpoint_every):
                    position.input = stream.state
                    self._save(self._latest, state, position)
                    since = time.monotonic()
        return state

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.options.num_steps

    def _log(self, position: Position, totals: Sums, rate: float) -> None:
        position.seconds = time.monotonic() - self._begin
        beta = float(self.schedules["beta"](position.step))
        row = averages(totals, beta, "train")
        if not np.isfinite(row["train_loss"]):
            raise TrainingError(
                f"the loss is not finite within the {self.options.log_every} steps before step {position.step}. "
                f"The checkpoints in {self.workdir} are from before; lower optimizer.learning_rate, or leave out the "
                "structures with the largest forces (data.max_force)")
        row.update({k: float(f(position.step)) for k, f in self.schedules.items()})
        self._recorder.write({"step": position.step, "epoch": position.epoch, "seconds": position.seconds,
                              "structures_per_second": rate, **row})
        self._show(position.step, f"E {_figure(row['train_energy_mae_mev_per_atom'], 1)} meV/atom  "
                   f"F {_figure(row['train_force_mae_mev_per_ang'], 0)} meV/Å  {rate:.0f} structures/s")

    def _validate(self, state: TrainState, position: Position) -> None:
        row = averages(validate(self.trainer, state.ema, self.valid, self.batches), self.beta_valid, "valid")
        position.seconds = time.monotonic() - self._begin
        self._recorder.write({"step": position.step, "epoch": position.epoch, "seconds": position.seconds, **row})
        best = row["valid_loss"] < position.best_loss
        log.info("step %d  validation: energy %s meV/atom, force %s meV/Å%s", position.step,
                 _figure(row["valid_energy_mae_mev_per_atom"], 2), _figure(row["valid_force_mae_mev_per_ang"], 1),
                 "  (best)" if best else "")
        if best:
            position.best_loss = row["valid_loss"]
            self._save(self._best, state, position)

    def _save(self, store: CheckpointStore, state: TrainState, position: Position) -> None:
        position.seconds = time.monotonic() - self._begin
        single = self.trainer.single(state)
        # the best checkpoint is what a force field is loaded from: the averaged parameters alone
        tree = {"params": single.ema} if store is self._best else single
        store.save(position.step, tree, {**self.metadata, "position": dataclasses.asdict(position)})

    @staticmethod
    def _progress() -> Progress:
        return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                        TextColumn("{task.fields[text]}"), TimeElapsedColumn(), TimeRemainingColumn())

    def _show(self, step: int, text: str) -> None:
        self._bar.update(self._task, completed=step, text=text)
        if not self._bar.console.is_terminal:
            log.info("step %d/%d  %s", step, self.options.num_steps, text)


def _figure(value: float, digits: int) -> str:
    """A dash where the data have no such label."""
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"
