"""How well a force field relaxes molecules, in the eyes of a reference method (the oracle).

A force field relaxes the geometry s_0 of a molecule to s. With the oracle's energies E, and s_opt the minimum that the
oracle itself reaches from s_0 (or a reference geometry of the data):

    energy minimisation percentage   pct(s) = 100 (E(s_0) - E(s)) / (E(s_0) - E(s_opt))
    residual energy                  E_res(s) = E(s) - E(s_opt)
    divergence                       pct(s) < 0, or the oracle fails at s, or the relaxation diverged or failed
    mean percentage                  mean of pct over the molecules that did not diverge
    success rate                     share of molecules with E_res < 1 kcal/mol (chemical accuracy), or below E(s_opt)
    divergence rate                  share of molecules that diverged
    force convergence rate           share of molecules with max_i |F_i(s)| < 0.05 eV/Å, F the oracle's forces

The measures of Tsypin et al. (GOLF, ICLR 2024, arXiv:2311.06295), as Force2Geo (Fu et al., arXiv:2507.00407, equations
10 to 14) is judged by them. All rates are of the molecules that can be judged: those at which the oracle has energies
of s_0 and s_opt. A relaxation that diverged or failed is neither a success nor converged, whatever the oracle says.

A rise of less than 1e-5 eV is no divergence: energies are not more exact after positions were rounded to float32. The
percentage says nothing where E(s_0) - E(s_opt) is about zero or negative, below `min_gap`: it is NaN there and left
out of means of it. Such a molecule has diverged if E(s) - E(s_0) exceeds `min_gap`; all rates count it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from ase import units

KCAL_PER_MOL = units.kcal / units.mol  # eV
MEASURES = ("mean_percentage", "mean_percentage_of_all", "success_rate", "divergence_rate", "force_convergence_rate",
            "mean_residual", "median_residual")
_ROUNDING = 1e-5  # eV
_BLOCK = 4_000_000  # counts of a resampling at a time


@dataclasses.dataclass(frozen=True)
class Limits:
    """Where success and convergence begin.

    Attributes:
      chemical_accuracy: Residual energy of a success, kcal/mol.
      fmax: Largest force on an atom of a converged geometry, eV/Å.
      min_gap: Smallest E(s_0) - E(s_opt) of which a percentage is told, eV.
    """

    chemical_accuracy: float = 1.0
    fmax: float = 0.05
    min_gap: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What became of M molecules; all energies and forces are the oracle's.

    Attributes:
      energy_start, energy_relaxed, energy_opt: (M,) eV; NaN where the oracle failed or was not asked.
      fmax: (M,) eV/Å, largest force on an atom at the relaxed geometry; NaN as above.
      failed: (M,) bool, the relaxation diverged, or gave no geometry.

    Raises:
      ValueError: The shapes differ.
    """

    energy_start: np.ndarray
    energy_relaxed: np.ndarray
    energy_opt: np.ndarray
    fmax: np.ndarray
    failed: np.ndarray

    def __post_init__(self):
        shapes = {f.name: np.shape(getattr(self, f.name)) for f in dataclasses.fields(self)}
        if len(set(shapes.values())) > 1 or len(shapes["failed"]) != 1:
            raise ValueError(f"all fields must have one shape (M,); received {shapes}")

    def __len__(self) -> int:
        return len(self.failed)


def judged(outcomes: Outcomes) -> np.ndarray:
    """Whether the oracle has energies of the start and of its minimum, (M,) bool."""
    return np.isfinite(outcomes.energy_start) & np.isfinite(outcomes.energy_opt)


def percentage(outcomes: Outcomes, limits: Limits = Limits()) -> np.ndarray:
    """pct = 100 (E_start - E_relaxed) / (E_start - E_opt), (M,), not clipped.

    NaN where an energy is, and where E_start - E_opt is below `limits.min_gap`.

    >>> one, low = np.array([0.0]), np.array([-2.0])
    >>> percentage(Outcomes(one, 0.75 * low, low, one, np.array([False])))
    array([75.])
    """
    gap = outcomes.energy_start - outcomes.energy_opt
    told = gap >= limits.min_gap
    return np.where(told, 100 * (outcomes.energy_start - outcomes.energy_relaxed) / np.where(told, gap, 1.0), np.nan)


def residual_energy(outcomes: Outcomes) -> np.ndarray:
    """E_res = E_relaxed - E_opt in kcal/mol, (M,); NaN where an energy is."""
    return (outcomes.energy_relaxed - outcomes.energy_opt) / KCAL_PER_MOL


