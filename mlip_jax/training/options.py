"""Checks of training options against each other, before data are read or programs compiled."""

from __future__ import annotations

import ml_collections

from mlip_jax.training import losses, optimizer


def check(config: ml_collections.ConfigDict) -> None:
    """Raise ValueError if fields of "train", "loss" and "optimizer" do not fit each other.

    Values of single fields are checked where they are declared (mlip_jax/defaults).
    """
    loss = config.loss
    losses.check_penalties(loss.penalty, loss.force_penalty, loss.huber_delta, loss.force_floor)
    losses.beta_schedule(loss.beta, loss.beta_end, loss.beta_begin, config.train.num_steps, loss.beta_schedule)
    optimizer.create(config.optimizer, config.train.num_steps)
