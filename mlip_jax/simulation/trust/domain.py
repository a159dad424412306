"""How far a molecule, or an atom in it, lies from what a model was trained on, and what error to expect there.

The distance is that of the model's own features (PropertyModel.embed for molecules, the features themselves for atoms)
to the nearest ones of training, in units of their spread. What it means is learned on the validation part: what lies
farther away than nearly all of that is outside of the domain, and the expected error is that of validation as far away.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from mlip_jax.checkpoint import CheckpointError
from mlip_jax.workdir import atomic_open

FILE = "domain.npz"  # in the workdir of a predictor or a force field
_NEIGHBORS = 5
_BINS = 5
# Of the validation molecules those that lie farther away than the rest are taken for the border.
_BORDER = 0.99
_ROWS = 512  # molecules whose distances are computed at a time


@dataclasses.dataclass(frozen=True)
class Domain:
    """Where training molecules, or their atoms, lie.

    Attributes:
      points: (M, F) features of training molecules or atoms less `center` (F,), over `spread` (F,).
      border: Distance beyond which one is outside.
      edges, errors: Expected |error| of each property by name in bins of the distance: (B - 1,) inner edges, and (B,)
        that never fall.
    """

    points: np.ndarray
    center: np.ndarray
    spread: np.ndarray
    border: float
    edges: np.ndarray
    errors: dict[str, np.ndarray]

    @classmethod
    def fit(cls, train: np.ndarray, valid: np.ndarray, errors: dict[str, np.ndarray],
            offsets: np.ndarray | None = None) -> Domain:
        """Of features of training (M, F) and validation (V, F), and the latter's |error| (V,) by property.

        Args:
          offsets: (S + 1,) for atoms: those of validation structure s are offsets[s] to offsets[s + 1], and the border
            is such that nearly all structures have no atom outside.

        Raises:
          ValueError: There is no training or no validation.
        """
        if not len(train) or not len(valid):
            raise ValueError("a domain needs training and validation molecules")
        center, spread = train.mean(0), np.maximum(train.std(0), 1e-6 * max(float(np.abs(train).max()), 1e-12))
        made = cls(((train - center) / spread).astype(np.float32), center, spread, np.inf, np.zeros(0), {})
        distance = made.distance(valid)
        edges = np.unique(np.quantile(distance, np.linspace(0, 1, min(_BINS, len(valid)) + 1)[1:-1]))
        bins = np.digitize(distance, edges)
        expected = {name: np.maximum.accumulate([_mean(e[bins == b]) for b in range(len(edges) + 1)])
                    for name, e in errors.items()}
        farthest = distance if offsets is None else np.maximum.reduceat(distance, offsets[:-1])
        return dataclasses.replace(made, border=float(np.quantile(farthest, _BORDER)), edges=edges, errors=expected)

    def distance(self, features: np.ndarray) -> np.ndarray:
        """Mean distance to the nearest ones of training, (S,)."""
        # At 5,000 points of 64 to 128 features scipy's cKDTree takes 2 to 5 times the CPU time of these products.
        neighbors, own = min(_NEIGHBORS, len(self.points)), ((features - self.center) / self.spread).astype(np.float32)
        squares, found = (self.points ** 2).sum(1), np.zeros(len(own))
        for start in range(0, len(own), _ROWS):
            rows = own[start:start + _ROWS]
            d2 = np.maximum((rows ** 2).sum(1)[:, None] + squares - 2.0 * rows @ self.points.T, 0.0)
            found[start:start + _ROWS] = np.sqrt(np.partition(d2, neighbors - 1, axis=1)[:, :neighbors]).mean(1)
        return found

    def outside(self, distance: np.ndarray) -> np.ndarray:
        """Whether molecules at these distances (S,) are outside."""
        return distance > self.border

    def expected_error(self, name: str, distance: np.ndarray) -> np.ndarray:
        """|error| of validation molecules that lie as far away, (S,), in the unit of the property."""
        return self.errors[name][np.digitize(distance, self.edges)]

    def save(self, path: Path) -> None:
        """Write an npz file."""
        with atomic_open(path) as file:
            np.savez_compressed(file, points=self.points, center=self.center, spread=self.spread, border=self.border,
                                edges=self.edges, **{f"error_{name}": e for name, e in self.errors.items()})

    @classmethod
    def load(cls, path: Path) -> Domain:
        """What `save` wrote.

        Raises:
          CheckpointError: There is none, or it is damaged.
        """
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing; it is written at the end of a run of the tasks 'train' and "
                                  "'property'")
        try:
            with np.load(path, allow_pickle=False) as kept:
                errors = {k.removeprefix("error_"): kept[k] for k in kept.files if k.startswith("error_")}
                return cls(kept["points"], kept["center"], kept["spread"], float(kept["border"]), kept["edges"], errors)
        except Exception as error:  # NumPy's reading of damaged bytes raises nearly anything
            raise CheckpointError(f"{path}: is damaged ({error}). Remove it to go on without a domain, or train anew "
                                  "to have one.") from error


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else 0.0
