"""Prediction intervals of predictors, by split conformal prediction (Lei et al., 2018).

The half width of an interval is q * s: s is the difficulty of a molecule, and q the quantile of
|error| / s over the validation molecules. If new molecules are drawn like those of validation, the
interval contains the property with the requested probability. The difficulty is the mean |error| of
validation molecules at the same distance from the training molecules, or, for an ensemble whose
members were validated on the same molecules, with the same spread of the predictions.

The validation molecules also select the checkpoint, which makes intervals slightly too narrow. For
molecules unlike those of validation, such as other scaffolds, the coverage is not guaranteed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mlip_jax.checkpoint import CheckpointError
from mlip_jax.foreign_files.archives import open_npz, read_array
from mlip_jax.workdir import atomic_open

FILE = "intervals.npz"  # in the workdir of a predictor
COVERAGE = 0.9  # default probability that an interval contains the property
# _BINS: maximum number of bins of the difficulty; _PER_BIN: minimum number of molecules in each.
_BINS, _PER_BIN = 5, 75


@dataclasses.dataclass(frozen=True)
class ValidationErrors:
    """Labels and predictions of the V validation structures of a predictor.

    Attributes:
      molecule: Identities of the molecules, (V,) integers, see `identity.stable_ids`.
      distance: Distances from the training molecules, in units of the border of the domain, (V,).
      labels: Labels of the scalar properties, (V,) each; NaN if unknown.
      predicted: Predictions of these properties, (V,) each.
    """

    molecule: np.ndarray
    distance: np.ndarray
    labels: Mapping[str, np.ndarray]
    predicted: Mapping[str, np.ndarray]

    def save(self, path: Path) -> None:
        """Write the errors to an npz file."""
        with atomic_open(path) as file:
            np.savez_compressed(
                file,
                molecule=self.molecule,
                distance=self.distance,
                **{f"label_{name}": values for name, values in self.labels.items()},
                **{f"predicted_{name}": values for name, values in self.predicted.items()},
            )

    @classmethod
    def load(cls, path: Path) -> ValidationErrors:
        """Load errors that `save` wrote.

        Raises:
          CheckpointError: The file does not exist or is corrupted.
        """
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file. Runs of the task 'property' write it.")
        try:
            with open_npz(path) as stored:
                molecule = read_array(stored, "molecule", "iu", None)
                count = len(molecule)
                parts = {
                    kind: {
                        name.removeprefix(f"{kind}_"): read_array(stored, name, "f", count)
                        for name in stored.files
                        if name.startswith(f"{kind}_")
                    }
                    for kind in ("label", "predicted")
                }
                if parts["label"].keys() != parts["predicted"].keys():
                    raise ValueError("labels and predictions are of different properties")
                distance = read_array(stored, "distance", "f", count)
                return cls(molecule, distance, parts["label"], parts["predicted"])
        except Exception as error:  # corrupted bytes make NumPy raise nearly any exception
            raise CheckpointError(
                f"{path}: corrupted ({error}). Rerun the command of the training to write it again."
            ) from error


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Half widths of the prediction intervals of one property.

    Attributes:
      scores: |error| / difficulty of the validation molecules, ascending, (V,).
      edges: Inner edges of the bins of the distance or spread, (B - 1,).
      difficulty: Mean |error| in the bins, non-decreasing, (B,).
    """

    scores: np.ndarray
    edges: np.ndarray
    difficulty: np.ndarray

    @classmethod
    def fit(cls, measure: np.ndarray, absolute: np.ndarray) -> Intervals:
        """Fit intervals to validation molecules.

        The difficulty of each molecule is that of the other half of the molecules, so that it does
        not depend on its own error.

        Args:
          measure: Distance or spread, (V,).
          absolute: |error|, (V,); NaN if unknown.
        """
        known = np.isfinite(absolute) & np.isfinite(measure)
        measure, absolute = measure[known], absolute[known]
        edges = _edges(measure)
        # alternating in the order of the measure, so that both halves have the same distribution
        half = np.argsort(np.argsort(measure, kind="stable"), kind="stable") % 2
        scores = np.zeros(len(absolute))
        for part in (0, 1):
            chosen = half == part
            difficulty = _difficulty(measure[~chosen], absolute[~chosen], edges)
            scores[chosen] = absolute[chosen] / _look_up(measure[chosen], edges, difficulty)
        return cls(np.sort(scores), edges, _difficulty(measure, absolute, edges))

    def half_width(self, measure: np.ndarray, coverage: float = COVERAGE) -> np.ndarray:
        """Return half the width of the intervals at distances or spreads, (S,).

        It is infinite if there are too few validation molecules for this coverage.
        """
        rank = int(np.ceil((len(self.scores) + 1) * coverage))
        if rank > len(self.scores):
            return np.full(len(measure), np.inf)
        return self.scores[rank - 1] * _look_up(measure, self.edges, self.difficulty)


