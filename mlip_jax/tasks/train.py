"""Task `train`: train a force field on a data set and write a report."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.datasets.stress import STRESS
from mlip_jax.defaults.training import LENGTH
from mlip_jax.tasks.force_field_training.loop import build_loop
from mlip_jax.tasks.force_field_training.preparation import TrainingRun
from mlip_jax.tasks.force_field_training.report import report_run
from mlip_jax.training.loop import TrainingLoop
from mlip_jax.training.options import check, set_model_options
from mlip_jax.training.outputs import restore
from mlip_jax.training.prepare import count_steps, log_model, make_batches
from mlip_jax.workdir import claimed

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Train a force field by `config`, or resume a run in `workdir`; return the path of the report.

    All processes of a run call this function; only the leader writes files.

    Raises:
      ConfigError, WorkdirError, DatasetError, TrainingError, Stopped: The message explains how to
        fix the problem.
    """
    with prepared(config, workdir) as training:
        return report_run(training, *fit(training))


@contextlib.contextmanager
def prepared(config: ml_collections.ConfigDict, workdir: str | Path) -> Iterator[TrainingRun]:
    """Claim the workdir and yield the inputs of the run. Raises as `run`."""
    config = configs.complete(config, defaults.train_defaults())
    check(config)
    with contextlib.ExitStack() as stack:
        with distributed.leader_first("workdir"):
            if distributed.leader():
                stack.enter_context(claimed(workdir, configs.identity(config), LENGTH))
        set_model_options(config, Path(workdir))
        training = TrainingRun.prepare(config, Path(workdir))
        yield training.with_batch_size(restore(training.workdir))


def fit(training: TrainingRun) -> tuple[TrainingLoop, Any, float, dict[str, float]]:
    """Create the batches and train, or resume.

    Returns:
      The loop, which has ended; parameters of the same shapes as those of the checkpoints; the
      training time (s); the fraction of each padded size that is filled.
    """
    config, splits = training.config, training.splits
    restored = restore(training.workdir)
    reference = np.array(training.statistics["reference_energies"])
    unseen = {f"{name} unseen": split for name, (split, _) in training.unseen.items()}
    batches, fill = make_batches(
        config,
        splits | unseen,
        training.model,
        reference,
        restored,
        properties=(STRESS,) if config.loss.stress else (),
    )
    per_epoch = batches.steps_per_epoch(splits["train"])
    num_steps = count_steps(config, per_epoch)
    params = training.initial_parameters()
    loop = build_loop(training, batches, num_steps, per_epoch, params)
    log_model(config.model.name, params)
    progress = loop.run(params, restored)
    log.info(
        "time breakdown: %s",
        ", ".join(f"{100 * share:.2f} % {name}" for name, share in loop.meter.summary().items()),
    )
    return loop, params, progress.seconds, fill
