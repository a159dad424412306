"""Domain of a model: distance of a molecule or atom from the training data, and the expected error.

The distance is from the model's own features (PropertyModel.embed for molecules, the features
themselves for atoms) to the nearest ones of training, in units of their spread. It is calibrated on
the validation split: a sample is outside the domain if it is farther away than nearly all of
validation, and its expected error is that of validation samples at the same distance.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from mlip_jax.checkpoint import CheckpointError
from mlip_jax.foreign_files.archives import open_npz, read_array
from mlip_jax.workdir import atomic_open

FILE = "domain.npz"  # in the workdir of a predictor or a force field
# _NEIGHBORS: nearest training samples in the mean distance. _BINS: bins of the expected error.
_NEIGHBORS = 5
_BINS = 5
# _BORDER: quantile of the distances of the validation samples that is the border.
_BORDER = 0.99
_ROWS = 512  # molecules whose distances are computed at a time


@dataclasses.dataclass(frozen=True)
class Domain:
    """Training molecules, or their atoms, in the space of features.

    Attributes:
      points: Features of M training molecules or atoms minus `center`, over `spread`, (M, F).
      center: Mean of the features, (F,).
      spread: Standard deviation of the features, (F,).
      border: Distance beyond which a sample is outside.
      edges: Inner edges of the bins of the distance, (B - 1,).
      errors: Expected |error| by property in the bins, (B,) each, non-decreasing.
    """

    points: np.ndarray
    center: np.ndarray
    spread: np.ndarray
    border: float
    edges: np.ndarray
    errors: dict[str, np.ndarray]

    @classmethod
    def fit(
        cls,
        train: np.ndarray,
        valid: np.ndarray,
        errors: dict[str, np.ndarray],
        offsets: np.ndarray | None = None,
    ) -> Domain:
        """Fit a domain from features and validation errors.

        Args:
          train: Features of training, (M, F).
          valid: Features of validation, (V, F).
          errors: |error| of validation by property, (V,) each.
          offsets: (S + 1,) for atoms: those of validation structure s are offsets[s] to offsets[s +
            1]. The border is then chosen such that nearly all structures have no atom outside.

        Raises:
          ValueError: If there are no training or no validation samples.
        """
        if not len(train) or not len(valid):
            raise ValueError("a domain needs training and validation molecules")
        center, spread = (
            train.mean(0),
            np.maximum(train.std(0), 1e-6 * max(float(np.abs(train).max()), 1e-12)),
        )
        uncalibrated = cls(
            ((train - center) / spread).astype(np.float32), center, spread, np.inf, np.zeros(0), {}
        )
        distance = uncalibrated.distance(valid)
        edges = np.unique(
            np.quantile(distance, np.linspace(0, 1, min(_BINS, len(valid)) + 1)[1:-1])
        )
        # Equal distances, such as those of training samples, would leave the first bin empty.
        edges = edges[edges > distance.min()]
        bins = np.digitize(distance, edges)
        expected = {
            name: np.maximum.accumulate([_mean(e[bins == b]) for b in range(len(edges) + 1)])
            for name, e in errors.items()
        }
        farthest = distance if offsets is None else np.maximum.reduceat(distance, offsets[:-1])
        return dataclasses.replace(
            uncalibrated, border=float(np.quantile(farthest, _BORDER)), edges=edges, errors=expected
        )

    def distance(self, features: np.ndarray) -> np.ndarray:
        """Compute the mean distance to the nearest training samples, (S,)."""
        # For 5,000 points with 64 to 128 features SciPy's cKDTree takes 2 to 5 times as long (CPU
        # time) as these matrix products.
        neighbors, scaled = (
            min(_NEIGHBORS, len(self.points)),
            ((features - self.center) / self.spread).astype(np.float32),
        )
        squares, distances = (self.points**2).sum(1), np.zeros(len(scaled))
        for start in range(0, len(scaled), _ROWS):
            rows = scaled[start : start + _ROWS]
            # |a - b|² = |a|² + |b|² - 2 a·b, (rows, M); rounding can make it negative
            d2 = np.maximum((rows**2).sum(1)[:, None] + squares - 2.0 * rows @ self.points.T, 0.0)
            distances[start : start + _ROWS] = np.sqrt(
                np.partition(d2, neighbors - 1, axis=1)[:, :neighbors]
            ).mean(1)
        return distances

    def outside(self, distance: np.ndarray) -> np.ndarray:
        """Return whether samples at these distances (S,) are outside."""
        return distance > self.border

    def expected_error(self, name: str, distance: np.ndarray) -> np.ndarray:
        """Return the mean |error| of validation samples at these distances, (S,).

        NaN beyond the border, where there are too few validation samples. The unit is that of the
        property.
        """
        expected = self.errors[name][np.digitize(distance, self.edges)]
        return np.where(distance <= self.border, expected, np.nan)

    def save(self, path: Path) -> None:
        """Write the domain to an npz file."""
        with atomic_open(path) as file:
            np.savez_compressed(
                file,
                points=self.points,
                center=self.center,
                spread=self.spread,
                border=self.border,
                edges=self.edges,
                **{f"error_{name}": e for name, e in self.errors.items()},
            )

    @classmethod
    def load(cls, path: Path) -> Domain:
        """Load a domain that `save` wrote.

        Raises:
          CheckpointError: If the file does not exist or is corrupted.
        """
        if not path.is_file():
            raise CheckpointError(
                f"{path}: no such file. Runs of the tasks 'train' and 'property' write it at "
                "their end."
            )
        try:
            with open_npz(path) as stored:
                points = read_array(stored, "points", "f", None, None)
                edges = read_array(stored, "edges", "f", None)
                if not len(points):
                    raise ValueError("no points")
                return cls(
                    points,
                    read_array(stored, "center", "f", points.shape[1]),
                    read_array(stored, "spread", "f", points.shape[1]),
                    float(read_array(stored, "border", "f")),
                    edges,
                    {
                        name.removeprefix("error_"): read_array(stored, name, "f", len(edges) + 1)
                        for name in stored.files
                        if name.startswith("error_")
                    },
                )
        except Exception as error:  # corrupted bytes make NumPy raise nearly any exception
            raise CheckpointError(
                f"{path}: corrupted ({error}). Remove it to continue without a domain, or "
                "train again to create one."
            ) from error


def _mean(values: np.ndarray) -> float:
    """Return the mean of the finite values, 0 if there are none."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else 0.0
