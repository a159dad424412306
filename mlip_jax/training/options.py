"""Checks of a config before anything is read or compiled: what training makes of it would else fail much later."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import ml_collections

from mlip_jax.config import ConfigError, unknown_name
from mlip_jax.training import losses, optimizer
from mlip_jax.training.nonfinite import CHOICES

_AT_LEAST_ONE = (lambda x: x >= 1, "at least 1")
_NOT_NEGATIVE = (lambda x: x >= 0, "zero or more")

# What each field has to be; None, where a field may be unset, is left to its default.
_RULES = {
    "num_steps": _AT_LEAST_ONE,
    "num_epochs": (lambda x: x > 0, "a positive number, or unset to train for train.num_steps"),
    "batch_size": (lambda x: x > 0, "a positive number of structures"),
    "micro_batches": (lambda x: x >= 1, "at least 1, or unset for one for each device"),
    "ema_decay": (lambda x: 0 <= x < 1, "at least 0 (no average) and below 1"),
    "log_every": _AT_LEAST_ONE,
    "valid_every": _AT_LEAST_ONE,
    "checkpoint_every": _AT_LEAST_ONE,
    "max_valid": _AT_LEAST_ONE,
    "steps_per_dispatch": (lambda x: x >= 0, "the updates of one call to the device, or 0 to have them chosen"),
    "profile_steps": _NOT_NEGATIVE,
}
_MAY_BE_UNSET = ("num_epochs", "micro_batches")


def check(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError where a field of the parts "train", "loss" and "optimizer" cannot be meant."""
    check_options(config.train)
    loss = config.loss
    losses.check_penalties(loss.penalty, loss.force_penalty, loss.huber_delta, loss.force_floor)
    losses.beta_schedule(loss.beta, loss.beta_end, loss.beta_begin, config.train.num_steps, loss.beta_schedule)
    optimizer.create(config.optimizer, config.train.num_steps)


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ConfigError where a field of `options`, config.train, cannot be meant: all such fields are named."""
    problems = []
    for field, (holds, expected) in _RULES.items():
        value = options[field]
        if value is None and field in _MAY_BE_UNSET:
            continue
        if not (isinstance(value, numbers.Real) and math.isfinite(value) and holds(value)):
            problems.append(f"train.{field} must be {expected}, received {value!r}")
    if options["on_nonfinite"] not in CHOICES:
        problems.append(unknown_name("train.on_nonfinite", options["on_nonfinite"], CHOICES))
    if problems:
        raise ConfigError("; ".join(problems))
