"""Errors of the runs of a study: means over seeds, gains, and significance of differences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlip_jax.foreign_files.texts import parse_json, read_bytes

PROPERTY = "gap"
VALID = "valid"  # key of the validation split among the geometries of tests


class Spread(NamedTuple):
    """Mean and spread over seeds.

    Attributes:
      mean: Mean of the values.
      std: Sample standard deviation, NaN for a single seed.
      count: Number of seeds.
      values: {seed: value}.
    """

    mean: float
    std: float
    count: int
    values: dict[str, float] = {}

    def __str__(self) -> str:
        if not self.count:
            return "–"
        return f"{self.mean:.3f}" + (f" ± {self.std:.3f}" if self.count > 1 else "")


def read(folder: Path) -> dict[str, dict[str, Spread]]:
    """Read the MAE in eV of the completed seeds, by variant and source of the test geometries.

    The validation split has the key VALID.
    The names of variants do not contain the seed.
    """
    errors: dict[str, dict[str, dict[str, float]]] = {}  # variant, geometry, seed
    for path in sorted(folder.glob("*/metrics.json")):
        if not (path.parent / "done.json").exists():
            continue
        scores = parse_json(read_bytes(path)).get("scores") or {}
        before, _, seed = path.parent.name.rpartition("-")
        name = before if seed.isdigit() else path.parent.name
        for split, score in scores.items():
            mae = score.get(PROPERTY, {}).get("mae")
            if (split == VALID or split.startswith("test ")) and mae is not None:
                geometry = split.removeprefix("test ")
                errors.setdefault(name, {}).setdefault(geometry, {})[seed] = mae
    return {name: {g: spread(v) for g, v in by.items()} for name, by in errors.items()}


def spread(values: Mapping[str, float]) -> Spread:
    """Compute mean and spread of {seed: value}."""
    numbers = list(values.values())
    return Spread(
        statistics.fmean(numbers),
        statistics.stdev(numbers) if len(numbers) > 1 else float("nan"),
        len(numbers),
        dict(values),
    )


def gain(improved: Spread, baseline: Spread) -> tuple[float, float]:
    """Return the reduction of an MAE relative to a baseline in percent, and its standard error.

    Both are NaN if either has fewer than two seeds.
    """
    if min(improved.count, baseline.count) < 2:
        return float("nan"), float("nan")
    ratio = improved.mean / baseline.mean
    relative = [s.std / s.mean / np.sqrt(s.count) for s in (improved, baseline)]
    return 100 * (1 - ratio), 100 * ratio * float(np.hypot(*relative))


def verdict(name: str, better: Spread, worse: Spread, paired: bool = False) -> str:
    """Return a sentence that states whether `better` has a lower MAE than `worse`.

    A difference counts if it is larger than twice its standard error.

    Args:
      name: Claim to test.
      better: MAE that should be lower.
      worse: MAE that should be higher.
      paired: Whether to use the differences per seed, because both belong to the same predictors or
        one predictor was initialized from the other.
    """
    if not better.count or not worse.count:
        return f"{name}: not measured."
    seeds = sorted(better.values.keys() & worse.values.keys())
    if min(better.count, worse.count, len(seeds) if paired else 2) < 2:
        return f"{name}: undecided, single seed ({worse} compared with {better} eV)."
    if paired:
        differences = [worse.values[s] - better.values[s] for s in seeds]
        difference, error = (
            statistics.fmean(differences),
            statistics.stdev(differences) / np.sqrt(len(seeds)),
        )
    else:
        difference = worse.mean - better.mean
        error = float(np.hypot(*(s.std / np.sqrt(s.count) for s in (better, worse))))
    shown = (
        "holds"
        if difference > 2 * error
        else "does not hold"
        if difference < -2 * error
        else "undecided"
    )
    return (
        f"{name}: {shown} ({worse} compared with {better} eV; "
        f"difference {difference:+.3f} ± {error:.3f})."
    )
