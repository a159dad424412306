"""Consistency checks of training options, before data are read or programs compiled."""

from __future__ import annotations

import ml_collections

from mlip_jax.training import losses, optimizer


def check(config: ml_collections.ConfigDict) -> None:
    """Raise ValueError if fields of "train", "loss" and "optimizer" are inconsistent.

    The values of single fields are checked by their declarations (mlip_jax/defaults).
    """
    loss = config.loss
    losses.check_penalties(loss.penalty, loss.force_penalty, loss.huber_delta, loss.force_floor)
    losses.beta_schedule(
        loss.beta, loss.beta_end, loss.beta_begin, config.train.num_steps, loss.beta_schedule
    )
    optimizer.create(config.optimizer, config.train.num_steps)
