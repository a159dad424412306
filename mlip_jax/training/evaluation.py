"""Errors and predictions of a model on a split."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import numpy as np

from mlip_jax import distributed
from mlip_jax.datasets.statistics import sum_reference
from mlip_jax.training.data import Batches, Split
from mlip_jax.training.losses import Sums
from mlip_jax.training.step import Trainer


class Predicted(NamedTuple):
    """Total energies (S,) in eV, float64, reference energies included, and forces (A, 3) in eV/Å."""

    energy: np.ndarray
    forces: np.ndarray


def add(sums: list[Sums]) -> Sums:
    """Sum over steps, in float64 on the host."""
    return Sums(*(float(np.sum([np.asarray(value, np.float64) for value in values])) for values in zip(*sums)))


def averages(sums: Sums, beta: float, prefix: str) -> dict[str, float]:
    """Loss and mean absolute errors by name; NaN where there was no label."""

    def mean(total, count):
        return total / count if count else float("nan")

    # a term without labels is left out; one that is not finite must show
    terms = ((1 - beta, sums.energy_loss, sums.energies), (beta, sums.force_loss, sums.force_terms))
    return {f"{prefix}_loss": float(sum(weight * total / count for weight, total, count in terms if count)),
            f"{prefix}_energy_mae_mev_per_atom": 1e3 * mean(sums.energy_abs, sums.energies),
            f"{prefix}_energy_mae_mev": 1e3 * mean(sums.energy_total_abs, sums.energies),
            f"{prefix}_force_mae_mev_per_ang": 1e3 * mean(sums.force_abs, sums.forces)}


def validate(trainer: Trainer, params: Any, split: Split, batches: Batches) -> Sums:
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
