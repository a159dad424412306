"""Relaxations by several force fields, evaluated by a reference method (oracle)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlip_jax.datasets.selection.geometry_pools import InitialGeometry
from mlip_jax.simulation.reference.oracle import ReferenceEvaluation, ReferenceRelaxation
from mlip_jax.simulation.relaxation.metrics import Estimate, Limits, Outcomes


@dataclasses.dataclass(frozen=True)
class StartMolecules:
    """The M molecules to relax, with evaluations by the oracle.

    Attributes:
      starts: Start geometries.
      at_start: Evaluations of the start geometries by the oracle.
      at_end: Evaluations of the geometries to compare with: the oracle's own minima, or reference
        geometries.
      oracle: Name of the oracle.
    """

    starts: Sequence[InitialGeometry]
    at_start: Sequence[ReferenceEvaluation]
    at_end: Sequence[ReferenceEvaluation]
    oracle: str

    @property
    def end_at_oracle_minima(self) -> bool:
        """Whether the geometries to compare with are minima of the oracle."""
        return all(isinstance(e, ReferenceRelaxation) for e in self.at_end)


@dataclasses.dataclass(frozen=True)
class EvaluatedForceField:
    """Relaxations by a force field, with evaluations by the oracle.

    Attributes:
      name: Name of the force field.
      relaxed: Results for the M starts: "status", "reason", "steps" and "positions" (None if there
        is no geometry).
      at_relaxed: Evaluations of the relaxed geometries by the oracle.
    """

    name: str
    relaxed: Sequence[Mapping[str, Any]]
    at_relaxed: Sequence[ReferenceEvaluation]

    def outcomes(self, molecules: StartMolecules) -> Outcomes:
        """Return the energies and forces that the metrics are computed from."""
        return _combine(
            molecules,
            self.at_relaxed,
            np.array([r["status"] in ("diverged", "failed") for r in self.relaxed], bool),
        )


@dataclasses.dataclass(frozen=True)
class ForceFieldComparison:
    """Data of the report: outcomes and metrics by name, of force fields and baselines."""

    molecules: StartMolecules
    evaluated: Sequence[EvaluatedForceField]
    outcomes: dict[str, Outcomes]
    summaries: dict[str, dict[str, Estimate]]
    limits: Limits


def _combine(molecules, at_relaxed, failed) -> Outcomes:
    """Combine the oracle's energies and largest forces of M molecules."""
    return Outcomes(
        *(
            np.array([e.energy for e in evaluations], float)
            for evaluations in (molecules.at_start, at_relaxed, molecules.at_end)
        ),
        fmax=np.array([e.fmax for e in at_relaxed], float),
        failed=failed,
    )


def baselines(molecules: StartMolecules) -> dict[str, Outcomes]:
    """Return the outcomes of two baselines: the start geometries and the minima to compare with."""
    none_failed = np.zeros(len(molecules.starts), bool)
    end = f"{molecules.oracle} itself" if molecules.end_at_oracle_minima else "reference geometries"
    return {
        "start geometries": _combine(molecules, molecules.at_start, none_failed),
        end: _combine(molecules, molecules.at_end, none_failed),
    }
