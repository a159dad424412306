"""Predictions for the structures of an evaluation, in parts that an interrupted run keeps."""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols

from mlip_jax import distributed
from mlip_jax.datasets import unseen_elements
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.statistics import element_counts
from mlip_jax.datasets.stress import stress_labels
from mlip_jax.files import NUMPY_ERRORS, make_subfolder
from mlip_jax.graphs.long_range import find_lattice_obstacle
from mlip_jax.reports.errors import element_energies, energy_errors, force_errors
from mlip_jax.reports.predictions import Predictions
from mlip_jax.simulation.batch_prediction import BatchPredictor
from mlip_jax.simulation.relaxation.progress import RelaxationProgressBar
from mlip_jax.simulation.structure_predictions import StructurePredictions
from mlip_jax.simulation.trust.atom_domain import DomainEvaluation
from mlip_jax.tasks.force_field_evaluation.data import EvaluationData

log = logging.getLogger(__name__)

# Structures per part. A part is saved when it is complete, so an interruption repeats at most one.
_PART = 1024
PREDICTED, SKIPPED = "predicted", "skipped"


@dataclasses.dataclass(frozen=True)
class EvaluatedStructures:
    """Structures of an evaluation with their predictions.

    Attributes:
      data: Structures of the evaluation.
      indices: Indices in `data.rows` of the structures with predictions, (S,).
      predictions: Predictions for these structures.
      skipped: Reason for each structure without predictions, by index in `data.rows`.
      seconds: Time of the predictions, without that of earlier starts.
      align_energies: Whether `labelled` has predicted energies plus per-element energies that are
        fitted to their errors.
    """

    data: EvaluationData
    indices: np.ndarray
    predictions: StructurePredictions
    skipped: dict[int, str]
    seconds: float
    align_energies: bool = False

    @functools.cached_property
    def labelled(self) -> Predictions:
        """Labels beside predictions, as the report of a training run has them."""
        columns, predictions = self.data.rows.take(self.indices), self.predictions
        labelled = Predictions(
            numbers=columns.numbers,
            offsets=columns.offsets,
            energy=columns.energy,
            energy_predicted=predictions.energy,
            forces=columns.forces,
            forces_predicted=predictions.forces,
            molecule=columns.molecule,
            conformer=columns.conformer,
            subset=columns.subset,
            source=columns.source,
            stress=stress_labels(columns),
            stress_predicted=predictions.stress,
        )
        if not (self.align_energies and np.isfinite(labelled.energy).any()):
            return labelled
        elements = np.unique(labelled.numbers)
        shift = element_energies(labelled, energy_errors(labelled), elements)  # (elements,), eV
        counts = element_counts(labelled.numbers, labelled.sizes, elements)
        aligned = labelled.energy_predicted - counts @ shift
        return dataclasses.replace(labelled, energy_predicted=aligned)

    @property
    def has_labels(self) -> bool:
        """Whether a structure has a reference energy or a reference force."""
        p = self.labelled
        return bool(np.isfinite(p.energy).any() or np.isfinite(p.forces).any())

    def skipped_counts(self) -> dict[str, int]:
        """Return the number of skipped structures by reason, the most frequent first."""
        return dict(collections.Counter(self.skipped.values()).most_common())

    def distances_and_errors(self) -> DomainEvaluation | None:
        """Return distances from the training atoms beside errors; None without domain or labels."""
        if self.predictions.farthest is None or not self.has_labels:
            return None
        p = self.labelled
        mean_error = np.abs(force_errors(p)).mean(axis=1)  # (A,)
        return DomainEvaluation(
            self.predictions.farthest,
            np.add.reduceat(mean_error, p.offsets[:-1]) / p.sizes,
            np.abs(energy_errors(p)) / p.sizes,
        )