@dataclasses.dataclass(frozen=True)
class EnsembleIntervals:
    """Intervals of one or several predictors.

    Attributes:
      of_member: Intervals by property of each member, or of the ensemble as a whole.
      by_spread: Whether there is one entry, for the mean of the members, by their spread.
    """

    of_member: tuple[Mapping[str, Intervals], ...]
    by_spread: bool

    @classmethod
    def fit(cls, members: Sequence[ValidationErrors], names: Sequence[str]) -> EnsembleIntervals:
        """Fit the intervals of scalar properties.

        If the members were validated on different molecules, the half width is the mean of those of
        the members. It is then too wide, because a mean is more accurate than its members.
        """
        first = members[0]
        shared = len(members) > 1 and all(
            np.array_equal(m.molecule, first.molecule)
            and all(np.array_equal(m.labels[n], first.labels[n], equal_nan=True) for n in names)
            for m in members
        )
        if not shared:
            return cls(
                tuple(
                    {
                        n: Intervals.fit(m.distance, np.abs(m.predicted[n] - m.labels[n]))
                        for n in names
                    }
                    for m in members
                ),
                False,
            )
        fitted = {}
        for n in names:
            predicted = np.array([m.predicted[n] for m in members])  # (members, V)
            errors = np.abs(predicted.mean(0) - first.labels[n])
            fitted[n] = Intervals.fit(predicted.std(0, ddof=1), errors)
        return cls((fitted,), True)

    def half_width(
        self, name: str, distances: np.ndarray, spread: np.ndarray | None, coverage: float
    ) -> np.ndarray:
        """Return half the width of the intervals of a property, (S,).

        Args:
          name: Name of the property.
          distances: Distances in units of the border of the domain of each member, (members, S).
          spread: Standard deviation over the members, (S,); None for a single predictor.
          coverage: Requested probability.
        """
        if self.by_spread:
            return self.of_member[0][name].half_width(spread, coverage)
        widths = [m[name].half_width(d, coverage) for m, d in zip(self.of_member, distances)]
        return np.mean(widths, axis=0)


def _edges(measure: np.ndarray) -> np.ndarray:
    """Return the inner edges of bins with equal numbers of molecules."""
    num = int(np.clip(len(measure) // _PER_BIN, 1, _BINS))
    if not len(measure):
        return np.zeros(0)
    return np.unique(np.quantile(measure, np.linspace(0, 1, num + 1)[1:-1]))


def _difficulty(measure: np.ndarray, absolute: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the mean |error| in each bin, positive and non-decreasing, (B,)."""
    if not len(measure):
        return np.ones(len(edges) + 1)
    bins = np.digitize(measure, edges)
    means = [
        absolute[bins == b].mean() if (bins == b).any() else 0.0 for b in range(len(edges) + 1)
    ]
    smallest = max(float(absolute.mean()) * 1e-3, 1e-12)
    return np.maximum(np.maximum.accumulate(means), smallest)


def _look_up(measure: np.ndarray, edges: np.ndarray, difficulty: np.ndarray) -> np.ndarray:
    return difficulty[np.digitize(measure, edges)]
