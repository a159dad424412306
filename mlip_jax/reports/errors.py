"""Errors of predictions in NumPy: averages, drift with molecule size, groups and outliers.

An error is predicted minus reference. Arrays of energies are in eV and arrays of forces in eV/Å.
Averages are in meV, meV/atom and meV/Å, as their names indicate. Missing labels (NaN) are ignored.
An average without values is NaN, which `json_safe` converts to None.

S is the number of structures and A the number of atoms of a split.
"""

import dataclasses
import math

import numpy as np
from ase.data import chemical_symbols
from ase.units import GPa

from mlip_jax.datasets.identity import readable_name
from mlip_jax.datasets.statistics import element_counts
from mlip_jax.reports.predictions import Predictions

# A force error above this threshold (eV/Å) more often indicates an invalid geometry or label than
# an error of the model.
OUTLIER_THRESHOLD = 8.0


def energy_errors(predictions: Predictions) -> np.ndarray:
    """Return errors of the total energies in eV, (S,); NaN if label or prediction is not finite."""
    return _difference(predictions.energy_predicted, predictions.energy)


def force_errors(predictions: Predictions) -> np.ndarray:
    """Return errors of the forces in eV/Å, (A, 3); NaN if label or prediction is not finite."""
    return _difference(predictions.forces_predicted, predictions.forces)


def stress_errors(predictions: Predictions) -> np.ndarray:
    """Return errors of the stress in GPa, (S, 3, 3); NaN without label or prediction."""
    p = predictions
    if p.stress is None or p.stress_predicted is None:
        return np.full((p.num_structures, 3, 3), np.nan)
    return _difference(p.stress_predicted, p.stress) / GPa


def energy_errors_per_atom(predictions: Predictions) -> np.ndarray:
    """Return errors of the total energies divided by the number of atoms in meV/atom, (S,)."""
    return 1e3 * energy_errors(predictions) / predictions.sizes


def mae(errors: np.ndarray) -> float:
    """Return the mean absolute value of the finite entries, NaN if there are none."""
    finite = errors[np.isfinite(errors)]
    return float(np.mean(np.abs(finite))) if finite.size else math.nan


def rmse(errors: np.ndarray) -> float:
    """Return the root mean square of the finite entries, NaN if there are none."""
    finite = errors[np.isfinite(errors)]
    return float(np.sqrt(np.mean(finite**2))) if finite.size else math.nan


def summary(predictions: Predictions) -> dict[str, float | int | None]:
    """Return the errors of one split as JSON-safe numbers; None if there are no labels for them.

    `num_nonfinite_predictions` counts the energies and force components with a label whose
    prediction is NaN or infinite. They are excluded from the averages, so the averages are too
    optimistic if this number is not zero.
    """
    energy, per_atom, force = (
        energy_errors(predictions),
        energy_errors_per_atom(predictions),
        force_errors(predictions),
    )
    slope = energy_slope(predictions)
    stress = stress_errors(predictions)
    known_stress = np.isfinite(stress).any()
    return json_safe(
        {
            "energy_mae_mev_per_atom": mae(per_atom),
            "energy_rmse_mev_per_atom": rmse(per_atom),
            "energy_mae_ev": mae(energy),
            "energy_rmse_ev": rmse(energy),
            "force_mae_mev_per_ang": 1e3 * mae(force),
            "force_rmse_mev_per_ang": 1e3 * rmse(force),
            **(
                {"stress_mae_gpa": mae(stress), "stress_rmse_gpa": rmse(stress)}
                if known_stress
                else {}
            ),
            "energy_slope_mev_per_atom": slope.slope,
            "energy_slope_stderr_mev_per_atom": slope.stderr,
            "num_structures": predictions.num_structures,
            "num_atoms": predictions.num_atoms,
            "num_molecules": int(np.unique(predictions.molecule).size),
            "num_force_outliers": len(force_outliers(predictions)),
            "num_nonfinite_predictions": _count_nonfinite(predictions.energy, energy)
            + _count_nonfinite(predictions.forces, force),
        }
    )


