"""Result of an evaluation, for use in Python."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from mlip_jax.tasks.force_field_evaluation.evaluation import EvaluatedStructures
from mlip_jax.tasks.force_field_evaluation.outputs import predicted_atoms
from mlip_jax.wording import count_of


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Predictions of a force field for S structures, with errors if there are labels.

    The S structures are those that the force field can evaluate, in the order of the input.

    Attributes:
      metrics: Content of metrics.json. The errors are in metrics["evaluated"], which is None
        without labels.
      evaluated: Structures, labels (`evaluated.labelled`) and predictions
        (`evaluated.predictions`) as arrays.
      report: Path of report.html, or None if no folder was given.
    """

    metrics: dict[str, Any]
    evaluated: EvaluatedStructures
    report: Path | None = None

    @property
    def indices(self) -> np.ndarray:
        """Indices of the structures in the input, (S,)."""
        return self.evaluated.indices

    @property
    def skipped(self) -> dict[int, str]:
        """Reason for each structure that was skipped, by its index in the input."""
        return self.evaluated.skipped

    @property
    def energies(self) -> np.ndarray:
        """Predicted total energies (eV), (S,)."""
        return self.evaluated.predictions.energy

    @property
    def forces(self) -> list[np.ndarray]:
        """Predicted forces (eV/Å), (n_atoms, 3) per structure."""
        predictions = self.evaluated.predictions
        return np.split(predictions.forces, predictions.offsets[1:-1])

    @property
    def stress(self) -> np.ndarray | None:
        """Predicted stress (eV/Å³), (S, 3, 3); NaN without a cell, None if no structure has one."""
        return self.evaluated.predictions.stress

    @property
    def outside_domain(self) -> np.ndarray | None:
        """Whether structures are outside the domain of the force field, (S,); None if unknown."""
        return self.evaluated.predictions.outside_domain

    def atoms(self) -> list[Atoms]:
        """Return the structures with their predictions, as in predictions.xyz."""
        columns = self.evaluated.data.rows.take(self.indices)
        return [
            predicted_atoms(structure, self.evaluated.predictions, s)
            for s, structure in enumerate(columns)
        ]

    def __repr__(self) -> str:
        scores = self.metrics["evaluated"] or {}
        errors = ", ".join(
            f"{name} MAE {scores[key]:.3g} {unit}"
            for name, key, unit in (
                ("energy", "energy_mae_mev_per_atom", "meV/atom"),
                ("force", "force_mae_mev_per_ang", "meV/Å"),
            )
            if scores.get(key) is not None
        )
        counts = f"{count_of(len(self.indices), 'structure')}, {len(self.skipped)} skipped"
        return f"EvaluationResult({counts}{', ' + errors if errors else ', no labels'})"
