"""Training loop of a force field, with its objective, optimizer and schedules."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax

from mlip_jax import distributed
from mlip_jax.config import ConfigError
from mlip_jax.graphs import resident
from mlip_jax.graphs.neighbor_slots import add_neighbor_slots, choose_capacity, max_neighbors
from mlip_jax.tasks.force_field_training.preparation import TrainingRun
from mlip_jax.training import losses, optimizer
from mlip_jax.training.data import Batches
from mlip_jax.training.loop import TrainingLoop
from mlip_jax.training.objectives import ForceField
from mlip_jax.training.prepare import step_flops, with_intervals
from mlip_jax.training.step import Trainer
from mlip_jax.training.throughput import ThroughputMeter

log = logging.getLogger(__name__)

# If the data are stored on the device: steps per dispatch, and maximum fraction of its memory that
# the data may take up.
_STEPS_PER_DISPATCH, _MAX_MEMORY_FRACTION = 25, 0.2


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
    build, device_data = _load_on_device(run, batches)
    trainer = Trainer(
        _build_objective(run, beta),
        optimizer.create(c.optimizer, num_steps, per_epoch),
        c.train.ema_decay,
        build=build,
        data=device_data,
        matmul_precision=c.train.matmul_precision,
    )
    per_dispatch = c.train.steps_per_dispatch or (_STEPS_PER_DISPATCH if build else 1)
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


def _load_on_device(run: TrainingRun, batches: Batches):
    """Return (build, data) of `Trainer` for data that stay on the device, or else (None, ())."""
    train = run.splits["train"]
    resident_wanted = run.config.train.resident
    if run.config.loss.stress:  # the data on the device have no stress
        if resident_wanted:
            raise ConfigError("train.resident cannot be combined with loss.stress. Unset one.")
        resident_wanted = False
    if resident_wanted is None:
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
        resident_wanted = (
            jax.default_backend() != "cpu"
            and resident.indexable(train.sizes)
            and resident.estimate_bytes(train.sizes, periodic=train.periodic, spin=train.has_spin)
            < _MAX_MEMORY_FRACTION * memory
        )
    # All processes must run the same program, but the memory of their devices may differ.
    if not distributed.broadcast(bool(resident_wanted)):
        return None, ()
    data = resident.collect(
        (columns for _, columns in train.rows.chunks(train.indices, labels_only=True)),
        run.model.cutoff,
        batches.reference,
        long_range_cutoff=batches.long_range_cutoff,
    )
    log.info("training data on the device: %.1f MB", resident.nbytes(data) / 1e6)

    capacity = choose_capacity(
        run.model,
        max_neighbors(data.receivers, data.first_edge),
        len(data.receivers) / len(data.numbers),
    )
    if capacity:
        log.info("training data on the device: %d neighbor slots per atom", capacity)

    def build(data, members, bucket):
        graph = resident.gather(data, members, batches.budgets[bucket])
        return add_neighbor_slots(graph, capacity)

    return build, data
