"""Training loop of a property predictor, with its objective and optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlip_jax.datasets.property_data import Target
from mlip_jax.models.layers.readouts import PropertyModel
from mlip_jax.tasks.property_training.data import PropertyInputs
from mlip_jax.training import optimizer
from mlip_jax.training.data import Batches
from mlip_jax.training.dens import DeNS, ForceFieldAdapter
from mlip_jax.training.device import residence
from mlip_jax.training.loop import TrainingLoop
from mlip_jax.training.objectives import ForceField
from mlip_jax.training.prepare import step_flops, with_intervals
from mlip_jax.training.property_objective import Properties
from mlip_jax.training.step import Trainer
from mlip_jax.training.throughput import ThroughputMeter


def optimizer_options(config) -> dict[str, Any]:
    """Return the optimizer options; the backbone is frozen if only heads are trained."""
    frozen = ("params/backbone/*",) if config.init.train == "heads" else ()
    return {**dict(config.optimizer), "freeze": (*config.optimizer.freeze, *frozen)}


def build_objective(
    config, model: PropertyModel, targets: Sequence[Target], energy_scale: float
) -> Properties | DeNS:
    """Return the objective: properties and optional alignment, or energies and forces with DeNS."""
    c = config
    if not c.dens.weight:
        return Properties(
            model,
            tuple(targets),
            c.property.penalty,
            c.property.huber_delta,
            c.align.weight,
            c.align.loss,
            c.align.noise or 1.0,
        )
    # norms of force errors, and errors of total energies, as in configs/pubchemqcr.py
    force_field = ForceField(
        ForceFieldAdapter(model),
        energy_scale,
        lambda step: c.dens.beta,
        c.dens.beta,
        {"penalty": "mae", "force_penalty": "norm", "energy_per_atom": False},
    )
    return DeNS(force_field, c.dens.weight, c.align.noise, energy_scale)


def build_loop(
    config,
    workdir: Path,
    objective: Properties | DeNS,
    batches: Batches,
    inputs: PropertyInputs,
    *,
    metadata: dict[str, Any],
    num_steps: int,
    per_epoch: float,
    params: Any,
) -> TrainingLoop:
    """Build the training loop of a run.

    Args:
      config: Config of the task.
      workdir: Directory of the run.
      objective: Model and loss.
      batches: Factory of the batches.
      inputs: Splits of the data.
      metadata: Metadata of all checkpoints.
      num_steps: Number of training steps.
      per_epoch: Number of training steps per epoch.
      params: Parameters, for the count of FLOPs.
    """
    c, options, train, valid = config, optimizer_options(config), inputs.train, inputs.valid
    unsupported = "" if inputs.displace is None else "align.noise or align.frames"
    if batches.bonds:
        unsupported = f"model.name={c.model.name!r}, which reads bonds"
    build, device_data = residence.load(train, batches, c.train.resident, unsupported=unsupported)
    trainer = Trainer(
        objective,
        optimizer.create(options, num_steps, per_epoch),
        c.train.ema_decay,
        build=build,
        data=device_data,
        matmul_precision=c.train.matmul_precision,
    )
    per_dispatch = c.train.steps_per_dispatch or (residence.STEPS_PER_DISPATCH if build else 1)
    meter = ThroughputMeter(train.sizes, step_flops(trainer, batches, train, params))
    return TrainingLoop(
        trainer=trainer,
        batches=dataclasses.replace(
            batches,
            resident=build is not None,
            put=trainer.put if per_dispatch == 1 else batches.put,
        ),
        train=train,
        valid=valid.sample(c.train.max_valid, c.seed) if len(valid) else train,
        workdir=workdir,
        metadata=metadata,
        schedules={"learning_rate": optimizer.learning_rate(options, num_steps, per_epoch)},
        options=with_intervals(c.train, num_steps),
        num_steps=num_steps,
        seed=c.seed,
        meter=meter,
        plateau=optimizer.plateau_options(c.optimizer),
        steps_per_dispatch=per_dispatch,
    )
