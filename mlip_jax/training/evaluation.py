"""Errors and predictions of a model on a split."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import jax
import numpy as np

from mlip_jax import distributed
from mlip_jax.datasets.statistics import sum_reference
from mlip_jax.training.data import Batches, Split
from mlip_jax.training.step import Trainer


class Predicted(NamedTuple):
    """Total energies (S,) in eV, float64, reference energies included, and forces (A, 3) in eV/Å."""

    energy: np.ndarray
    forces: np.ndarray


def add(sums: list[Any]) -> Any:
    """Sum over steps, in float64 on the host."""
    return jax.tree.map(lambda *values: float(np.sum([np.asarray(v, np.float64) for v in values])), *sums)


def validate(trainer: Trainer, params: Any, split: Split, batches: Batches) -> Any:
    """Error sums over a split; `params` are replicated."""
    with contextlib.closing(batches.in_order(split)) as stream:
        sums = [trainer.evaluate(params, graphs)[1] for _, graphs in stream]
        return add([trainer.single(s) for s in sums])  # looked at once all are on their way


def predict(trainer: Trainer, params: Any, split: Split, batches: Batches) -> Predicted:
    """Energies and forces of every structure of a split, in its order; `params` are replicated.

    Every process computes its share, and has all of it afterwards.
    """
    columns = split.columns(labels_only=True)
    energy, forces = np.zeros(len(columns), np.float32), np.zeros((len(columns.numbers), 3), np.float32)
    with contextlib.closing(batches.in_order(split)) as stream:
        for group, graphs in stream:
            evaluation = trainer.local(trainer.evaluate(params, graphs)[0])
            for device, places in enumerate(batches.of_this_host(group)):
                rows = columns.atoms_of(places)
                energy[places] = evaluation.energy[device][:len(places)]
                forces[rows] = evaluation.forces[device][:len(rows)]
    # each process has zeros where another one computed
    energy, forces = distributed.total(energy), distributed.total(forces)
    return Predicted(energy.astype(np.float64) + sum_reference(batches.reference, columns), forces.astype(np.float64))
