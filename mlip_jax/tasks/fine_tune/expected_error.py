"""Expected error of a fine-tuned force field in its new domain."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.potential import Potential
from mlip_jax.simulation.energies import atom_features, energies_and_forces
from mlip_jax.simulation.trust.atom_domain import FORCES
from mlip_jax.simulation.trust.domain import Domain

log = logging.getLogger(__name__)

_RESAMPLES = 1_000


def expected_error(
    potential: Potential, domain: Domain | None, test: Columns, seed: int
) -> dict[str, Any] | None:
    """Return the expected mean errors of further structures like the test structures.

    The test structures took part in no choice. The intervals are from resampled molecules, or
    resampled structures if there are fewer than 10 molecules.

    Args:
      potential: Fine-tuned force field.
      domain: Its domain, or None.
      test: Test structures.
      seed: Seed of the resampling.

    Returns:
      num_structures and num_molecules; energy and force with "mean", "low" and "high", the ends of
      the 95 % interval (meV/atom, meV/Å); outside, the fraction of test structures outside the
      domain; and calibrated_force, the mean of the error that the domain predicts inside (meV/Å).
      Values are None without labels, or if predictions are not finite. None if there are no test structures.
    """
    if not len(test):
        return None
    energy, forces = energies_and_forces(potential, test, np.arange(len(test)))
    starts = test.offsets[:-1]
    per_structure = {
        "energy": 1e3 * np.abs(energy - test.energy) / test.n_atoms,
        "force": 1e3 * np.add.reduceat(np.abs(forces - test.forces).mean(1), starts) / test.n_atoms,
    }
    labeled = {
        "energy": np.isfinite(test.energy),
        "force": np.isfinite(np.add.reduceat(test.forces.sum(1), starts)),
    }
    weights = {"energy": None, "force": test.n_atoms}
    names, molecule = np.unique(test.molecule.astype(str), return_inverse=True)
    groups = molecule if len(names) >= 10 else np.arange(len(test))
    result: dict[str, Any] = {
        "num_structures": len(test),
        "num_molecules": len(names),
        **{
            name: _interval(values, groups, weights[name], seed, known=labeled[name])
            for name, values in per_structure.items()
        },
        "outside": None,
        "calibrated_force": None,
    }
    if domain is not None:
        distance = domain.distance(atom_features(potential, test))
        outside = np.maximum.reduceat(distance, starts) > domain.border
        result["outside"] = float(outside.mean())
        if FORCES in domain.errors and (distance <= domain.border).any():
            predicted = domain.expected_error(FORCES, distance)
            result["calibrated_force"] = 1e3 * float(np.nanmean(predicted))
    return result


def _interval(
    values: np.ndarray,
    groups: np.ndarray,
    weights: np.ndarray | None,
    seed: int,
    *,
    known: np.ndarray,
) -> dict[str, float] | None:
    """Return the mean of values and its 95 % interval over resampled groups; None if unknown.

    Args:
      values: Error of each structure, (S,).
      groups: Number of the group of each structure, (S,).
      weights: Weight of each structure, (S,); None for equal weights.
      seed: Seed of the resampling.
      known: Whether each structure has a label, (S,).
    """
    if not known.any():
        return None
    broken = int((~np.isfinite(values[known])).sum())
    if broken:
        log.warning(
            "expected error: predictions of %d of %d test structures are not finite",
            broken,
            known.sum(),
        )
        return None
    weights = (np.ones(len(values)) if weights is None else weights.astype(float))[known]
    _, groups = np.unique(groups[known], return_inverse=True)
    sums = np.bincount(groups, weights * values[known])
    counts = np.bincount(groups, weights)
    picks = np.random.default_rng(seed).integers(len(sums), size=(_RESAMPLES, len(sums)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": float(sums.sum() / counts.sum()), "low": float(low), "high": float(high)}
