"""The Python function that does what the task `predict` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.datasets.molecules.arguments import molecule_records, usable_atoms
from mlip_jax.simulation.trust.intervals import COVERAGE
from mlip_jax.tasks.property_prediction.ensemble import Ensemble


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
      The columns of predictions.csv (configs/predict.py), (S,) each. NaN if unknown.

    Raises:
      ConfigError, CheckpointError: The predictors cannot be loaded together.
      ValueError: A molecule cannot be read or predicted.
    """
    items = [predictor] if isinstance(predictor, str | Path) else list(predictor)
    ensemble = Ensemble.load(",".join(map(str, items)))
    groups = molecule_records(
        molecules, num_conformers=num_conformers, seed=seed, embed=ensemble.reads_positions
    )
    conformers = [[usable_atoms(record) for record in group] for group in groups]
    for group, geometries in zip(groups, conformers):
        if problem := ensemble.problem(group[0]):
            raise ValueError(f"{group[0].display_name}: {problem}")
        for atoms in geometries:
            atoms.info.setdefault("smiles", group[0].smiles)
    weights = [np.full(len(group), 1.0 / len(group)) for group in conformers]
    return ensemble.predict(conformers, weights, batch_size, coverage)
