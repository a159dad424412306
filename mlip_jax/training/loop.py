"""The training loop: steps, validation, checkpoints, and the exact resumption of a stopped run.

One iteration of the loop (`TrainingLoop._steps`):

1. Take the batches of the next steps from the stream (`_next_dispatch`). They share a size bucket and end at
   the next step that logs, validates or saves.
2. Dispatch these steps to the devices (`Trainer.train`). This returns before they are done.
3. Read the results of earlier dispatches (`_process_results`): log a line, note a stop request, or handle a
   non-finite loss. At most `_AHEAD` results stay unread, none before a validation or a checkpoint.
4. Validate every `valid_every` steps (`_validate`): save the best parameters, and reduce the
   learning rate on a plateau.
5. Save a checkpoint every `checkpoint_every` steps (`_save`).
6. Stop after a signal, or roll back to the last checkpoint after a non-finite loss (`_roll_back`).

The loop dispatches steps ahead of their results, so the devices never wait for the host. All
processes read a result at the same step, so all of them stop or roll back together.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mlip_jax import distributed
from mlip_jax.checkpoint import Restored, from_arrays
from mlip_jax.training.data import Batches, Split, StepPlan
from mlip_jax.training.evaluation import validate
from mlip_jax.training.nonfinite import NonFinite
from mlip_jax.training.optimizer import Plateau
from mlip_jax.training.outputs import TrainingOutputs, restore
from mlip_jax.training.progress import TrainingProgressBar
from mlip_jax.training.recorder import columns
from mlip_jax.training.step import DispatchResult, Trainer, TrainState
from mlip_jax.training.throughput import ThroughputMeter
from mlip_jax.training.trace import Trace

log = logging.getLogger(__name__)

# Maximum number of dispatches whose results have not been read.
_AHEAD = 2


@dataclasses.dataclass
class TrainingProgress:
    """Progress of a run. A checkpoint stores it along with the arrays.

    Attributes:
      step: Number of steps so far.
      epoch: Number of epochs so far, including the fraction of the current one.
      input: State of the stream of batches.
      micro_batches: Number of micro-batches per step.
      seconds: Training time so far (s), summed over restarts.
      best_loss: Lowest validation loss.
      plateau: Fields of `Plateau`, the state of the learning rate on a plateau.
      rollbacks: Number of rollbacks to a checkpoint.
    """

    step: int = 0
    epoch: float = 0.0
    input: dict[str, Any] | None = None
    micro_batches: int = 1
    seconds: float = 0.0
    best_loss: float = float("inf")
    plateau: dict[str, Any] = dataclasses.field(default_factory=dict)
    rollbacks: int = 0


class Dispatch(NamedTuple):
    """Steps that were dispatched to the devices together.

    Attributes:
      step: Number of steps of the run after them.
      groups: Plan of each of these steps.
      result: Their result, which the devices may still be computing.
    """

    step: int
    groups: list[StepPlan]
    result: DispatchResult


@dataclasses.dataclass
class TrainingLoop:
    """Training of one model up to a number of steps.

    Attributes:
      trainer: Compiled training and evaluation steps.
      batches: Factory of the batches.
      train: Training split.
      valid: Validation split, or the subset of it that is used during training.
      workdir: Directory of the run, with checkpoints in workdir/checkpoints and workdir/best.
      metadata: Metadata stored in every checkpoint (config, statistics, versions).
      schedules: Functions of the step to record: {"learning_rate": ..., "beta": ...}.
      options: Config of the training, config.train.
      num_steps: Step at which training ends.
      seed: Seed of the batch order.
      meter: Meter of throughput and time.
      plateau: Options of `Plateau.update`, or None for no reduction on a plateau.
      steps_per_dispatch: Maximum number of steps per dispatch.
    """

    trainer: Trainer
    batches: Batches
    train: Split
    valid: Split
    workdir: Path
    metadata: dict[str, Any]
    schedules: dict[str, Any]
    options: Any
    num_steps: int
    seed: int
    meter: ThroughputMeter
    plateau: dict[str, float] | None = None
    steps_per_dispatch: int = 1

    def run(self, params: Any, restored: Restored | None = None) -> TrainingProgress:
        """Train from a checkpoint of this run, or from `params` if there is none.

        Args:
          params: Initial parameters.
          restored: Checkpoint to resume from, or None.

        Returns:
          The progress at the end of the run.

        Raises:
          distributed.Stopped: A signal stopped the run. A checkpoint was saved.
          TrainingError: The loss is not finite.
          CheckpointError: A checkpoint cannot be written, or `restored` does not fit the model.
        """
        self._params = params
        state, position = self._start(restored)
        self._calls: collections.deque[Dispatch] = collections.deque()
        self._held: tuple[StepPlan, Any] | None = None
        self._stop = False
        # must be identical on all processes; otherwise they would stop at different steps
        self._ahead = distributed.broadcast(0 if self.trainer.oversubscribed else _AHEAD)
        self._begin = time.monotonic() - position.seconds
        self._nonfinite = NonFinite(self.options.on_nonfinite, self.train, self.workdir)
        with contextlib.ExitStack() as stack:
            self._outputs = stack.enter_context(
                contextlib.closing(
                    TrainingOutputs(
                        self.workdir, distributed.leader(), columns(self.trainer.objective.columns)
                    )
                )
            )
            self._outputs.begin(position.step)
            self._signal = stack.enter_context(distributed.StopSignal())
            self._progress = stack.enter_context(TrainingProgressBar(self.num_steps, position.step))
            self._trace = stack.enter_context(
                Trace(
                    self.workdir / "trace",
                    self.options.profile_steps if distributed.leader() else 0,
                )
            )
            self.meter.start()
            self._steps(state, position)
            with self.meter.clock("checkpoint"):
                self._outputs.wait()
            # A signal may arrive after the last dispatch. No later result would pass it on to the
            # other processes.
            if distributed.total(np.array([bool(self._signal.received)], np.float32)).any():
                raise self._stopped(position.step)
        return position

    def _start(self, restored: Restored | None) -> tuple[TrainState, TrainingProgress]:
        """Return the state and the progress of a checkpoint, or the initial ones if it is None."""
        state = self.trainer.init(self._params)
        if restored is None:
            return state, TrainingProgress(micro_batches=self.batches.micro_batches)
        position = TrainingProgress(**restored.metadata["position"])
        log.info("going on from the checkpoint of step %d", position.step)
        return self.trainer.replicate(
            from_arrays(self.trainer.single(state), restored.arrays)
        ), position

    def _steps(self, state: TrainState, position: TrainingProgress) -> None:
        """Run the loop up to the last step; see the module's docstring. Updates `position`."""
        with contextlib.closing(
            self.batches.training(self.train, self.seed, position.input)
        ) as stream:
            while position.step < self.num_steps:
                with self.meter.clock("input", unless=self._busy):
                    groups, inputs = self._next_dispatch(stream, position.step)
                state, result = self.trainer.train(
                    state,
                    inputs,
                    len(groups),
                    bucket=groups[0].bucket,
                    stop=bool(self._signal.received),
                )
                position.step += len(groups)
                position.epoch = groups[-1].epoch + groups[-1].progress
                self._calls.append(Dispatch(position.step, groups, result))
                self._trace.step(result)
                state = self._run_scheduled(state, position, stream)

    def _run_scheduled(self, state: TrainState, position: TrainingProgress, stream) -> TrainState:
        """Read results, then validate, save or stop if that is due after the last dispatch.

        Raises:
          distributed.Stopped: A signal was received. Validation and checkpoint of this step are
            complete, so the resumed run does not miss them.
        """
        step = position.step
        to_validate, to_save = (
            self._due(step, every)
            for every in (self.options.valid_every, self.options.checkpoint_every)
        )
        state = self._process_results(
            0 if to_validate or to_save else self._ahead, state, position, stream
        )
        # The state of the stream is past a batch that is held back. A checkpoint would lose it.
        to_stop = self._stop and self._held is None
        if to_stop:
            state = self._process_results(0, state, position, stream)
        if position.step < step:  # rolled back to a checkpoint, where everything due is done
            return state
        if to_validate:
            state = self._validate(state, position)
        if to_save or to_stop:
            self._save(state, position, stream, wait=to_stop)
        if to_stop:
            raise self._stopped(step)
        return state

    def _stopped(self, step: int) -> distributed.Stopped:
        """Return the exception of a run that was stopped at `step`."""
        return distributed.Stopped(
            f"stopped by {self._signal.received or 'another process'} at step {step}, and "
            "saved; the same command goes on from there"
        )

    def _next_dispatch(self, stream, step: int) -> tuple[list[StepPlan], Any]:
        """Take the batches of the next steps from the stream.

        The steps share one size bucket and end at the next step that logs, validates or saves. The
        first batch of another bucket is held back for the next dispatch.

        Returns:
          The plans of the steps, and their input on the devices with leading axes (D, S, K).
        """
        most = min(
            [self.steps_per_dispatch, self.num_steps - step]
            + [
                every - step % every
                for every in (
                    self.options.log_every,
                    self.options.valid_every,
                    self.options.checkpoint_every,
                )
            ]
        )
        taken = []
        while len(taken) < most:
            group, batch = self._held or next(stream)
            self._held = None
            if taken and group.bucket != taken[0][0].bucket:
                self._held = group, batch
                break
            taken.append((group, batch))
        inputs = [batch for _, batch in taken]
        if self.steps_per_dispatch == 1:
            return [taken[0][0]], inputs[0]
        # the number of batches is static, so the last one fills up the steps that are not done
        inputs += inputs[-1:] * (self.steps_per_dispatch - len(inputs))
        # S arrays (D, 1, K, ...) -> (D, S, K, ...)
        return [g for g, _ in taken], self.trainer.put(
            jax.tree.map(lambda *x: np.concatenate(x, 1), *inputs)
        )

    def _process_results(
        self, ahead: int, state: TrainState, position: TrainingProgress, stream
    ) -> TrainState:
        """Read results until at most `ahead` are unread, and act on them.

        A result may contain a stop request, call for a log line, or be non-finite. In the last case
        the loop may roll back. Returns the state to continue from.
        """
        while len(self._calls) > ahead:
            call = self._calls.popleft()
            result = self.trainer.single(call.result)
            self._stop |= bool(result.stop[0])
            finite = result.finite[: len(call.groups)]  # (S,) -> the steps that were performed
            self.meter.add(call.groups, result.sums, finite)
            if not finite.all():
                first = call.step - len(call.groups) + 1
                bad = [(first + i, call.groups[i]) for i in np.flatnonzero(~finite)]
                if self._nonfinite.should_roll_back(
                    bad, position.rollbacks, write=distributed.leader()
                ):
                    return self._roll_back(position, stream)
            if self._due(call.step, self.options.log_every):
                self._log(call, position)
        return state

    def _roll_back(self, position: TrainingProgress, stream) -> TrainState:
        """Return the state of the last checkpoint, or the initial one if there is none.

        The stream of batches is not rolled back, so the batch with the non-finite loss is not
        repeated.
        """
        while self._calls:  # wait for the dispatches in progress and discard their results
            self.trainer.single(self._calls.popleft().result)
        self._outputs.wait()
        state, before = self._start(restore(self.workdir))
        self._held = None
        # best_loss is kept, because the checkpoint with that loss is still on disk
        position.step, position.plateau = before.step, before.plateau
        position.rollbacks += 1
        self.meter.next_line()
        self._outputs.begin(position.step)
        self._save(state, position, stream)
        return state

    def _busy(self) -> bool:
        """Return whether the devices are still computing the last dispatch."""
        return bool(self._calls) and not self._calls[-1].result.finite.is_ready()

    def _due(self, step: int, every: int) -> bool:
        """Return whether an action with the period `every` is due at `step`.

        Every action is due at the last step.
        """
        return step % every == 0 or step == self.num_steps

    def _log(self, call: Dispatch, position: TrainingProgress) -> None:
        """Record the training metrics since the last line and show them."""
        position.seconds = time.monotonic() - self._begin
        objective = self.trainer.objective
        sums, row = self.meter.next_line()
        row |= objective.averages(sums, "train", call.step) | {
            k: float(f(call.step)) for k, f in self.schedules.items()
        }
        row["learning_rate"] *= position.plateau.get("scale", 1.0)
        epoch = int(call.groups[-1].epoch + call.groups[-1].progress)  # rounded as in _validate
        self._outputs.write({"step": call.step, "epoch": epoch, "seconds": position.seconds, **row})
        self._outputs.check()
        self._progress.show(call.step, self.num_steps, row, objective.line(row, "train"))

    def _validate(self, state: TrainState, position: TrainingProgress) -> TrainState:
        """Validate the averaged parameters, save them if they are the best, and update the plateau.

        Returns:
          The state, with a lower learning rate if the validation loss has reached a plateau.
        """
        with self.meter.clock("validation"):
            sums = validate(self.trainer, state.ema, self.valid, self.batches)
        objective = self.trainer.objective
        row = objective.averages(sums, "valid")
        position.seconds = time.monotonic() - self._begin
        self._outputs.write(
            {
                "step": position.step,
                "epoch": int(position.epoch),
                "seconds": position.seconds,
                **row,
            }
        )
        best = row["valid_loss"] < position.best_loss
        log.info(
            "step %d  validation: %s%s",
            position.step,
            objective.line(row, "valid"),
            "  (best)" if best else "",
        )
        if best:
            position.best_loss = row["valid_loss"]
            with self.meter.clock("checkpoint"):
                self._outputs.save_best(
                    position.step,
                    self.trainer.snapshot(state.ema),
                    self._checkpoint_metadata(position),
                )
        if self.plateau is None:
            return state
        plateau = Plateau(**position.plateau).update(
            row["valid_loss"], position.epoch, **self.plateau
        )
        if plateau.scale != position.plateau.get("scale", 1.0):
            log.info(
                "step %d  the learning rate goes down to %.3g of its start",
                position.step,
                plateau.scale,
            )
            state = self.trainer.scale_rate(state, plateau.scale)
        position.plateau = dataclasses.asdict(plateau)
        return state

    def _save(
        self, state: TrainState, position: TrainingProgress, stream, wait: bool = False
    ) -> None:
        """Save a checkpoint to resume from, in the background unless `wait` is set."""
        position.seconds, position.input = time.monotonic() - self._begin, stream.state
        with self.meter.clock("checkpoint"):
            self._outputs.save(
                position.step, self.trainer.snapshot(state), self._checkpoint_metadata(position)
            )
            if wait:
                self._outputs.wait()

    def _checkpoint_metadata(self, position: TrainingProgress) -> dict[str, Any]:
        """Return the metadata of a checkpoint."""
        return {**self.metadata, "position": dataclasses.asdict(position)}
