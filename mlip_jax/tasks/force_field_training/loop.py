"""Training loop of a force field, with its objective, optimizer and schedules."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlip_jax.tasks.force_field_training.preparation import TrainingRun
from mlip_jax.training import losses, optimizer
from mlip_jax.training.data import Batches
from mlip_jax.training.device import residence
from mlip_jax.training.loop import TrainingLoop
from mlip_jax.training.objectives import ForceField
from mlip_jax.training.prepare import step_flops, with_intervals
from mlip_jax.training.step import Trainer
from mlip_jax.training.throughput import ThroughputMeter


def build_loop(
    run: TrainingRun, batches: Batches, num_steps: int, per_epoch: float, params: Any
) -> TrainingLoop:
    """Build the training loop of a run.

    Args:
      run: Inputs of the run.
      batches: Factory of the batches.
      num_steps: Number of training steps.
      per_epoch: Number of training steps per epoch.
      params: Parameters, for the count of FLOPs.
    """
    c, train = run.config, run.splits["train"]
    beta = losses.beta_schedule(
        c.loss.beta, c.loss.beta_end, c.loss.beta_begin, num_steps, c.loss.beta_schedule
    )
    build, device_data = residence.load(
        train,
        batches,
        c.train.resident,
        unsupported="loss.stress" if c.loss.stress else "",  # the data have no stress
        model=run.model,
    )
    trainer = Trainer(
        _build_objective(run, beta),
        optimizer.create(c.optimizer, num_steps, per_epoch),
        c.train.ema_decay,
        build=build,
        data=device_data,
        matmul_precision=c.train.matmul_precision,
    )
    per_dispatch = c.train.steps_per_dispatch or (residence.STEPS_PER_DISPATCH if build else 1)
    batches = dataclasses.replace(
        batches, resident=build is not None, put=trainer.put if per_dispatch == 1 else batches.put
    )
    valid = run.splits["valid"] if len(run.splits["valid"]) else train
    return TrainingLoop(
        trainer=trainer,
        batches=batches,
        train=train,
        valid=valid.sample(c.train.max_valid, c.seed),
        workdir=run.workdir,
        metadata=run.metadata,
        schedules={
            "learning_rate": optimizer.learning_rate(c.optimizer, num_steps, per_epoch),
            "beta": beta,
        },
        options=with_intervals(c.train, num_steps),
        num_steps=num_steps,
        seed=c.seed,
        meter=ThroughputMeter(train.sizes, step_flops(trainer, batches, train, params)),
        plateau=optimizer.plateau_options(c.optimizer),
        steps_per_dispatch=per_dispatch,
    )


def _build_objective(run: TrainingRun, beta) -> ForceField:
    """Return the objective: the loss of energies and forces with the weight schedule `beta`."""
    c = run.config.loss
    return ForceField(
        run.model,
        run.statistics["energy_scale"],
        beta,
        c.beta_end,
        {
            "penalty": c.penalty,
            "force_penalty": c.force_penalty,
            "huber_delta": c.huber_delta,
            "force_floor": c.force_floor,
            "energy_per_atom": c.energy_per_atom,
        },
        energy_only=run.energy_only,
        stress_weight=c.stress,
    )
