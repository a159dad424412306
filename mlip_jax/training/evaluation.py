"""Errors and predictions of a model on a split."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import jax
import numpy as np

from mlip_jax.datasets.statistics import sum_reference
from mlip_jax.training.data import Batches, Split
from mlip_jax.training.losses import Sums
from mlip_jax.training.step import Trainer


class Predicted(NamedTuple):
    """Total energies (S,) in eV, float64, reference energies included, and forces (A, 3) in eV/Å."""

    energy: np.ndarray
    forces: np.ndarray


def add(sums: list[Sums]) -> Sums:
    """Sum over steps, in float64 on the host. Takes the sums of the first device: they are those of all."""
    host = jax.device_get(sums)
    return Sums(*(float(np.sum([np.asarray(value, np.float64).ravel()[0] for value in values]))
                  for values in zip(*host)))


def averages(sums: Sums, beta: float, prefix: str) -> dict[str, float]:
    """Loss and mean absolute errors by name; NaN where there was no label."""

    def mean(total, count):
        return total / count if count else float("nan")

    energy, force = mean(sums.energy_loss, sums.energies), mean(sums.force_loss, sums.forces)
    return {f"{prefix}_loss": float(np.nansum([(1 - beta) * energy, beta * force])),
            f"{prefix}_energy_mae_mev_per_atom": 1e3 * mean(sums.energy_abs, sums.energies),
            f"{prefix}_force_mae_mev_per_ang": 1e3 * mean(sums.force_abs, sums.forces)}


def validate(trainer: Trainer, params: Any, split: Split, batches: Batches) -> Sums:
    """Error sums over a split; `params` are replicated."""
    with contextlib.closing(batches.in_order(split)) as stream:
        return add([trainer.evaluate(params, graphs)[1] for _, graphs in stream])


def predict(trainer: Trainer, params: Any, split: Split, batches: Batches) -> Predicted:
    """Energies and forces of every structure of a split, in its order; `params` are replicated."""
    columns = split.columns(labels_only=True)
    energy, forces = np.full(len(columns), np.nan), np.full((len(columns.numbers), 3), np.nan)
    with contextlib.closing(batches.in_order(split)) as stream:
        for group, graphs in stream:
            evaluation = jax.device_get(trainer.evaluate(params, graphs)[0])
            for device, places in enumerate(batches.of_this_host(group)):
                rows = columns.atoms_of(places)
                energy[places] = evaluation.energy[device][:len(places)]
                forces[rows] = evaluation.forces[device][:len(rows)]
    return Predicted(energy + sum_reference(batches.reference, columns), forces)