@dataclasses.dataclass(frozen=True)
class SlopeFit:
    """Line fitted to total-energy errors (meV) against the number of atoms, around the mean size.

    Attributes:
      mean_size: Mean number of atoms.
      value: Value of the line at the mean size in meV.
      slope: Slope in meV/atom.
      covariance: Covariance (2, 2) of (value, slope), clustered by molecule.
    """

    mean_size: float
    value: float
    slope: float
    covariance: np.ndarray

    @property
    def stderr(self) -> float:
        """Standard error of the slope in meV/atom, clustered by molecule; NaN if undefined."""
        return float(np.sqrt(self.covariance[1, 1]))

    def line(self, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return fitted errors and their standard errors in meV, both of the shape of `sizes`."""
        x = np.stack([np.ones_like(sizes, dtype=float), sizes - self.mean_size], axis=-1)
        variance = np.einsum("...i,ij,...j->...", x, self.covariance, x)
        return x @ np.array([self.value, self.slope]), np.sqrt(np.maximum(variance, 0))


def energy_slope(predictions: Predictions) -> SlopeFit:
    """Fit a least-squares line with intercept to total-energy errors against the number of atoms.

    The standard error is clustered by molecule (sandwich estimator with the usual small-sample
    factor). Conformations of one molecule share most of their error, so they are not independent.
    Treating them as independent would greatly underestimate the standard error.

    The slope is NaN if fewer than two sizes have labels. Its standard error is NaN for fewer than
    three molecules, because a line passes through any two points.
    """
    errors = 1e3 * energy_errors(predictions)
    known = np.isfinite(errors)
    y, sizes = errors[known], predictions.sizes[known].astype(float)
    undefined = np.full((2, 2), np.nan)
    if sizes.size == 0 or np.ptp(sizes) == 0:
        return SlopeFit(math.nan, math.nan, math.nan, undefined)
    center = float(sizes.mean())
    x = np.stack([np.ones_like(sizes), sizes - center], axis=1)  # (S, 2)
    inverse = np.linalg.inv(x.T @ x)
    value, slope = inverse @ (x.T @ y)
    names, cluster = np.unique(predictions.molecule[known], return_inverse=True)
    if names.size < 3:
        return SlopeFit(center, float(value), float(slope), undefined)
    # Sandwich estimator: sum the scores x * residual within each molecule, then over molecules.
    weighted = x * (y - x @ np.array([value, slope]))[:, None]  # (S, 2)
    scores = np.stack([np.bincount(cluster, weights=column) for column in weighted.T], axis=1)
    factor = names.size / (names.size - 1) * (y.size - 1) / (y.size - 2)
    return SlopeFit(
        center, float(value), float(slope), factor * inverse @ (scores.T @ scores) @ inverse
    )


def per_element_correction(predictions: Predictions, fitted_on: Predictions | None = None) -> dict:
    """Compute by how much per-element energies, fitted after training, would reduce the errors.

    The energy errors of `fitted_on` (by default the predictions themselves, which is optimistic)
    are fitted with a sum of energies per element by least squares. Subtracting this sum corrects
    the energies and does not change the forces. A large improvement indicates that the reference
    energies are wrong, not the model. The correction is zero for elements absent from `fitted_on`.

    Returns:
      JSON-safe dictionary with `mae_before_mev_per_atom`, `mae_after_mev_per_atom`,
      `num_structures_fitted`, and `correction_mev_per_atom`: the energy (meV) to add to a
      prediction per atom of an element, by symbol.
    """
    fitted_on = predictions if fitted_on is None else fitted_on
    elements = np.union1d(predictions.numbers, fitted_on.numbers)
    fitted = element_energies(fitted_on, energy_errors(fitted_on), elements)
    before = energy_errors(predictions)
    after = before - element_counts(predictions.numbers, predictions.sizes, elements) @ fitted
    return json_safe(
        {
            "mae_before_mev_per_atom": 1e3 * mae(before / predictions.sizes),
            "mae_after_mev_per_atom": 1e3 * mae(after / predictions.sizes),
            "num_structures_fitted": int(np.isfinite(energy_errors(fitted_on)).sum()),
            "correction_mev_per_atom": {
                chemical_symbols[z]: -1e3 * float(e) for z, e in zip(elements, fitted, strict=True)
            },
        }
    )


def element_energies(
    predictions: Predictions, energies: np.ndarray, elements: np.ndarray
) -> np.ndarray:
    """Fit energies (S,) with a sum of energies per element and return the latter, (E,).

    NaN energies are ignored. If the solution is not unique, it is the solution of minimum norm.
    """
    known = np.isfinite(energies)
    if not known.any():
        return np.full(elements.size, np.nan)
    return np.linalg.lstsq(
        element_counts(predictions.numbers, predictions.sizes, elements)[known],
        energies[known],
        rcond=None,
    )[0]


@dataclasses.dataclass(frozen=True)
class GroupErrors:
    """Errors of some structures of a split, or of all atoms of an element (without energies)."""

    label: str
    num_structures: int
    num_atoms: int
    energy_mae_mev_per_atom: float
    energy_rmse_mev_per_atom: float
    force_mae_mev_per_ang: float
    force_rmse_mev_per_ang: float


def per_element(predictions: Predictions) -> list[GroupErrors]:
    """Return force errors per element, in the order of atomic numbers.

    `num_structures` is the number of structures that contain the element.
    """
    elements, of_atom = np.unique(predictions.numbers, return_inverse=True)
    force_mae, force_rmse = _mae_and_rmse(1e3 * force_errors(predictions), of_atom, elements.size)
    per_structure = element_counts(predictions.numbers, predictions.sizes, elements)  # (S, E)
    counts = (
        np.stack([(per_structure > 0).sum(axis=0), per_structure.sum(axis=0)], axis=1)
        .astype(int)
        .tolist()
    )
    return [
        GroupErrors(chemical_symbols[z], *count, math.nan, math.nan, *force)
        for z, count, force in zip(
            elements, counts, zip(force_mae, force_rmse, strict=True), strict=True
        )
    ]


def per_subset(predictions: Predictions) -> list[GroupErrors]:
    """Return energy and force errors per subset, the largest subset first."""
    names, of_structure = np.unique(predictions.subset, return_inverse=True)
    groups = _per_group(predictions, of_structure, [str(name) for name in names])
    return sorted(groups, key=lambda group: -group.num_structures)


def per_size(predictions: Predictions, max_bins: int = 10) -> list[GroupErrors]:
    """Return energy and force errors per bin of the number of atoms, without empty bins."""
    if predictions.num_structures == 0:
        return []
    first, last = int(predictions.sizes.min()), int(predictions.sizes.max())
    # Choose the smallest of the round widths 1, 2, 5, 10, ... that needs at most max_bins bins.
    widths = (step * 10**power for power in range(20) for step in (1, 2, 5))
    width = next(width for width in widths if (last - 1) // width - (first - 1) // width < max_bins)
    bins, of_structure = np.unique((predictions.sizes - 1) // width, return_inverse=True)
    labels = [f"{b * width + 1}–{(b + 1) * width}" if width > 1 else f"{b + 1}" for b in bins]
    return _per_group(predictions, of_structure, labels)


@dataclasses.dataclass(frozen=True)
class ForceOutlier:
    """Atom with a force error above the threshold.

    Attributes:
      molecule: Name of the molecule.
      conformer: Index of the conformation within its molecule.
      atom: Index of the atom within its structure.
      element: Symbol of the element.
      residual: Norm of the force error in eV/Å.
      reference_norm: Norm of the reference force in eV/Å.
    """

    molecule: str
    conformer: int
    atom: int
    element: str
    residual: float
    reference_norm: float


def force_outliers(
    predictions: Predictions, threshold: float = OUTLIER_THRESHOLD
) -> list[ForceOutlier]:
    """Return atoms whose force error has a norm above `threshold` (eV/Å), the largest first."""
    residual = np.linalg.norm(force_errors(predictions), axis=1)
    reference = np.linalg.norm(predictions.forces, axis=1)
    atoms = np.flatnonzero(residual > threshold)
    structures = predictions.structure_of_atom[atoms]
    outliers = [
        ForceOutlier(
            molecule=str(predictions.molecule[s]),
            conformer=int(predictions.conformer[s]),
            atom=int(a - predictions.offsets[s]),
            element=chemical_symbols[predictions.numbers[a]],
            residual=float(residual[a]),
            reference_norm=float(reference[a]),
        )
        for a, s in zip(atoms, structures, strict=True)
    ]
    return sorted(
        outliers,
        key=lambda outlier: (-outlier.residual, outlier.molecule, outlier.conformer, outlier.atom),
    )


@dataclasses.dataclass(frozen=True)
class MoleculeErrors:
    """Energy errors of the labeled conformations of a molecule; num_atoms is the largest size."""

    molecule: str
    num_conformers: int
    num_atoms: int
    energy_mae_mev_per_atom: float
    energy_mean_error_mev_per_atom: float
    energy_mae_ev: float


def worst_molecules(predictions: Predictions, count: int = 15) -> list[MoleculeErrors]:
    """Return the `count` molecules with the largest mean absolute energy error per atom."""
    errors = energy_errors_per_atom(predictions)
    known = np.isfinite(errors)
    names, of_structure = np.unique(predictions.molecule[known], return_inverse=True)
    conformers = np.bincount(of_structure, minlength=names.size)
    sizes, errors = predictions.sizes[known], errors[known]

    def mean(values):
        return np.bincount(of_structure, weights=values, minlength=names.size) / conformers

    absolute, signed, total = mean(np.abs(errors)), mean(errors), mean(np.abs(errors) * sizes) / 1e3
    largest = np.zeros(names.size, dtype=int)
    np.maximum.at(largest, of_structure, sizes)
    worst = np.argsort(-absolute, kind="stable")[:count]
    columns = (
        column[worst].tolist() for column in (names, conformers, largest, absolute, signed, total)
    )
    return [
        MoleculeErrors(readable_name(str(name)), *row) for name, *row in zip(*columns, strict=True)
    ]


def json_safe(value):
    """Convert dataclasses, dictionaries and lists to JSON values; NaN and infinity become None."""
    if dataclasses.is_dataclass(value):
        return json_safe(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, np.generic):
        return json_safe(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _difference(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return predicted minus reference, NaN if either is not finite."""
    known = np.isfinite(predicted) & np.isfinite(reference)
    return np.subtract(predicted, reference, out=np.full(reference.shape, np.nan), where=known)


def _count_nonfinite(reference: np.ndarray, errors: np.ndarray) -> int:
    """Count labels whose error is not finite, because the prediction is not."""
    return int(np.sum(np.isfinite(reference) & ~np.isfinite(errors)))


def _mae_and_rmse(
    errors: np.ndarray, group: np.ndarray, num_groups: int
) -> tuple[list[float], list[float]]:
    """Compute MAE and RMSE per group of errors (N,) or (N, 3), in one pass over all groups."""
    errors = errors[:, None] if errors.ndim == 1 else errors
    known = np.isfinite(errors)
    clean = np.where(known, errors, 0.0)

    def total(values):
        return np.bincount(group, weights=values.sum(axis=1), minlength=num_groups)

    with np.errstate(invalid="ignore"):  # groups without known errors: 0 / 0 is NaN
        count = total(known)  # number of components, (groups,)
        return (total(np.abs(clean)) / count).tolist(), np.sqrt(total(clean**2) / count).tolist()


def _per_group(
    predictions: Predictions, of_structure: np.ndarray, labels: list[str]
) -> list[GroupErrors]:
    """Compute energy and force errors per group; `of_structure` (S,) is the index of the group."""
    structures = np.bincount(of_structure, minlength=len(labels)).tolist()
    atoms = (
        np.bincount(of_structure, weights=predictions.sizes, minlength=len(labels))
        .astype(int)
        .tolist()
    )
    energy = _mae_and_rmse(energy_errors_per_atom(predictions), of_structure, len(labels))
    force = _mae_and_rmse(
        1e3 * force_errors(predictions), of_structure[predictions.structure_of_atom], len(labels)
    )
    return [
        GroupErrors(*row) for row in zip(labels, structures, atoms, *energy, *force, strict=True)
    ]
