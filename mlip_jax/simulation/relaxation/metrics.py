"""Metrics of the relaxations of a force field, measured with a reference method (the oracle).

A force field relaxes the geometry s_0 of a molecule to s. E are energies of the oracle, and s_opt
is the minimum that the oracle itself reaches from s_0 (or a reference geometry of the data):

    energy minimization percentage   pct(s) = 100 (E(s_0) - E(s)) / (E(s_0) - E(s_opt))
    residual energy                  E_res(s) = E(s) - E(s_opt)
    divergence                       pct(s) < 0, or the oracle fails at s, or the relaxation
                                     diverged or failed
    mean percentage                  mean of pct over the molecules that did not diverge
    success rate                     fraction of molecules with E_res < 1 kcal/mol (chemical
                                     accuracy), including those below E(s_opt)
    divergence rate                  fraction of molecules that diverged
    force convergence rate           fraction of molecules with max_i |F_i(s)| < 0.05 eV/Å, where
                                     F are forces of the oracle

The metrics are those of Tsypin et al. (GOLF, ICLR 2024, arXiv:2311.06295), which Force2Geo (Fu et
al., arXiv:2507.00407, equations 10 to 14) is evaluated with. All rates are over the evaluable
molecules, for which the oracle has energies of s_0 and s_opt. A relaxation that diverged or failed
is neither a success nor converged, whatever the oracle says.

A rise of less than 1e-5 eV is not a divergence: energies are not more accurate after positions were
rounded to float32. The percentage is meaningless if E(s_0) - E(s_opt) is below `min_gap`, i.e.
close to zero or negative; it is NaN then and excluded from means of the percentage. Such a molecule
has diverged if E(s) - E(s_0) exceeds `min_gap`; all rates include it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from ase import units

KCAL_PER_MOL = units.kcal / units.mol  # eV
MEASURES = (
    "mean_percentage",
    "mean_percentage_of_all",
    "success_rate",
    "divergence_rate",
    "force_convergence_rate",
    "mean_residual",
    "median_residual",
)
_ROUNDING = 1e-5  # rise of an energy that rounding can explain, eV
_BLOCK = 4_000_000  # maximum number of bootstrap counts in memory


@dataclasses.dataclass(frozen=True)
class Limits:
    """Thresholds of success and convergence.

    Attributes:
      chemical_accuracy: Largest residual energy of a success (kcal/mol).
      fmax: Largest force on an atom of a converged geometry (eV/Å).
      min_gap: Smallest E(s_0) - E(s_opt) for which the percentage is defined (eV).
    """

    chemical_accuracy: float = 1.0
    fmax: float = 0.05
    min_gap: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """Energies and forces of the oracle for M relaxations.

    Attributes:
      energy_start: Energy of the start (eV), (M,); NaN if the oracle failed or was not run.
      energy_relaxed: Energy of the relaxed geometry (eV), (M,); NaN as above.
      energy_opt: Energy of the oracle's minimum (eV), (M,); NaN as above.
      fmax: Largest force on an atom at the relaxed geometry (eV/Å), (M,); NaN as above.
      failed: Whether the relaxation diverged or gave no geometry, (M,) bool.

    Raises:
      ValueError: If the shapes differ.
    """

    energy_start: np.ndarray
    energy_relaxed: np.ndarray
    energy_opt: np.ndarray
    fmax: np.ndarray
    failed: np.ndarray

    def __post_init__(self):
        shapes = {f.name: np.shape(getattr(self, f.name)) for f in dataclasses.fields(self)}
        if len(set(shapes.values())) > 1 or len(shapes["failed"]) != 1:
            raise ValueError(f"all fields must have the same shape (M,); received {shapes}")

    def __len__(self) -> int:
        return len(self.failed)


def evaluable(outcomes: Outcomes) -> np.ndarray:
    """Return whether the oracle has energies of the start and of its minimum, (M,) bool."""
    return np.isfinite(outcomes.energy_start) & np.isfinite(outcomes.energy_opt)


def percentage(outcomes: Outcomes, limits: Limits = Limits()) -> np.ndarray:
    """Return pct = 100 (E_start - E_relaxed) / (E_start - E_opt), (M,), not clipped.

    NaN if an energy is NaN or if E_start - E_opt is below `limits.min_gap`.

    >>> one, low = np.array([0.0]), np.array([-2.0])
    >>> percentage(Outcomes(one, 0.75 * low, low, one, np.array([False])))
    array([75.])
    """
    gap = outcomes.energy_start - outcomes.energy_opt
    is_defined = gap >= limits.min_gap
    return np.where(
        is_defined,
        100 * (outcomes.energy_start - outcomes.energy_relaxed) / np.where(is_defined, gap, 1.0),
        np.nan,
    )


def residual_energy(outcomes: Outcomes) -> np.ndarray:
    """Return E_res = E_relaxed - E_opt in kcal/mol, (M,); NaN if an energy is NaN."""
    return (outcomes.energy_relaxed - outcomes.energy_opt) / KCAL_PER_MOL


def diverged(outcomes: Outcomes, limits: Limits = Limits()) -> np.ndarray:
    """Return whether an evaluable molecule diverged, (M,) bool.

    It diverged if the energy rose (pct < 0), the oracle has no energy, or the relaxation diverged
    or failed.
    """
    no_gap = outcomes.energy_start - outcomes.energy_opt < limits.min_gap
    rise = outcomes.energy_relaxed - outcomes.energy_start
    risen = rise > np.where(no_gap, limits.min_gap, _ROUNDING)
    return evaluable(outcomes) & (outcomes.failed | ~np.isfinite(outcomes.energy_relaxed) | risen)


def succeeded(outcomes: Outcomes, limits: Limits = Limits()) -> np.ndarray:
    """Return whether E_relaxed - E_opt is negative or below 1 kcal/mol, (M,) bool.

    A start that fulfills this already makes success easy.
    """
    return (
        evaluable(outcomes)
        & ~outcomes.failed
        & (residual_energy(outcomes) < limits.chemical_accuracy)
    )


def force_converged(outcomes: Outcomes, limits: Limits = Limits()) -> np.ndarray:
    """Return whether the oracle's largest force after relaxation is below 0.05 eV/Å, (M,)."""
    return evaluable(outcomes) & ~outcomes.failed & (outcomes.fmax < limits.fmax)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Mean over molecules with its uncertainty; NaN if there is nothing to average.

    Attributes:
      value: The mean.
      stderr: Bootstrap standard error.
      low: Lower end of the bootstrap 95 % interval.
      high: Upper end of the bootstrap 95 % interval.
      count: Number of molecules in the mean.
    """

    value: float
    stderr: float
    low: float
    high: float
    count: int


def summarize(
    outcomes: Outcomes, limits: Limits = Limits(), *, num_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Compute every metric of MEASURES, with bootstrap errors over molecules.

    Mean percentages are over the molecules that did not diverge and ("of_all") over all molecules
    for which the oracle has an energy, including diverged ones. Rates (in %) are over all evaluable
    molecules. Residuals (kcal/mol) are over the molecules that did not diverge.

    Args:
      outcomes: Results of the oracle.
      limits: Thresholds.
      num_bootstrap: Number of resamplings of the molecules with replacement.
      seed: Seed of the resamplings. Outcomes of the same molecules are resampled identically.
    """
    can, bad = evaluable(outcomes), diverged(outcomes, limits)
    pct, residual = percentage(outcomes, limits), residual_energy(outcomes)
    measures = {
        "mean_percentage": (pct, can & ~bad & np.isfinite(pct)),
        "mean_percentage_of_all": (pct, can & np.isfinite(pct)),
        "success_rate": (100.0 * succeeded(outcomes, limits), can),
        "divergence_rate": (100.0 * bad, can),
        "force_convergence_rate": (100.0 * force_converged(outcomes, limits), can),
        "mean_residual": (residual, can & ~bad),
    }
    estimates = bootstrap_means(measures, num_bootstrap, seed)
    return estimates | {
        "median_residual": bootstrap_median(residual[can & ~bad], num_bootstrap, seed)
    }


