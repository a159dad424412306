"""The training loop: updates, validation, checkpoints, and going on exactly where a run was stopped.

The loop hands updates to the devices ahead of what they have done and looks at results later, so that they never wait
for it. What a result asks for (a log line, a stop, a loss that is not finite) is done when it is looked at, which is at
the same step in all processes.
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

# Calls whose results are not looked at yet.
_AHEAD = 2


@dataclasses.dataclass
class TrainingProgress:
    """Where a run stands: what a checkpoint stores beside the arrays.

    Attributes:
      step: Updates done. epoch: Epochs done, with the part of the one under way.
      input: State of the stream of batches. micro_batches: Of an update.
      seconds: Of training so far, all starts together. best_loss: Of the validations.
      plateau: Of the learning rate. rollbacks: How often the run went back to a checkpoint.
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
    """Updates that were handed to the devices: the step after them, what they work on, and what will come of it."""

    step: int
    groups: list[StepPlan]
    result: DispatchResult


@dataclasses.dataclass
class TrainingLoop:
    """Trains to `num_steps`.

    Attributes:
      trainer, batches, train, valid: What to train with. valid is the part used while training.
      workdir: Checkpoints go to workdir/checkpoints and workdir/best.
      metadata: Goes into every checkpoint (config, statistics, versions).
      schedules: Functions of the step to record: {"learning_rate": ..., "beta": ...}.
      options: config.train. num_steps: To train to. seed: Of the batch order.
      plateau: Options of Plateau.update, or None.
      meter: Counts work and time.
      steps_per_call: Updates of one call to the devices, at most.
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
    steps_per_call: int = 1

    def run(self, params: Any, restored: Restored | None = None) -> TrainingProgress:
        """Train from a checkpoint of this run, or from `params` where there is none.

        Raises:
          distributed.Stopped: By a signal, after saving. TrainingError: The loss is not finite.
          CheckpointError: Something cannot be written, or the checkpoint does not fit.
        """
        self._params = params
        state, position = self._start(restored)
        self._calls: collections.deque[Dispatch] = collections.deque()
        self._held: tuple[StepPlan, Any] | None = None
        self._stop = False
        # alike in all processes, which else would stop at different steps
        self._ahead = distributed.broadcast(0 if self.trainer.crowded else _AHEAD)
        self._begin = time.monotonic() - position.seconds
        self._nonfinite = NonFinite(self.options.on_nonfinite, self.train, self.workdir)
        with contextlib.ExitStack() as stack:
            self._outputs = stack.enter_context(contextlib.closing(TrainingOutputs(
                self.workdir, distributed.leader(), columns(self.trainer.objective.columns))))
            self._outputs.begin(position.step)
            self._signal = stack.enter_context(distributed.StopSignal())
            self._progress = stack.enter_context(TrainingProgressBar(self.num_steps, position.step))
            self._trace = stack.enter_context(Trace(
                self.workdir / "trace", self.options.profile_steps if distributed.leader() else 0))
            self.meter.start()
            self._steps(state, position)
            with self.meter.clock("checkpoint"):
                self._outputs.wait()
            # a signal after the last call, of which no result tells the others
            if distributed.total(np.array([bool(self._signal.received)], np.float32)).any():
                raise self._stopped(position.step)
        return position

    def _start(self, restored: Restored | None) -> tuple[TrainState, TrainingProgress]:
        state = self.trainer.init(self._params)
        if restored is None:
            return state, TrainingProgress(micro_batches=self.batches.micro_batches)
        position = TrainingProgress(**restored.metadata["position"])
        log.info("going on from the checkpoint of step %d", position.step)
        return self.trainer.replicate(from_arrays(self.trainer.single(state), restored.arrays)), position

    def _steps(self, state: TrainState, position: TrainingProgress) -> None:
        with contextlib.closing(self.batches.training(self.train, self.seed, position.input)) as stream:
            while position.step < self.num_steps:
                with self.meter.clock("input", unless=self._busy):
                    groups, inputs = self._next(stream, position.step)
                state, result = self.trainer.train(state, inputs, len(groups), bucket=groups[0].bucket,
                                                   stop=bool(self._signal.received))
                position.step += len(groups)
                position.epoch = groups[-1].epoch + groups[-1].progress
                self._calls.append(Dispatch(position.step, groups, result))
                self._trace.step(result)
                state = self._after(state, position, stream)

    def _after(self, state: TrainState, position: TrainingProgress, stream) -> TrainState:
        """Do what is due after the call that was made last.

        Raises:
          distributed.Stopped: A signal has come; all is done that is due at this step, so that it is not missing later.
        """
        step = position.step
        to_validate, to_save = (self._due(step, every) for every in (
            self.options.valid_every, self.options.checkpoint_every))
        state = self._settle(0 if to_validate or to_save else self._ahead, state, position, stream)
        to_stop = self._stop and self._held is None
        if to_stop:
            state = self._settle(0, state, position, stream)
        if position.step < step:  # back at a checkpoint, where all was done that was due
            return state
        if to_validate:
            state = self._validate(state, position)
        if to_save or to_stop:
            self._save(state, position, stream, wait=to_stop)
        if to_stop:
            raise self._stopped(step)
        return state

    def _stopped(self, step: int) -> distributed.Stopped:
        return distributed.Stopped(f"stopped by {self._signal.received or 'another process'} at step {step}, and "
                                   "saved; the same command goes on from there")

    def _next(self, stream, step: int) -> tuple[list[StepPlan], Any]:
        """Groups of one bucket, up to the next step at which something is due, and their input on the devices."""
        most = min([self.steps_per_call, self.num_steps - step] + [
            every - step % every
            for every in (self.options.log_every, self.options.valid_every, self.options.checkpoint_every)])
        taken = []
        while len(taken) < most:
            group, batch = self._held or next(stream)
            self._held = None
            if taken and group.bucket != taken[0][0].bucket:
                self._held = group, batch
                break
            taken.append((group, batch))
        inputs = [batch for _, batch in taken]
        if self.steps_per_call == 1:
            return [taken[0][0]], inputs[0]
        # what is not to be done needs some values as well
        inputs += inputs[-1:] * (self.steps_per_call - len(inputs))
        return [g for g, _ in taken], self.trainer.put(jax.tree.map(lambda *x: np.concatenate(x, 1), *inputs))

    def _settle(self, ahead: int, state: TrainState, position: TrainingProgress, stream) -> TrainState:
        """Look at results until no more than `ahead` are left, and do what they ask for."""
        while len(self._calls) > ahead:
            call = self._calls.popleft()
            result = self.trainer.single(call.result)
            self._stop |= bool(result.stop[0])
            finite = result.finite[:len(call.groups)]
            self.meter.add(call.groups, result.sums, finite)
            if not finite.all():
                first = call.step - len(call.groups) + 1
                bad = [(first + i, call.groups[i]) for i in np.flatnonzero(~finite)]
                if self._nonfinite.to_roll_back(bad, position.rollbacks, write=distributed.leader()):
                    return self._roll_back(position, stream)
            if self._due(call.step, self.options.log_every):
                self._log(call, position)
        return state

    def _roll_back(self, position: TrainingProgress, stream) -> TrainState:
        """The state of the last checkpoint; the batches go on from here, so that the bad one does not come again."""
        while self._calls:
            self.trainer.single(self._calls.popleft().result)
        self._outputs.wait()
        state, before = self._start(restore(self.workdir))
        self._held = None
        # the best so far stays: it is on the disk, from wherever it was found
        position.step, position.plateau = before.step, before.plateau
        position.rollbacks += 1
        self.meter.next_line()
        self._outputs.begin(position.step)
        self._save(state, position, stream)
        return state

    def _busy(self) -> bool:
        """Whether the devices still have something to do."""
        return bool(self._calls) and not self._calls[-1].result.finite.is_ready()

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.num_steps

    def _log(self, call: Dispatch, position: TrainingProgress) -> None:
        position.seconds = time.monotonic() - self._begin
        objective = self.trainer.objective
        sums, row = self.meter.next_line()
        row |= objective.averages(sums, "train", call.step) | {
            k: float(f(call.step)) for k, f in self.schedules.items()}
        row["learning_rate"] *= position.plateau.get("scale", 1.0)
        epoch = int(call.groups[-1].epoch + call.groups[-1].progress)  # as in the rows of validations
        self._outputs.write({"step": call.step, "epoch": epoch, "seconds": position.seconds, **row})
        self._outputs.check()
        self._progress.show(call.step, self.num_steps, row, objective.line(row, "train"))

    def _validate(self, state: TrainState, position: TrainingProgress) -> TrainState:
        with self.meter.clock("validation"):
            sums = validate(self.trainer, state.ema, self.valid, self.batches)
        objective = self.trainer.objective
        row = objective.averages(sums, "valid")
        position.seconds = time.monotonic() - self._begin
        self._outputs.write({"step": position.step, "epoch": int(position.epoch), "seconds": position.seconds, **row})
        best = row["valid_loss"] < position.best_loss
        log.info("step %d  validation: %s%s", position.step, objective.line(row, "valid"), "  (best)" if best else "")
        if best:
            position.best_loss = row["valid_loss"]
            with self.meter.clock("checkpoint"):
                self._outputs.save_best(position.step, self.trainer.snapshot(state.ema), self._about(position))
        if self.plateau is None:
            return state
        plateau = Plateau(**position.plateau).update(row["valid_loss"], position.epoch, **self.plateau)
        if plateau.scale != position.plateau.get("scale", 1.0):
            log.info("step %d  the learning rate goes down to %.3g of its start", position.step, plateau.scale)
            state = self.trainer.scale_rate(state, plateau.scale)
        position.plateau = dataclasses.asdict(plateau)
        return state

    def _save(self, state: TrainState, position: TrainingProgress, stream, wait: bool = False) -> None:
        position.seconds, position.input = time.monotonic() - self._begin, stream.state
        with self.meter.clock("checkpoint"):
            self._outputs.save(position.step, self.trainer.snapshot(state), self._about(position))
            if wait:
                self._outputs.wait()

    def _about(self, position: TrainingProgress) -> dict[str, Any]:
        return {**self.metadata, "position": dataclasses.asdict(position)}