def evaluate(
    data: EvaluationData, predictor: BatchPredictor, folder: Path | None = None
) -> EvaluatedStructures | None:
    """Predict the properties of all structures whose elements the force field knows.

    Args:
      data: Structures.
      predictor: Force fields.
      folder: Folder of the parts; finished ones are not repeated. None keeps them in memory.

    Returns:
      The predictions, or None on processes other than the leader.

    Raises:
      DatasetError: No structure can be evaluated. The message lists the reasons.
    """
    begin, blocks = time.monotonic(), range(0, len(data.indices), _PART)
    parts = {}
    mine = blocks[distributed.index() :: distributed.count()]
    total = sum(len(data.indices[start : start + _PART]) for start in mine)
    finished = {} if folder is None else dict(_finished(data, folder, mine))
    done = sum(len(data.indices[start : start + _PART]) for start in finished)
    if done:
        log.info("resuming: %d of %d structures are done", done, total)
    with RelaxationProgressBar(
        total, done, "evaluating", noun="structures", failed_label="skipped"
    ) as progress:
        for start in mine:
            if start not in finished:
                block = data.indices[start : start + _PART]
                parts[start] = _predict(data, block, predictor, progress)
                if folder is not None:
                    _save(_file(folder, start), block, *parts.pop(start))
    distributed.barrier("evaluated")
    if not distributed.leader():
        return None
    if folder is not None:
        parts = dict(_finished(data, folder, blocks))
    return _merge(data, [parts[start] for start in blocks], predictor, time.monotonic() - begin)


def _predict(
    data: EvaluationData, block: np.ndarray, predictor: BatchPredictor, progress
) -> tuple[StructurePredictions, np.ndarray]:
    """Return the predictions of the usable structures of a block, and the reason for each other."""
    columns = data.rows.take(block, labels_only=True)
    reasons = _skip_reasons(columns, predictor)
    usable = np.flatnonzero(reasons == "")
    progress.add("failed", len(block) - len(usable))
    return (
        predictor.predict(columns.take(usable), lambda count: progress.add(PREDICTED, count)),
        reasons,
    )


def _skip_reasons(columns: Columns, predictor: BatchPredictor) -> np.ndarray:
    """Return the reason why a structure cannot be evaluated, "" if it can, (S,) str."""
    reasons = np.full(len(columns), "", object)
    for s in np.flatnonzero(~unseen_elements.of_columns(columns, predictor.elements).known):
        numbers = columns.numbers[columns.offsets[s] : columns.offsets[s + 1]]
        unknown = sorted(set(numbers.tolist()) - set(predictor.elements))
        reasons[s] = f"unknown element {', '.join(chemical_symbols[z] for z in unknown)}"
    periodic = np.zeros(len(columns), bool) if columns.pbc is None else columns.pbc.any(axis=1)
    for s in np.flatnonzero(periodic & (reasons == "")):
        for m in predictor.members:
            reasons[s] = reasons[s] or find_lattice_obstacle(
                m.potential.long_range_cutoff, columns.cell[s], columns.pbc[s]
            )
    reasons[~np.isfinite(columns.charge) & (reasons == "")] = "unknown charge"
    return reasons.astype(str)


def _file(folder: Path, start: int) -> Path:
    return folder / f"{start:09d}.npz"


def _save(
    path: Path, block: np.ndarray, predictions: StructurePredictions, reasons: np.ndarray
) -> None:
    make_subfolder(path.parent)
    predictions.save(path, block=block, reasons=reasons)


def _finished(
    data: EvaluationData, folder: Path, blocks: range
) -> Iterator[tuple[int, tuple[StructurePredictions, np.ndarray]]]:
    """Yield (start, part) of the parts that are complete and of these structures."""
    for start in blocks:
        path = _file(folder, start)
        if not path.is_file():
            continue
        try:
            predictions, arrays = StructurePredictions.load(path)
            valid = np.array_equal(arrays["block"], data.indices[start : start + _PART])
            reasons = arrays["reasons"]
        except NUMPY_ERRORS as error:
            log.warning("%s: corrupted (%s); recomputing it", path, error)
            continue
        if valid:
            yield start, (predictions, reasons)


def _merge(data: EvaluationData, parts, predictor, seconds: float) -> EvaluatedStructures:
    """Concatenate parts in the order of the structures."""
    reasons = np.concatenate([r for _, r in parts])
    evaluated = EvaluatedStructures(
        data,
        data.indices[reasons == ""],
        StructurePredictions.concatenate([p for p, _ in parts]),
        {int(i): str(r) for i, r in zip(data.indices, reasons) if r},
        seconds,
    )
    counts = ", ".join(f"{n:,} × {reason}" for reason, n in evaluated.skipped_counts().items())
    known = ", ".join(chemical_symbols[z] for z in sorted(predictor.elements))
    if not len(evaluated.indices):
        raise DatasetError(
            f"{data.name}: no structure can be evaluated: {counts}. The force field knows {known}."
        )
    if counts:
        log.warning("%s: skipped %s; the force field knows %s", data.name, counts, known)
    return evaluated
