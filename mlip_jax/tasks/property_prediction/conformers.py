"""Geometries of the molecules to predict: conformers, relaxed or not, and their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from ase import Atoms, units

from mlip_jax.datasets.smiles.embedding import MoleculeRecord
from mlip_jax.simulation.relaxation.relax import Relaxer
from mlip_jax.tasks.property_prediction.ensemble import Ensemble

_ORIGIN = {"": "", "converged": ", relaxed", "step limit": ", relaxed up to the step limit"}
_UNUSABLE = ("failed", "diverged")


class Conformer(NamedTuple):
    """A geometry of a molecule.

    Attributes:
      record: Record of the molecule.
      atoms: Atoms, None if the geometry is unusable.
      geometry: Origin of the geometry.
      reason: Reason why the geometry is unusable, "" otherwise.
      energy: Energy (eV), NaN without a force field.
    """

    record: MoleculeRecord
    atoms: Atoms | None
    geometry: str
    reason: str = ""
    energy: float = float("nan")


class PredictionInput(NamedTuple):
    """A molecule to predict.

    Attributes:
      index: Index of the molecule in its file.
      record: Record of its first conformer.
      conformers: Geometries; none if the molecule cannot be predicted.
      weights: Weights of the conformers, which add up to one.
      geometry: Origin of the geometries.
      reason: Reason why the molecule cannot be predicted, "" otherwise.
    """

    index: int
    record: MoleculeRecord
    conformers: list[Atoms]
    weights: np.ndarray
    geometry: str
    reason: str


def prediction_inputs(
    records: Iterable[MoleculeRecord],
    relaxer: Relaxer | None,
    ensemble: Ensemble,
    num_conformers: int = 1,
    temperature: float | None = None,
) -> Iterator[PredictionInput]:
    """Yield the molecules of records when all of their conformers are done.

    Args:
      records: Records of conformers, whose index is that of the molecule times `num_conformers`,
        plus the number of the conformer.
      relaxer: Relaxer, or None to use the geometries of the records.
      ensemble: Predictors, which decide which molecules can be predicted.
      num_conformers: Number of records per molecule.
      temperature: Temperature (K) of the Boltzmann weights; None for equal weights.
    """
    waiting: dict[int, list[Conformer]] = {}
    for conformer in _conformers(records, relaxer, ensemble):
        index = conformer.record.index // num_conformers
        group = waiting.setdefault(index, [])
        group.append(conformer)
        if len(group) == num_conformers:
            yield _molecule(index, waiting.pop(index), temperature)


def boltzmann_weights(energies: np.ndarray, temperature: float) -> np.ndarray:
    """Return the weights of energies (eV) at a temperature (K), which add up to one.

    >>> boltzmann_weights(np.array([-1.0, -1.0]), 300.0).tolist()
    [0.5, 0.5]
    """
    factors = np.exp(-(energies - energies.min()) / (units.kB * temperature))
    return factors / factors.sum()


def _molecule(index: int, group: list[Conformer], temperature: float | None) -> PredictionInput:
    """Combine the conformers of a molecule; unusable ones are skipped."""
    group.sort(key=lambda conformer: conformer.record.index)
    usable = [conformer for conformer in group if conformer.atoms is not None]
    if not usable:
        first = group[0]
        return PredictionInput(index, first.record, [], np.zeros(0), first.geometry, first.reason)
    weights = np.full(len(usable), 1.0 / len(usable))
    if temperature is not None:
        weights = boltzmann_weights(np.array([c.energy for c in usable]), temperature)
    geometry = usable[0].geometry
    if len(group) > 1:
        geometry = f"{geometry}; {len(usable)} of {len(group)} conformers"
    atoms = [conformer.atoms for conformer in usable]
    return PredictionInput(index, usable[0].record, atoms, weights, geometry, "")


def _conformers(
    records: Iterable[MoleculeRecord], relaxer: Relaxer | None, ensemble: Ensemble
) -> Iterator[Conformer]:
    """Yield the geometry of each record, in any order."""
    failed, by_index = [], {}

    def usable():
        for record in records:
            reason = record.failure or ensemble.problem(record)
            if reason:
                failed.append(Conformer(record, None, record.geometry, reason))
                continue
            by_index[record.index] = record
            yield record.index, record.atoms

    if relaxer is None:
        done = ((index, atoms, "", "", np.nan) for index, atoms in usable())
    else:
        done = (
            (index, r.atoms, r.status, r.reason, r.energy) for index, r in relaxer.stream(usable())
        )
    for index, atoms, status, reason, energy in done:
        yield from (failed.pop() for _ in range(len(failed)))
        record = by_index.pop(index)
        if status in _UNUSABLE:
            yield Conformer(record, None, record.geometry, f"relaxation {status}: {reason}")
        else:
            atoms.info.setdefault("smiles", record.smiles)
            yield Conformer(record, atoms, record.geometry + _ORIGIN[status], "", energy)
    yield from failed
