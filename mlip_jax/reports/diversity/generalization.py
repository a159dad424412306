"""Generalization errors of a run on unseen molecules and conformers: metrics and errors by RMSD."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

# Names for readers of the four metrics, and of all unseen conformers together.
NAMES = {
    "iid_s": "IID-S",
    "ood_s": "OOD-S",
    "iid_c": "IID-C",
    "ood_c": "OOD-C",
    "unseen_c": "all unseen conformers",
}
MEANINGS = {
    "iid_s": "unseen molecules of the same data",
    "ood_s": "molecules of another data set",
    "iid_c": "unseen conformers close to a training conformer",
    "ood_c": "unseen conformers far from all training conformers",
    "unseen_c": "unseen conformers of the training molecules",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Errors:
    """Energies and force errors of S structures.

    Attributes:
      energy: Reference total energies in eV, (S,).
      predicted: Predicted total energies in eV, (S,).
      n_atoms: Number of atoms, (S,).
      molecule: Identifier of the molecule, (S,) of any sortable type.
      force_error: Mean |error| of the force components in eV/Å, (S,), NaN without a label; None if
        no forces were computed.
    """

    energy: np.ndarray
    predicted: np.ndarray
    n_atoms: np.ndarray
    molecule: np.ndarray
    force_error: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.energy)

    def take(self, indices: np.ndarray) -> Errors:
        """Return the errors of the structures with the given indices."""
        values = (getattr(self, f.name) for f in dataclasses.fields(self))
        return Errors(*(None if v is None else v[indices] for v in values))

    @property
    def force_mae(self) -> float | None:
        """Mean |error| of all force components in meV/Å; None without force errors."""
        if self.force_error is None:
            return None
        known = np.isfinite(self.force_error)
        return (
            float(1e3 * np.average(self.force_error[known], weights=self.n_atoms[known]))
            if known.any()
            else None
        )

    @property
    def total(self) -> np.ndarray:
        """Errors of the total energies (predicted minus reference) in meV, (S,)."""
        return 1e3 * (self.predicted - self.energy)

    @property
    def relative(self) -> np.ndarray:
        """Errors minus their mean over the molecule in meV, (S,); NaN for single structures.

        These are the errors of energy differences between conformers; a constant error per molecule
        cancels.
        """
        _, unit = np.unique(self.molecule, return_inverse=True)  # (S,) index of the molecule
        count = np.bincount(unit)
        mean = np.bincount(unit, self.total) / np.maximum(count, 1)
        return np.where(count[unit] > 1, self.total - mean[unit], np.nan)


def summary(errors: Errors) -> dict[str, Any]:
    """Compute counts and average errors, ready for JSON; None if there is nothing to average.

    energy_mae_mev and energy_rmse_mev refer to total energies, energy_mae_mev_per_atom to energies
    divided by the number of atoms, relative_mae_mev to energies relative to other conformers of the
    molecule (see `Errors.relative`), and force_mae_mev_per_ang to all force components.
    """
    total, relative = errors.total, errors.relative
    return {
        "num_structures": len(errors),
        "num_molecules": len(np.unique(errors.molecule)),
        "energy_mae_mev": _mean(np.abs(total)),
        "energy_mae_mev_per_atom": _mean(np.abs(total) / errors.n_atoms),
        "energy_rmse_mev": None if not len(total) else math.sqrt(_mean(total**2)),
        "relative_mae_mev": _mean(np.abs(relative[np.isfinite(relative)])),
        "force_mae_mev_per_ang": errors.force_mae,
    }


def by_distance(errors: Errors, rmsd: np.ndarray, edges: np.ndarray) -> dict[str, list]:
    """Compute mean absolute errors of conformers in bins of their RMSD, ready for JSON.

    Args:
      errors: Errors of the conformers.
      rmsd: RMSD per conformer in Å, (S,). NaN is in no bin.
      edges: Edges of the bins in Å, ascending, (B + 1,). The last bin also contains all larger
        values.

    Returns:
      A dictionary with "edges_ang", (B + 1,), and with "count", "energy_mae_mev",
      "energy_mae_mev_per_atom", "relative_mae_mev" and "force_mae_mev_per_ang", (B,) each.
    """
    bins = np.where(np.isfinite(rmsd), np.digitize(np.nan_to_num(rmsd), edges[1:-1]), -1)
    relative = np.abs(errors.relative)
    parts = [np.flatnonzero(bins == b) for b in range(len(edges) - 1)]
    return {
        "edges_ang": list(map(float, edges)),
        "count": [len(p) for p in parts],
        "energy_mae_mev": [_mean(np.abs(errors.total[p])) for p in parts],
        "energy_mae_mev_per_atom": [
            _mean(np.abs(errors.total[p]) / errors.n_atoms[p]) for p in parts
        ],
        "relative_mae_mev": [_mean(relative[p][np.isfinite(relative[p])]) for p in parts],
        "force_mae_mev_per_ang": [errors.take(p).force_mae for p in parts],
    }


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None