def bootstrap_means(
    measures: dict[str, tuple[np.ndarray, np.ndarray]], num_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Compute means of values (M,) over the molecules of a mask (M,).

    All metrics are resampled with the same draws of the M molecules.

    Args:
      measures: Values and mask of each metric by name.
      num_bootstrap: Number of resamplings.
      seed: Seed of the resamplings.

    Raises:
      ValueError: If num_bootstrap is below 2.
    """
    if num_bootstrap < 2:
        raise ValueError(f"num_bootstrap must be at least 2, received {num_bootstrap}")
    masks = np.array([mask for _, mask in measures.values()], float)
    values = np.array([np.where(mask, value, 0.0) for value, mask in measures.values()], float)
    size = values.shape[1]
    rng, means = np.random.default_rng(seed), []
    for start in range(0, num_bootstrap if size else 0, step := max(1, _BLOCK // max(size, 1))):
        draws = rng.multinomial(
            size, np.full(size, 1 / size), min(step, num_bootstrap - start)
        ).astype(float)
        with np.errstate(invalid="ignore"):
            means.append(draws @ values.T / (draws @ masks.T))
    means = np.concatenate(means) if means else np.full((1, len(measures)), np.nan)
    return {
        name: _estimate(value[mask], value[mask].mean() if mask.any() else np.nan, means[:, n])
        for n, (name, (value, mask)) in enumerate(measures.items())
    }


def bootstrap_median(values: np.ndarray, num_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """Compute the median of values (K,), with the same fields as a mean."""
    rng = np.random.default_rng(seed)
    if not len(values):
        return _estimate(values, np.nan, np.full(1, np.nan))
    medians = np.array(
        [
            np.median(values[rng.integers(len(values), size=len(values))])
            for _ in range(num_bootstrap)
        ]
    )
    return _estimate(values, np.median(values), medians)


def _estimate(values, value, resampled) -> Estimate:
    """Return `value` with the errors of its resampled values, for `values` that enter it."""
    # a draw without a molecule of the mask has no mean
    resampled = resampled[np.isfinite(resampled)]
    if not len(values) or len(resampled) < 2:
        return Estimate(float(value), np.nan, np.nan, np.nan, len(values))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(
        float(value), float(resampled.std(ddof=1)), float(low), float(high), len(values)
    )
