"""Consistency checks of training options, and options of the model that the config leaves to the run.

The defaults of a model's class are the published values, which checkpoints without an entry for the
option imply. New runs store their own values in each checkpoint. One of these options, the average
number of neighbors, is a statistic of the data.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from mlip_jax import models
from mlip_jax.graphs.shapes import Sizes
from mlip_jax.training import losses, optimizer
from mlip_jax.training.outputs import restore

log = logging.getLogger(__name__)
_AVERAGE = "avg_num_neighbors"


def check(config: ml_collections.ConfigDict) -> None:
    """Raise ValueError if fields of "train", "loss" and "optimizer" are inconsistent.

    The values of single fields are checked by their declarations (mlip_jax/defaults).
    """
    models.check_positions(config.model.name)
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
    restored = restore(workdir)
    if restored is not None:
        inherit_options(config, restored.metadata["config"]["model"]["options"])
    elif not config.init.workdir:
        fill_options(config, models.new_run_options(config.model.name))


def inherit_options(config: ml_collections.ConfigDict, stored: Mapping[str, Any]) -> None:
    """Set the options that a run takes from another one, in place.

    Args:
      config: Complete config of task "train" or "property".
      stored: Options of the model of the other run, which may be older than some options.
    """
    name = config.model.name
    fill_options(config, {k: stored[k] for k in models.new_run_options(name) if k in stored})
    if models.uses_average_neighbors(name, config.model.options):
        default = models.find(name).__dataclass_fields__[_AVERAGE].default
        fill_options(config, {_AVERAGE: stored.get(_AVERAGE, default)})


def set_average_neighbors(config: ml_collections.ConfigDict, sizes: Sizes) -> None:
    """Set the model's average number of neighbors, unless the config contains it, in place.

    It is that of all splits, so runs with different data.split_seed have the same model, and an
    ensemble of them is evaluated in one batch.

    Args:
      config: Complete config of task "train" or "property", after `set_model_options`.
      sizes: Sizes of all selected structures with the cutoff of the model.
    """
    options = config.model.options
    if _AVERAGE in options or not models.uses_average_neighbors(config.model.name, options):
        return
    edges = int(sizes.n_edge.sum())
    if edges:  # data of isolated atoms keep the default
        average = round(edges / int(sizes.n_node.sum()), 4)
        log.info("model.options.%s: %g, from all selected structures", _AVERAGE, average)
        fill_options(config, {_AVERAGE: average})


def fill_options(config: ml_collections.ConfigDict, options: dict) -> None:
    """Set options of the model that the config does not contain, in place."""
    given = config.model.options
    # The config of the command line is locked, and so are its options in a completed config.
    with given.unlocked():
        for name, value in options.items():
            if name not in given:
                given[name] = value
