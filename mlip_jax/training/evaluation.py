"""Evaluation of a model on a split: error sums and predictions."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mlip_jax import distributed
from mlip_jax.checkpoint import Restored
from mlip_jax.datasets.statistics import sum_reference
from mlip_jax.potential import BEST
from mlip_jax.training.data import Batches, Split
from mlip_jax.training.nonfinite import TrainingError
from mlip_jax.training.outputs import restore
from mlip_jax.training.step import Trainer

log = logging.getLogger(__name__)


class Predicted(NamedTuple):
    """Predictions for all structures of a split, float64.

    Attributes:
      energy: Total energies including the reference energies (eV), (S,).
      forces: Forces (eV/Å), (A, 3).
      stress: Stress (eV/Å³), (S, 3, 3), if the objective computes it, otherwise None.
    """

    energy: np.ndarray
    forces: np.ndarray
    stress: np.ndarray | None = None


def restore_best(workdir: Path) -> Restored:
    """Return the best checkpoint of a run on all processes.

    Raises:
      TrainingError: There is none.
    """
    best = restore(workdir, BEST)
    if best is None:
        raise TrainingError(
            "no best checkpoint to evaluate: the validation loss was never finite. Inspect "
            "valid_loss in metrics.csv and lower optimizer.learning_rate."
        )
    log.info("evaluating the best checkpoint (step %d)", best.step)
    return best


def add(sums: list[Any]) -> Any:
    """Add up the sums of several batches, in float64 on the host."""
    return jax.tree.map(
        lambda *values: float(np.sum([np.asarray(v, np.float64) for v in values])), *sums
    )


def validate(trainer: Trainer, params: Any, split: Split, batches: Batches) -> Any:
    """Compute the error sums over a split. `params` are replicated over the devices."""
    with contextlib.closing(batches.in_order(split)) as stream:
        sums = [trainer.evaluate(params, graphs)[1] for _, graphs in stream]
        return add([trainer.single(s) for s in sums])  # fetched only after all were dispatched


def predict(trainer: Trainer, params: Any, split: Split, batches: Batches) -> Predicted:
    """Predict energies and forces of every structure of a split, in the order of the split.

    Every process computes its share and returns the predictions of all. `params` are replicated
    over the devices.
    """
    columns = split.columns(labels_only=True)
    energy, forces = (
        np.zeros(len(columns), np.float32),
        np.zeros((len(columns.numbers), 3), np.float32),
    )
    stress, with_stress = np.zeros((len(columns), 3, 3), np.float32), False
    with contextlib.closing(batches.in_order(split)) as stream:
        for plan, graphs in stream:
            evaluation = trainer.local(trainer.evaluate(params, graphs)[0])
            for device, members in enumerate(batches.local_members(plan)):
                rows = columns.atoms_of(members)
                energy[members] = evaluation.energy[device][: len(members)]
                forces[rows] = evaluation.forces[device][: len(rows)]
                if evaluation.stress is not None:
                    stress[members] = evaluation.stress[device][: len(members)]
                    with_stress = True
    # each process has zeros for the structures of the others, so the sum is complete
    energy, forces = distributed.total(energy), distributed.total(forces)
    return Predicted(
        energy.astype(np.float64) + sum_reference(batches.reference, columns),
        forces.astype(np.float64),
        distributed.total(stress).astype(np.float64) if with_stress else None,
    )
