"""The training loop: steps, validation, checkpoints, and the exact resumption of a stopped run.

One iteration of the loop (`TrainingLoop._steps`):

1. Take the batches of the next steps from the stream (`DispatchSource.next`). They share a size
   bucket and end at the next step that logs, validates or saves.
2. Dispatch these steps to the devices (`Trainer.train`). This returns before they are done.
3. Read the results of earlier dispatches (`_process_results`): log a line, note a stop request, or
   handle a non-finite loss. At most `AHEAD` results stay unread, none before a validation or a
   checkpoint.
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
from typing import Any

import numpy as np

from mlip_jax import distributed
from mlip_jax.checkpoint import Restored, from_arrays
from mlip_jax.training.data import Batches, Split
from mlip_jax.training.dispatch import Dispatch, DispatchSource
from mlip_jax.training.evaluation import validate
from mlip_jax.training.nonfinite import NonFinite
from mlip_jax.training.optimizer import Plateau
from mlip_jax.training.outputs import TrainingOutputs, restore
from mlip_jax.training.progress import TrainingProgressBar
from mlip_jax.training.recorder import columns
from mlip_jax.training.step import Trainer, TrainState
from mlip_jax.training.throughput import ThroughputMeter
from mlip_jax.training.trace import Trace

log = logging.getLogger(__name__)

# Maximum number of dispatches whose results have not been read.
AHEAD = 2


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

    def __post_init__(self):
        self._unread: collections.deque[Dispatch] = collections.deque()
        self._stop_requested = False  # by a signal to any process
        # set by `run`
        self._params: Any = None
        self._ahead = 0
        self._start_time = 0.0  # clock time at which training would have started without breaks (s)
        self._nonfinite: NonFinite
        self._outputs: TrainingOutputs
        self._signal: distributed.StopSignal
        self._bar: TrainingProgressBar
        self._trace: Trace

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
        self._unread.clear()
        self._stop_requested = False
        state, progress = self._start(restored)
        # must be identical on all processes; otherwise they would stop at different steps
        self._ahead = distributed.broadcast(0 if self.trainer.oversubscribed else AHEAD)
        self._start_time = time.monotonic() - progress.seconds
        self._nonfinite = NonFinite(self.options.on_nonfinite, self.train, self.workdir)
        with contextlib.ExitStack() as stack:
            self._outputs = stack.enter_context(contextlib.closing(self._open_outputs()))
            self._outputs.begin(progress.step)
            self._signal = stack.enter_context(distributed.StopSignal())
            self._bar = stack.enter_context(TrainingProgressBar(self.num_steps, progress.step))
            profile_steps = self.options.profile_steps if distributed.leader() else 0
            self._trace = stack.enter_context(Trace(self.workdir / "trace", profile_steps))
            self.meter.start()
            self._steps(state, progress)
            with self.meter.clock("checkpoint"):
                self._outputs.wait()
            # A signal may arrive after the last dispatch. No later result would pass it on to the
            # other processes.
            if distributed.total(np.array([bool(self._signal.received)], np.float32)).any():
                raise self._stop_error(progress.step)
        return progress

    def _open_outputs(self) -> TrainingOutputs:
        """Open the checkpoint and metric files of the run."""
        return TrainingOutputs(
            self.workdir, distributed.leader(), columns(self.trainer.objective.columns)
        )

    def _start(self, restored: Restored | None) -> tuple[TrainState, TrainingProgress]:
        """Return the state and the progress of a checkpoint, or the initial ones if it is None."""
        state = self.trainer.init(self._params)
        if restored is None:
            return state, TrainingProgress(micro_batches=self.batches.micro_batches)
        progress = TrainingProgress(**restored.metadata["position"])
        log.info("resuming from the checkpoint at step %d", progress.step)
        return self.trainer.put_state(
            from_arrays(self.trainer.single(state), restored.arrays)
        ), progress

    def _steps(self, state: TrainState, progress: TrainingProgress) -> None:
        """Run the loop up to the last step; see the module's docstring. Updates `progress`."""
        stream = self.batches.training(self.train, self.seed, progress.input)
        with contextlib.closing(stream):
            source = DispatchSource(stream, self.steps_per_dispatch, self.trainer.put)
            while progress.step < self.num_steps:
                with self.meter.clock("input", unless=self._busy):
                    plans, inputs = source.next(self._steps_until_due(progress.step))
                state, result = self.trainer.train(
                    state,
                    inputs,
                    len(plans),
                    bucket=plans[0].bucket,
                    stop=bool(self._signal.received),
                )
                progress.step += len(plans)
                progress.epoch = plans[-1].epoch + plans[-1].progress
                self._unread.append(Dispatch(progress.step, plans, result))
                self._trace.step(result)
                state = self._run_scheduled(state, progress, source)

    def _run_scheduled(
        self, state: TrainState, progress: TrainingProgress, source: DispatchSource
    ) -> TrainState:
        """Read results, then validate, save or stop if that is due after the last dispatch.

        Raises:
          distributed.Stopped: A signal was received. Validation and checkpoint of this step are
            complete, so the resumed run does not miss them.
        """
        step = progress.step
        to_validate, to_save = (
            self._due(step, every)
            for every in (self.options.valid_every, self.options.checkpoint_every)
        )
        state = self._process_results(
            0 if to_validate or to_save else self._ahead, state, progress, source
        )
        to_stop = self._stop_requested and not source.holds_batch
        if to_stop:
            state = self._process_results(0, state, progress, source)
        if progress.step < step:  # rolled back to a checkpoint, where everything due is done
            return state
        if to_validate:
            state = self._validate(state, progress)
        if to_save or to_stop:
            self._save(state, progress, source, wait=to_stop)
        if to_stop:
            raise self._stop_error(step)
        return state

    def _stop_error(self, step: int) -> distributed.Stopped:
        """Return the exception of a run that was stopped at `step`."""
        return distributed.Stopped(
            f"stopped by {self._signal.received or 'another process'} at step {step}; checkpoint "
            "saved. Rerun the same command to resume."
        )

    def _steps_until_due(self, step: int) -> int:
        """Return the number of steps after `step` up to the next that logs, validates or saves."""
        periods = (self.options.log_every, self.options.valid_every, self.options.checkpoint_every)
        return min(self.num_steps - step, *(every - step % every for every in periods))

    def _process_results(
        self, ahead: int, state: TrainState, progress: TrainingProgress, source: DispatchSource
    ) -> TrainState:
        """Read results until at most `ahead` are unread, and act on them.

        A result may contain a stop request, call for a log line, or be non-finite. In the last case
        the loop may roll back. Returns the state to continue from.
        """
        while len(self._unread) > ahead:
            dispatch = self._unread.popleft()
            result = self.trainer.single(dispatch.result)
            self._stop_requested |= bool(result.stop[0])
            finite = result.finite[: len(dispatch.plans)]  # (S,) -> the steps that were performed
            self.meter.add(dispatch.plans, result.sums, finite)
            if not finite.all():
                first = dispatch.step - len(dispatch.plans) + 1
                bad = [(first + i, dispatch.plans[i]) for i in np.flatnonzero(~finite)]
                if self._nonfinite.should_roll_back(
                    bad, progress.rollbacks, write=distributed.leader()
                ):
                    return self._roll_back(progress, source)
            if self._due(dispatch.step, self.options.log_every):
                self._log(dispatch, progress)
        return state

    def _roll_back(self, progress: TrainingProgress, source: DispatchSource) -> TrainState:
        """Return the state of the last checkpoint, or the initial one if there is none.

        The stream of batches is not rolled back, so the batch with the non-finite loss is not
        repeated.
        """
        while self._unread:  # wait for the dispatches in progress and discard their results
            self.trainer.single(self._unread.popleft().result)
        self._outputs.wait()
        state, before = self._start(restore(self.workdir))
        source.discard_batch()
        # best_loss is kept, because the checkpoint with that loss is still on disk
        progress.step, progress.plateau = before.step, before.plateau
        progress.rollbacks += 1
        self.meter.next_line()
        self._outputs.begin(progress.step)
        self._save(state, progress, source)
        return state

    def _busy(self) -> bool:
        """Return whether the devices are still computing the last dispatch."""
        return bool(self._unread) and not self._unread[-1].result.finite.is_ready()

    def _due(self, step: int, every: int) -> bool:
        """Return whether an action with the period `every` is due at `step`.

        Every action is due at the last step.
        """
        return step % every == 0 or step == self.num_steps

    def _log(self, dispatch: Dispatch, progress: TrainingProgress) -> None:
        """Record the training metrics since the last line and show them."""
        progress.seconds = time.monotonic() - self._start_time
        objective = self.trainer.objective
        sums, row = self.meter.next_line()
        row |= objective.averages(sums, "train", dispatch.step) | {
            k: float(f(dispatch.step)) for k, f in self.schedules.items()
        }
        row["learning_rate"] *= progress.plateau.get("scale", 1.0)
        last = dispatch.plans[-1]
        epoch = int(last.epoch + last.progress)  # rounded as in _validate
        self._outputs.write(
            {"step": dispatch.step, "epoch": epoch, "seconds": progress.seconds, **row}
        )
        self._outputs.check()
        self._bar.show(dispatch.step, self.num_steps, row, objective.line(row, "train"))

    def _validate(self, state: TrainState, progress: TrainingProgress) -> TrainState:
        """Validate the averaged parameters, save them if they are the best, and update the plateau.

        Returns:
          The state, with a lower learning rate if the validation loss has reached a plateau.
        """
        with self.meter.clock("validation"):
            sums = validate(self.trainer, state.ema, self.valid, self.batches)
        objective = self.trainer.objective
        row = objective.averages(sums, "valid")
        progress.seconds = time.monotonic() - self._start_time
        self._outputs.write(
            {
                "step": progress.step,
                "epoch": int(progress.epoch),
                "seconds": progress.seconds,
                **row,
            }
        )
        best = row["valid_loss"] < progress.best_loss
        log.info(
            "step %d  validation: %s%s",
            progress.step,
            objective.line(row, "valid"),
            "  (best)" if best else "",
        )
        if best:
            progress.best_loss = row["valid_loss"]
            with self.meter.clock("checkpoint"):
                self._outputs.save_best(
                    progress.step,
                    self.trainer.snapshot(state.ema),
                    self._checkpoint_metadata(progress),
                )
        if self.plateau is None:
            return state
        plateau = Plateau(**progress.plateau).update(
            row["valid_loss"], progress.epoch, **self.plateau
        )
        if plateau.scale != progress.plateau.get("scale", 1.0):
            log.info(
                "step %d  reducing the learning rate to %.3g of its initial value",
                progress.step,
                plateau.scale,
            )
            state = self.trainer.scale_rate(state, plateau.scale)
        progress.plateau = dataclasses.asdict(plateau)
        return state

    def _save(
        self,
        state: TrainState,
        progress: TrainingProgress,
        source: DispatchSource,
        wait: bool = False,
    ) -> None:
        """Save a checkpoint to resume from, in the background unless `wait` is set."""
        progress.seconds, progress.input = time.monotonic() - self._start_time, source.stream.state
        with self.meter.clock("checkpoint"):
            self._outputs.save(
                progress.step, self.trainer.snapshot(state), self._checkpoint_metadata(progress)
            )
            if wait:
                self._outputs.wait()

    def _checkpoint_metadata(self, progress: TrainingProgress) -> dict[str, Any]:
        """Return the metadata of a checkpoint."""
        return {**self.metadata, "position": dataclasses.asdict(progress)}
