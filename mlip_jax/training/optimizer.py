"""Optimizers and learning-rate schedules by config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from mlip_jax.config import unknown_name

OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("cosine", "exponential", "constant")


def learning_rate(config: Mapping[str, Any], num_steps: int) -> Callable[[Any], jax.Array]:
    """`step -> learning rate`: linear warm-up, then the decay of `config.schedule`, to `learning_rate_end`."""
    peak, end = float(config["learning_rate"]), float(config["learning_rate_end"])
    warmup = min(int(config["warmup_steps"]), max(num_steps - 1, 0))
    rest = max(num_steps - warmup, 1)
    if config["schedule"] == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, end / peak)
    elif config["schedule"] == "exponential":
        decay = optax.exponential_decay(peak, rest, end / peak)
    elif config["schedule"] == "constant":
        decay = optax.constant_schedule(peak)
    else:
        raise ValueError(unknown_name("optimizer.schedule", config["schedule"], SCHEDULES))
    return optax.join_schedules([optax.linear_schedule(peak / max(warmup, 1), peak, warmup), decay], [warmup])


def create(config: Mapping[str, Any], num_steps: int) -> optax.GradientTransformation:
    """The optimizer of `config`: clipping by global norm, Adam or AdamW (decay on matrices alone), schedule."""
    rate = learning_rate(config, num_steps)
    moments = {"b1": config["b1"], "b2": config["b2"], "eps": config["eps"]}
    if config["name"] == "adam":
        rule = optax.adam(rate, **moments)
    elif config["name"] == "adamw":
        rule = optax.adamw(rate, weight_decay=config["weight_decay"], mask=_matrices, **moments)
    else:
        raise ValueError(unknown_name("optimizer.name", config["name"], OPTIMIZERS))
    clip = config["clip_norm"]
    return optax.chain(optax.clip_by_global_norm(clip), rule) if clip else rule


def _matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)
