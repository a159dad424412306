"""What a run's errors on unseen molecules and conformers come to: the four metrics, and errors by distance."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

# Of the four metrics, and of all unseen conformers together; what a reader sees.
NAMES = {"iid_s": "IID-S", "ood_s": "OOD-S", "iid_c": "IID-C", "ood_c": "OOD-C", "unseen_c": "all unseen conformers"}
MEANINGS = {
    "iid_s": "unseen molecules of the same data", "ood_s": "molecules of another data set",
    "iid_c": "unseen conformers near to a training conformer", "ood_c": "unseen conformers far from all of them",
    "unseen_c": "unseen conformers of the training molecules"}


@dataclasses.dataclass(frozen=True, eq=False)
class Errors:
    """Energies of S structures, and errors of their forces.

    Attributes:
      energy, predicted: (S,) eV, total. n_atoms: (S,). molecule: (S,), of any sortable type.
      force_error: Mean |error| of the force components, (S,) eV/Å, NaN without a label; None where no forces were
        computed.
    """

    energy: np.ndarray
    predicted: np.ndarray
    n_atoms: np.ndarray
    molecule: np.ndarray
    force_error: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.energy)

    def take(self, places: np.ndarray) -> Errors:
        """Those of some structures."""
        values = (getattr(self, f.name) for f in dataclasses.fields(self))
        return Errors(*(None if v is None else v[places] for v in values))

    @property
    def force_mae(self) -> float | None:
        """Mean |error| of all force components, meV/Å; None where there is none."""
        if self.force_error is None:
            return None
        known = np.isfinite(self.force_error)
        return float(1e3 * np.average(self.force_error[known], weights=self.n_atoms[known])) if known.any() else None

    @property
    def total(self) -> np.ndarray:
        """Predicted less reference, (S,) meV."""
        return 1e3 * (self.predicted - self.energy)

    @property
    def relative(self) -> np.ndarray:
        """The same less its mean over the molecule, (S,) meV; NaN for the only structure of a molecule.

        What is left is the error of energy differences between conformers: the level of the molecule is not in it.
        """
        _, unit = np.unique(self.molecule, return_inverse=True)
        count = np.bincount(unit)
        mean = np.bincount(unit, self.total) / np.maximum(count, 1)
        return np.where(count[unit] > 1, self.total - mean[unit], np.nan)


def summary(errors: Errors) -> dict[str, Any]:
    """Counts and mean absolute errors, ready for JSON; None where there is nothing to average.

    energy_mae_mev and energy_rmse_mev are of total energies, energy_mae_mev_per_atom divides them by the atoms, and
    relative_mae_mev is of energies less their mean error over the molecule. force_mae_mev_per_ang is of all components.
    """
    total, relative = errors.total, errors.relative
    return {"num_structures": len(errors), "num_molecules": len(np.unique(errors.molecule)),
            "energy_mae_mev": _mean(np.abs(total)), "energy_mae_mev_per_atom": _mean(np.abs(total) / errors.n_atoms),
            "energy_rmse_mev": None if not len(total) else math.sqrt(_mean(total**2)),
            "relative_mae_mev": _mean(np.abs(relative[np.isfinite(relative)])),
            "force_mae_mev_per_ang": errors.force_mae}


def by_distance(errors: Errors, rmsd: np.ndarray, edges: np.ndarray) -> dict[str, list]:
    """Mean absolute errors of the conformers whose RMSD lies in each bin, ready for JSON.

    Args:
      rmsd: (S,) Å; NaN is in no bin. edges: Of the bins, (B + 1,) Å ascending; the last bin holds all beyond.

    Returns:
      {"edges_ang": (B + 1,), "count", "energy_mae_mev", "energy_mae_mev_per_atom", "relative_mae_mev",
      "force_mae_mev_per_ang": (B,)}
    """
    bins = np.where(np.isfinite(rmsd), np.digitize(np.nan_to_num(rmsd), edges[1:-1]), -1)
    relative = np.abs(errors.relative)
    parts = [np.flatnonzero(bins == b) for b in range(len(edges) - 1)]
    return {"edges_ang": list(map(float, edges)), "count": [len(p) for p in parts],
            "energy_mae_mev": [_mean(np.abs(errors.total[p])) for p in parts],
            "energy_mae_mev_per_atom": [_mean(np.abs(errors.total[p]) / errors.n_atoms[p]) for p in parts],
            "relative_mae_mev": [_mean(relative[p][np.isfinite(relative[p])]) for p in parts],
            "force_mae_mev_per_ang": [errors.take(p).force_mae for p in parts]}


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None
