"""Evaluation of the force field of a round on held-out molecules."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.label_budget.geometry import environment, to_atoms
from mlip_jax.label_budget.uncertainty import ErrorScale, Uncertainty, force_errors, predict
from mlip_jax.tasks.active_learning.selection import known_rows
from mlip_jax.training.nonfinite import TrainingError


def evaluate(inputs: Any, state: Any) -> dict[str, Any]:
    """Return the errors of the current force field, and the errors to expect, in eV and Å.

    The expected error of a structure is its uncertainty times a factor that is fitted to the
    validation molecules. On the test molecules, no decision and no fit uses the labels.

    Args:
      inputs: LabelingInputs of the run.
      state: StrategyState of the round.

    Raises:
      TrainingError: No prediction of validation structures is finite.
    """
    uncertainty = Uncertainty(
        inputs.config.choose.uncertainty, state.members, state.labeled, inputs.config.seed
    )
    valid, valid_values = _predict(state, uncertainty, inputs.valid)
    if not np.isfinite(valid_values["errors"]).any():
        raise TrainingError(
            "the force fields of this round predict no finite forces for the validation structures. "
            "Lower optimizer.learning_rate in a new workdir."
        )
    scale = ErrorScale.fit(valid_values["errors"], valid_values["uncertainty"], valid.n_atoms)
    result = {
        "expected_error": _mean(scale.expected(valid_values["uncertainty"]), valid.n_atoms),
        "scale": {"factor": scale.factor, "floor": scale.floor},
        "valid": _errors(valid, valid_values),
        "test": {},
    }
    if len(inputs.test):
        test, values = _predict(state, uncertainty, inputs.test)
        expected = scale.expected(values["uncertainty"])
        result["test"] = _errors(test, values) | {
            "expected_force_mae": _mean(expected, test.n_atoms),
            "structures": {
                "molecule": test.molecule.tolist(),
                "kind": test.subset.tolist(),
                "force_error": values["errors"].tolist(),
                "expected_force_error": expected.tolist(),
                "worst_atom": values["worst_atoms"],
            },
        }
    return result


def _predict(
    state: Any, uncertainty: Uncertainty, columns: Columns
) -> tuple[Columns, dict[str, np.ndarray]]:
    """Return the structures of known elements with their errors and uncertainties."""
    known = known_rows(state.members[0], columns)
    prediction = predict(state.members, known)
    per_atom = np.abs(prediction.force - known.forces).mean(axis=1)
    return known, {
        "worst_atoms": _worst_atoms(known, per_atom),
        "errors": force_errors(known, prediction.force),
        "energy_errors": np.abs(prediction.energy - known.energy) / known.n_atoms,
        "uncertainty": uncertainty.of(known, prediction),
    }


def _worst_atoms(columns: Columns, per_atom: np.ndarray) -> list[str]:
    """Return the atom with the largest force error of each structure, with its bonds."""
    bounds = zip(columns.offsets[:-1], columns.offsets[1:])
    return [
        environment(to_atoms(columns[k]), int(np.argmax(per_atom[begin:end])))
        for k, (begin, end) in enumerate(bounds)
    ]


def _errors(columns: Columns, values: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return mean errors over structures and molecules."""
    return {
        "force_mae": _mean(values["errors"], columns.n_atoms),
        "force_p95": float(np.quantile(values["errors"], 0.95)),
        "energy_mae": float(values["energy_errors"].mean()),
        "num_structures": len(columns),
        "num_molecules": len(set(columns.molecule)),
    }


def _mean(values: np.ndarray, n_atoms: np.ndarray) -> float:
    """Return the mean over all atoms of the means of structures."""
    return float((values * n_atoms).sum() / n_atoms.sum())
