"""Consistency checks of training options, and options of the model that the config leaves to the run.

The defaults of a model's class are the published values, which checkpoints without an entry for the
option imply. New runs store their own values in each checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import ml_collections

from mlip_jax import models
from mlip_jax.training import losses, optimizer
from mlip_jax.training.outputs import restore


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


def set_model_options(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Set the options of the model that the config leaves to the run, in place.

    A run with a checkpoint continues with the values of the checkpoint, or with the published ones
    if it has none. A run that starts from another one takes those of that run; the caller sets
    them.

    Args:
      config: Complete config of task "train" or "property".
      workdir: Directory of the run.
    """
    if not config.model.name:
        return
    preferred, restored = models.new_run_options(config.model.name), restore(workdir)
    if restored is not None:
        stored = restored.metadata["config"]["model"]["options"]
        fill_options(config, {k: stored[k] for k in preferred if k in stored})
    elif not config.init.workdir:
        fill_options(config, preferred)


def fill_options(config: ml_collections.ConfigDict, options: dict) -> None:
    """Set options of the model that the config does not contain, in place."""
    given = config.model.options
    # The config of the command line is locked, and so are its options in a completed config.
    with given.unlocked():
        for name, value in options.items():
            if name not in given:
                given[name] = value
