"""The Python function that does what the task `predict` does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from mlip_jax.datasets.molecules.arguments import molecule_records
from mlip_jax.datasets.smiles.embedding import MoleculeRecord
from mlip_jax.simulation.trust.intervals import COVERAGE
from mlip_jax.tasks.property_prediction.ensemble import Ensemble

log = logging.getLogger(__name__)


def predict(
    predictor: str | Path | Sequence[str | Path],
    molecules: Any,
    *,
    coverage: float = COVERAGE,
    num_conformers: int = 1,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """Predict properties of molecules, with expected errors and prediction intervals.

    >>> found = predict("runs/gap", ["CCO", "CCN"])  # doctest: +SKIP
    >>> found["gap"], found["gap_lower"], found["gap_upper"]  # doctest: +SKIP

    Args:
      predictor: Workdir of a run of task "property"; several, as a sequence or as in
        "runs/a,runs/b", are an ensemble.
      molecules: ASE's Atoms, a SMILES, the path of a file of molecules, or a list of these.
      coverage: Probability that an interval contains the property.
      num_conformers: Number of geometries that are embedded per SMILES; predictions are their mean.
      seed: Seed of the embedding.
      batch_size: Number of geometries per batch.

    Returns:
      The columns of predictions.csv (configs/predict.py), (S,) each, NaN if unknown, and "failure":
      the reason why a molecule has no prediction, or "". Conformers that cannot be embedded are left
      out of the mean, with a warning.

    Raises:
      ConfigError, CheckpointError: The predictors cannot be loaded together.
      ValueError: None of the molecules can be predicted, or an argument is not a molecule.
    """
    items = [predictor] if isinstance(predictor, str | Path) else list(predictor)
    ensemble = Ensemble.load(",".join(map(str, items)))
    groups = molecule_records(
        molecules, num_conformers=num_conformers, seed=seed, embed=ensemble.reads_positions
    )
    if not groups or not all(groups):
        raise ValueError("molecules: received no molecule, or a list without a geometry")
    conformers, failures = zip(*(_usable(group, ensemble) for group in groups))
    done = [s for s, reason in enumerate(failures) if not reason]
    if not done:
        raise ValueError(failures[0])
    weights = [np.full(len(conformers[s]), 1.0 / len(conformers[s])) for s in done]
    predicted = ensemble.predict([conformers[s] for s in done], weights, batch_size, coverage)
    result = {name: np.full(len(groups), np.nan) for name in predicted}
    for name, values in predicted.items():
        result[name][done] = values
    return result | {"failure": np.array(failures, object)}


def _usable(group: Sequence[MoleculeRecord], ensemble: Ensemble) -> tuple[list[Atoms], str]:
    """Return the conformers of a molecule that can be predicted, or the reason why none can."""
    usable, failures = [], []
    for record in group:
        if record.atoms is None:
            failures.append(record.failure)
        elif problem := ensemble.problem(record):
            failures.append(f"{record.display_name}: {problem}")
        else:
            record.atoms.info.setdefault("smiles", record.smiles)
            usable.append(record.atoms)
    if not usable:
        return [], failures[0]
    if failures:
        log.warning(
            "%s: predicted from %d of %d conformers; the first reason: %s",
            group[0].display_name,
            len(usable),
            len(group),
            failures[0],
        )
    return usable, ""