def diverged(outcomes: Outcomes, limits: Limits = Limits()) -> np.ndarray:
    """Whether a molecule that can be judged diverged, (M,) bool: pct < 0, no energy, or the relaxation's own word."""
    no_gap = outcomes.energy_start - outcomes.energy_opt < limits.min_gap
    rise = outcomes.energy_relaxed - outcomes.energy_start
    risen = rise > np.where(no_gap, limits.min_gap, _ROUNDING)
    return judged(outcomes) & (outcomes.failed | ~np.isfinite(outcomes.energy_relaxed) | risen)


def succeeded(outcomes: Outcomes, limits: Limits = Limits()) -> np.ndarray:
    """Whether E_relaxed - E_opt < 1 kcal/mol, or negative, (M,) bool; a start that is so good makes it easy."""
    return judged(outcomes) & ~outcomes.failed & (residual_energy(outcomes) < limits.chemical_accuracy)


def force_converged(outcomes: Outcomes, limits: Limits = Limits()) -> np.ndarray:
    """Whether the oracle's largest force at the relaxed geometry is below 0.05 eV/Å, (M,) bool."""
    return judged(outcomes) & ~outcomes.failed & (outcomes.fmax < limits.fmax)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over molecules. stderr: bootstrap standard error; low, high: bootstrap 95 % interval; count: of the
    molecules that are averaged. NaN where nothing is averaged."""

    value: float
    stderr: float
    low: float
    high: float
    count: int


def summarize(outcomes: Outcomes, limits: Limits = Limits(), *, num_bootstrap: int = 1000,
              seed: int = 0) -> dict[str, Estimate]:
    """Every measure of MEASURES, with bootstrap errors over molecules.

    The percentages are averaged over molecules that did not diverge, and ("of_all") over all of which the oracle has an
    energy, diverged ones included; rates (in %) are of all that can be judged; residuals (kcal/mol) are of all that
    did not diverge.

    Args:
      num_bootstrap: Resamplings of the molecules with replacement.
      seed: Of the resamplings; outcomes of the same molecules are resampled alike.
    """
    can, bad = judged(outcomes), diverged(outcomes, limits)
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
    return estimates | {"median_residual": bootstrap_median(residual[can & ~bad], num_bootstrap, seed)}


def bootstrap_means(measures: dict[str, tuple[np.ndarray, np.ndarray]], num_bootstrap: int = 1000,
                    seed: int = 0) -> dict[str, Estimate]:
    """Means of values (M,) where a mask (M,) holds. All measures are resampled by the same draws of the M molecules.

    Raises:
      ValueError: num_bootstrap is below 2.
    """
    if num_bootstrap < 2:
        raise ValueError(f"num_bootstrap must be at least 2, received {num_bootstrap}")
    masks = np.array([mask for _, mask in measures.values()], float)
    values = np.array([np.where(mask, value, 0.0) for value, mask in measures.values()], float)
    size = values.shape[1]
    rng, means = np.random.default_rng(seed), []
    for start in range(0, num_bootstrap if size else 0, step := max(1, _BLOCK // max(size, 1))):
        draws = rng.multinomial(size, np.full(size, 1 / size), min(step, num_bootstrap - start)).astype(float)
        with np.errstate(invalid="ignore"):
            means.append(draws @ values.T / (draws @ masks.T))
    means = np.concatenate(means) if means else np.full((1, len(measures)), np.nan)
    return {name: _estimate(value[mask], value[mask].mean() if mask.any() else np.nan, means[:, n])
            for n, (name, (value, mask)) in enumerate(measures.items())}


def bootstrap_median(values: np.ndarray, num_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """The median of values (K,), with the same fields as a mean."""
    rng = np.random.default_rng(seed)
    if not len(values):
        return _estimate(values, np.nan, np.full(1, np.nan))
    medians = np.array([np.median(values[rng.integers(len(values), size=len(values))]) for _ in range(num_bootstrap)])
    return _estimate(values, np.median(values), medians)


def _estimate(values, value, resampled) -> Estimate:
    resampled = resampled[np.isfinite(resampled)]  # a draw without any molecule that counts has no mean
    if not len(values) or len(resampled) < 2:
        return Estimate(float(value), np.nan, np.nan, np.nan, len(values))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(float(value), float(resampled.std(ddof=1)), float(low), float(high), len(values))
