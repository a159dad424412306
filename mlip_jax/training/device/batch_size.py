"""Batch size for the device, if the config sets none.

A GPU takes about as long for a step of 8 molecules as for one of 64, because the time is that of
starting kernels. The batch is therefore enlarged until a device has enough edges per step, and the
schedule is converted so that the run sees the same number of structures: `num_steps`,
`warmup_steps` and the intervals, also those that are unset, are divided by the factor of the batch
size, decay rates per step are raised to its power, and learning rates are multiplied by its square
root, which keeps the size of the noise of Adam's updates (Malladi et al., arXiv:2205.10287).

On CPUs, the time of a step is proportional to its structures. The factor is 1 and nothing changes.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import jax
import ml_collections
import numpy as np

from mlip_jax.config import ConfigError
from mlip_jax.training.device.intervals import default_intervals, default_warmup
from mlip_jax.wording import count_of

log = logging.getLogger(__name__)

# Edges per step at which a device computes as long as it starts kernels, by a name in its kind:
# 2 ms per step, 230 kB of memory traffic per edge, and the bandwidth of the data sheet. These are
# figures of compiled programs of So3krates; they were not measured.
_EDGES = {"B200": 64_000, "H200": 40_000, "H100": 28_000, "A100": 17_000, "L40S": 8_000}
_OTHER_EDGES = {"gpu": 8_000, "tpu": 40_000}
# Larger factors leave too few steps for the same accuracy.
_MAX_FACTOR = 8


def with_batch_size(
    config: ml_collections.ConfigDict, edges: np.ndarray, restored: dict[str, Any] | None
) -> ml_collections.ConfigDict:
    """Return the config with a batch size, and with a schedule for it.

    A config that sets `train.batch_size` is returned unchanged. A resumed run keeps the batch size
    of its first start, also on another device.

    Args:
      config: Config of a training task.
      edges: Number of edges of each training structure, shape (S,).
      restored: Metadata of the checkpoint to resume from, or None.

    Raises:
      ConfigError: The run was started with another batch size than the one that is set.
    """
    first = restored and restored["config"]["train"]["batch_size"]
    size = config.train.batch_size
    if size is not None:
        if first and first != size:
            raise ConfigError(
                f"train.batch_size is {size}, but this run was started with {first} structures "
                "per step, chosen for its device. Unset train.batch_size, or choose another "
                "--workdir."
            )
        return config
    base = config.train.schedule_batch_size
    factor = first / base if first else choose_factor(base, edges.mean(), jax.devices())
    config = config.copy_and_resolve_references()
    config.train.batch_size = round(base * factor)
    return config if factor == 1 else _convert(config, factor, len(edges))


def choose_factor(base: int, mean_edges: float, devices: list[Any]) -> int:
    """Return the factor to a batch size for all these devices: a power of two, 1 on CPUs.

    Args:
      base: Batch size that the schedule refers to.
      mean_edges: Mean number of edges of a training structure.
      devices: Devices of all processes.
    """
    device = devices[0]
    if device.platform == "cpu":
        return 1
    edges = next(
        (n for name, n in _EDGES.items() if name in device.device_kind),
        _OTHER_EDGES["tpu" if device.platform == "tpu" else "gpu"],
    )
    wanted = edges * len(devices) / (base * max(mean_edges, 1.0))
    return min(2 ** max(round(math.log2(wanted)), 0), _MAX_FACTOR)


def _convert(
    config: ml_collections.ConfigDict, factor: float, num_structures: int
) -> ml_collections.ConfigDict:
    """Convert the schedule of a config to batches that are larger by a factor, in place."""
    train, rates = config.train, config.optimizer
    before = train.num_steps
    if train.num_epochs is not None:
        before = max(round(train.num_epochs * num_structures / train.schedule_batch_size), 1)
    # the limits of values that are unset count steps of the smaller batch
    for name, value in default_intervals(before).items():
        train[name] = value if train[name] is None else train[name]
    if rates.warmup_steps is None:
        rates.warmup_steps = default_warmup(before)
    for part, name in (
        (train, "num_steps"),
        (train, "log_every"),
        (train, "valid_every"),
        (train, "checkpoint_every"),
        (rates, "warmup_steps"),
    ):
        if part[name]:
            part[name] = max(math.ceil(part[name] / factor), 1)
    train.ema_decay, rates.b2 = train.ema_decay**factor, rates.b2**factor
    for name in ("learning_rate", "learning_rate_end"):
        rates[name] *= math.sqrt(factor)
    log.info(
        "batch size: %d for this device, instead of %d; %s instead of %d, learning rate %.3g. Set "
        "train.batch_size to choose it",
        train.batch_size,
        train.schedule_batch_size,
        count_of(max(math.ceil(before / factor), 1), "step"),
        before,
        rates.learning_rate,
    )
    return config
