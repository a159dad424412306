"""Uncertainty of a force field for unlabeled structures, and the error that it stands for.

    ensemble   spread of the forces over the members of an ensemble
    domain     distance of the atoms from the labeled atoms, in the features of the force field
    features   leverage of the atoms in the last-layer features: the standard deviation of a linear
               readout that is fitted to the labeled atoms, up to a factor

Each is averaged over the atoms of a structure. A factor turns it into the expected error, the mean
|error| of the force components. The factor is fitted to validation molecules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality.geometry import segment_sum
from mlip_jax.potential import Potential
from mlip_jax.simulation.energies import atom_features, energies_and_forces
from mlip_jax.simulation.trust.domain import Domain

ENSEMBLE, DOMAIN, FEATURES = "ensemble", "domain", "features"
KINDS = (ENSEMBLE, DOMAIN, FEATURES)
_FLOOR = 0.1  # quantile of the uncertainties of validation that is the smallest one used
# Ridge of the leverage, in units of the mean squared feature, and maximum number of atoms of a fit.
_RIDGE, _MAX_ATOMS = 1e-3, 20_000


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predictions of the members of an ensemble for S structures with A atoms.

    Attributes:
      energies: Total energies (eV), (M, S).
      forces: Forces (eV/Å), (M, A, 3).
    """

    energies: np.ndarray
    forces: np.ndarray

    @property
    def energy(self) -> np.ndarray:
        """Mean energies (eV), (S,)."""
        return self.energies.mean(axis=0)

    @property
    def force(self) -> np.ndarray:
        """Mean forces (eV/Å), (A, 3)."""
        return self.forces.mean(axis=0)


def predict(members: Sequence[Potential], columns: Columns) -> Prediction:
    """Evaluate the members on structures of elements that they know."""
    indices = np.arange(len(columns))
    energies, forces = zip(*(energies_and_forces(m, columns, indices) for m in members))
    return Prediction(np.stack(energies), np.stack(forces))


def force_errors(columns: Columns, forces: np.ndarray) -> np.ndarray:
    """Return the mean |error| of the force components of each structure (eV/Å), (S,)."""
    return mean_over_atoms(np.abs(forces - columns.forces).mean(axis=1), columns)


def mean_over_atoms(values: np.ndarray, columns: Columns) -> np.ndarray:
    """Return the mean over the atoms of each structure, (A,) -> (S,)."""
    return segment_sum(values, columns.offsets[:-1]) / columns.n_atoms


@dataclasses.dataclass(frozen=True)
class Uncertainty:
    """Uncertainty of the current force field.

    Attributes:
      kind: "ensemble", "domain" or "features".
      members: Members of the ensemble; the features are those of the first one.
      labeled: Labeled training structures.
      seed: Seed of the choice of labeled atoms.
    """

    kind: str
    members: Sequence[Potential]
    labeled: Columns
    seed: int = 0

    def of(self, columns: Columns, prediction: Prediction) -> np.ndarray:
        """Return the uncertainty of each structure, (S,), in units of its own.

        Args:
          columns: Structures.
          prediction: Result of `predict` for them.
        """
        if self.kind == ENSEMBLE:
            deviation = prediction.forces.std(axis=0, ddof=1)  # (A, 3)
            return mean_over_atoms(np.sqrt((deviation**2).mean(axis=1)), columns)
        features = atom_features(self.members[0], columns)
        known = self._labeled_features()
        per_atom = _distances(known, features) if self.kind == DOMAIN else leverage(known, features)
        return mean_over_atoms(per_atom, columns)

    def _labeled_features(self) -> np.ndarray:
        """Return the features of labeled atoms, at most a fixed number of them."""
        features = atom_features(self.members[0], self.labeled)
        if len(features) > _MAX_ATOMS:
            rng = np.random.default_rng(self.seed)
            features = features[np.sort(rng.choice(len(features), _MAX_ATOMS, replace=False))]
        return features


def _distances(known: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return the distance of each atom from the labeled atoms, as in the domain of a force field."""
    rows = np.linspace(0, len(known) - 1, min(len(known), 4096)).astype(int)
    return Domain.fit(known[rows], known[rows], {}).distance(features)


def leverage(known: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return the root of f (F^T F / N + ridge)^-1 f of each row f of the features, (A,).

    Args:
      known: Features of N labeled atoms, (N, K).
      features: Features of A atoms, (A, K).
    """
    known, features = known.astype(np.float64), features.astype(np.float64)
    gram = known.T @ known / len(known)
    gram += _RIDGE * max(float(np.trace(gram)) / len(gram), 1e-30) * np.eye(len(gram))
    solved = np.linalg.solve(np.linalg.cholesky(gram), features.T)  # (K, A)
    return np.sqrt((solved**2).sum(axis=0))


@dataclasses.dataclass(frozen=True)
class ErrorScale:
    """Factor from the uncertainty of structures to the expected mean |error| of their forces.

    Attributes:
      factor: Expected error (eV/Å) over uncertainty.
      floor: Smallest uncertainty that is used: a few members can agree by chance.
    """

    factor: float
    floor: float

    @classmethod
    def fit(cls, errors: np.ndarray, uncertainty: np.ndarray, n_atoms: np.ndarray) -> ErrorScale:
        """Fit the factor such that the expected and the true mean over all atoms agree.

        Args:
          errors: Mean |error| of the force components of each structure (eV/Å), (S,); NaN without
            a label.
          uncertainty: Uncertainty of each structure, (S,).
          n_atoms: Number of atoms of each structure, (S,).

        Raises:
          ValueError: No structure has an error and an uncertainty.
        """
        known = np.isfinite(errors) & np.isfinite(uncertainty)
        if not known.any():
            raise ValueError("the expected error needs validation structures with forces")
        floor = float(np.quantile(uncertainty[known], _FLOOR))
        used = np.maximum(uncertainty[known], floor)
        total = float((n_atoms[known] * used).sum())
        factor = float((n_atoms[known] * errors[known]).sum()) / total if total > 0 else 0.0
        return cls(factor, floor)

    def expected(self, uncertainty: np.ndarray) -> np.ndarray:
        """Return the expected mean |error| of the force components (eV/Å), (S,)."""
        return self.factor * np.maximum(uncertainty, self.floor)
