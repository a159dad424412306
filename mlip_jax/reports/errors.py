"""Errors of predictions in pure NumPy: averages, the drift with molecule size, groups, outliers.

An error is predicted minus reference. Energies are in eV and forces in eV/Å where a function hands arrays on, and in
meV, meV/atom and meV/Å where it hands averages on; each name says which. Missing labels (NaN) are left out, and an
average over nothing is NaN, which `json_safe` turns into None.
"""

import dataclasses
import math

import numpy as np
from ase.data import chemical_symbols

from mlip_jax.datasets.statistics import element_counts
from mlip_jax.reports.predictions import Predictions

# An atom whose force is this far off, in eV/Å, is more often a broken geometry or label than a model error.
OUTLIER_THRESHOLD = 8.0


def energy_errors(predictions: Predictions) -> np.ndarray:
    """(S,) errors of the total energies in eV, NaN where the label or the prediction is missing."""
    return _difference(predictions.energy_predicted, predictions.energy)


def force_errors(predictions: Predictions) -> np.ndarray:
    """(A, 3) errors of the forces in eV/Å, NaN where the label or the prediction is missing."""
    return _difference(predictions.forces_predicted, predictions.forces)


def energy_errors_per_atom(predictions: Predictions) -> np.ndarray:
    """(S,) errors of the total energies divided by the number of atoms, in meV/atom."""
    return 1e3 * energy_errors(predictions) / predictions.sizes


def mae(errors: np.ndarray) -> float:
    """Mean absolute value of the finite entries, NaN if there are none."""
    finite = errors[np.isfinite(errors)]
    return float(np.mean(np.abs(finite))) if finite.size else math.nan


def rmse(errors: np.ndarray) -> float:
    """Root of the mean square of the finite entries, NaN if there are none."""
    finite = errors[np.isfinite(errors)]
    return float(np.sqrt(np.mean(finite**2))) if finite.size else math.nan


def summary(predictions: Predictions) -> dict[str, float | int | None]:
    """The errors of one split as JSON-safe numbers; None where the split has no labels to tell from.

    `num_nonfinite_predictions` counts the energies and force components that have a label but a prediction of NaN or
    infinity. They cannot enter an average, so the averages flatter the model wherever this is not zero.
    """
    energy, per_atom, force = energy_errors(predictions), energy_errors_per_atom(predictions), force_errors(predictions)
    slope = energy_slope(predictions)
    return json_safe(
        {
            "energy_mae_mev_per_atom": mae(per_atom),
            "energy_rmse_mev_per_atom": rmse(per_atom),
            "energy_mae_ev": mae(energy),
            "energy_rmse_ev": rmse(energy),
            "force_mae_mev_per_ang": 1e3 * mae(force),
            "force_rmse_mev_per_ang": 1e3 * rmse(force),
            "energy_slope_mev_per_atom": slope.slope,
            "energy_slope_stderr_mev_per_atom": slope.stderr,
            "num_structures": predictions.num_structures,
            "num_atoms": predictions.num_atoms,
            "num_molecules": int(np.unique(predictions.molecule).size),
            "num_force_outliers": len(force_outliers(predictions)),
            "num_nonfinite_predictions": _lost(predictions.energy, energy) + _lost(predictions.forces, force),
        }
    )


@dataclasses.dataclass(frozen=True)
class SlopeFit:
    """A line through total-energy errors (meV) against the number of atoms, written around the mean size.

    `covariance` (2, 2) belongs to (value at the mean size in meV, slope in meV/atom) and is clustered by molecule.
    """

    mean_size: float
    value: float
    slope: float
    covariance: np.ndarray

    @property
    def stderr(self) -> float:
        """Standard error of the slope in meV/atom, clustered by molecule; NaN if it cannot be told."""
        return float(np.sqrt(self.covariance[1, 1]))

    def line(self, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fitted error and its standard error, both in meV and of the shape of `sizes`."""
        x = np.stack([np.ones_like(sizes, dtype=float), sizes - self.mean_size], axis=-1)
        variance = np.einsum("...i,ij,...j->...", x, self.covariance, x)
        return x @ np.array([self.value, self.slope]), np.sqrt(np.maximum(variance, 0))


def energy_slope(predictions: Predictions) -> SlopeFit:
    """Least-squares line, with intercept, of the total-energy error against the number of atoms.

    The standard error is clustered by molecule (sandwich estimator with the usual small-sample factor): conformations
    of one molecule share most of their error, so they are not independent, and counting them as if they were would
    make the slope look far more certain than it is.

    NaN for the slope if fewer than two sizes have labels; NaN for its standard error below three molecules, as a line
    goes through any two of them.
    """
    errors = 1e3 * energy_errors(predictions)
    known = np.isfinite(errors)
    y, sizes = errors[known], predictions.sizes[known].astype(float)
    undefined = np.full((2, 2), np.nan)
    if sizes.size == 0 or np.ptp(sizes) == 0:
        return SlopeFit(math.nan, math.nan, math.nan, undefined)
    center = float(sizes.mean())
    x = np.stack([np.ones_like(sizes), sizes - center], axis=1)
    inverse = np.linalg.inv(x.T @ x)
    value, slope = inverse @ (x.T @ y)
    names, cluster = np.unique(predictions.molecule[known], return_inverse=True)
    if names.size < 3:
        return SlopeFit(center, float(value), float(slope), undefined)
    weighted = x * (y - x @ np.array([value, slope]))[:, None]
    scores = np.stack([np.bincount(cluster, weights=column) for column in weighted.T], axis=1)
    factor = names.size / (names.size - 1) * (y.size - 1) / (y.size - 2)
    return SlopeFit(center, float(value), float(slope), factor * inverse @ (scores.T @ scores) @ inverse)


def per_element_correction(predictions: Predictions, fitted_on: Predictions | None = None) -> dict:
    """What energies per element, fitted after training, would still gain.

    The energy errors of `fitted_on` (by default the predictions themselves, which is optimistic) are fitted by least
    squares with a sum of energies per element; taking them off corrects the energies and leaves the forces alone. A
    large gain means that the reference energies are off, not the model. Elements that `fitted_on` lacks get zero.

    Returns:
      JSON-safe: `mae_before_mev_per_atom`, `mae_after_mev_per_atom`, `num_structures_fitted`, and
      `correction_mev_per_atom`, the meV to add to the prediction for each atom of an element, by symbol.
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


def element_energies(predictions: Predictions, energies: np.ndarray, elements: np.ndarray) -> np.ndarray:
    """(E,) least-squares energies per element of energies (S,), smallest where the data leave a choice; NaN ignored."""
    known = np.isfinite(energies)
    if not known.any():
        return np.full(elements.size, np.nan)
    return np.linalg.lstsq(
        element_counts(predictions.numbers, predictions.sizes, elements)[known], energies[known], rcond=None)[0]


@dataclasses.dataclass(frozen=True)
class GroupErrors:
    """Errors of some of the structures of a split, or, for an element, of some of the atoms (no energies then)."""

    label: str
    num_structures: int
    num_atoms: int
    energy_mae_mev_per_atom: float
    energy_rmse_mev_per_atom: float
    force_mae_mev_per_ang: float
    force_rmse_mev_per_ang: float


def per_element(predictions: Predictions) -> list[GroupErrors]:
    """Force errors per element, by atomic number; `num_structures` counts those that hold the element."""
    elements, of_atom = np.unique(predictions.numbers, return_inverse=True)
    force_mae, force_rmse = _grouped(1e3 * force_errors(predictions), of_atom, elements.size)
    per_structure = element_counts(predictions.numbers, predictions.sizes, elements)
    counts = np.stack([(per_structure > 0).sum(axis=0), per_structure.sum(axis=0)], axis=1).astype(int).tolist()
    return [
        GroupErrors(chemical_symbols[z], *count, math.nan, math.nan, *force)
        for z, count, force in zip(elements, counts, zip(force_mae, force_rmse, strict=True), strict=True)
    ]


def per_subset(predictions: Predictions) -> list[GroupErrors]:
    """Energy and force errors per subset, the largest first."""
    names, of_structure = np.unique(predictions.subset, return_inverse=True)
    groups = _per_group(predictions, of_structure, [str(name) for name in names])
    return sorted(groups, key=lambda group: -group.num_structures)


def per_size(predictions: Predictions, max_bins: int = 10) -> list[GroupErrors]:
    """Energy and force errors per bin of the number of atoms, from small to large; empty bins are left out."""
    if predictions.num_structures == 0:
        return []
    first, last = int(predictions.sizes.min()), int(predictions.sizes.max())
    widths = (step * 10**power for power in range(20) for step in (1, 2, 5))
    width = next(width for width in widths if (last - 1) // width - (first - 1) // width < max_bins)
    bins, of_structure = np.unique((predictions.sizes - 1) // width, return_inverse=True)
    labels = [f"{b * width + 1}–{(b + 1) * width}" if width > 1 else f"{b + 1}" for b in bins]
    return _per_group(predictions, of_structure, labels)


@dataclasses.dataclass(frozen=True)
class ForceOutlier:
    """One atom with a force error above the threshold: norms in eV/Å, `atom` counted within its structure."""

    molecule: str
    conformer: int
    atom: int
    element: str
    residual: float
    reference_norm: float


def force_outliers(predictions: Predictions, threshold: float = OUTLIER_THRESHOLD) -> list[ForceOutlier]:
    """Atoms whose force error vector is longer than `threshold` (eV/Å), the longest first."""
    residual = np.linalg.norm(force_errors(predictions), axis=1)
    reference = np.linalg.norm(predictions.forces, axis=1)
    atoms = np.flatnonzero(residual > threshold)
    structures = predictions.structure_of_atom[atoms]
    found = [
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
    return sorted(found, key=lambda outlier: (-outlier.residual, outlier.molecule, outlier.conformer, outlier.atom))


@dataclasses.dataclass(frozen=True)
class MoleculeErrors:
    """Energy errors over the labelled conformations of one molecule; `num_atoms` is that of the largest."""

    molecule: str
    num_conformers: int
    num_atoms: int
    energy_mae_mev_per_atom: float
    energy_mean_error_mev_per_atom: float
    energy_mae_ev: float


def worst_molecules(predictions: Predictions, count: int = 15) -> list[MoleculeErrors]:
    """The molecules with the largest mean absolute energy error per atom, the worst first."""
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
    columns = (column[worst].tolist() for column in (names, conformers, largest, absolute, signed, total))
    return [MoleculeErrors(*row) for row in zip(*columns, strict=True)]


def json_safe(value):
    """The same with NaN and infinite numbers as None, for dictionaries, lists and dataclasses of plain numbers."""
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
    known = np.isfinite(predicted) & np.isfinite(reference)
    return np.subtract(predicted, reference, out=np.full(reference.shape, np.nan), where=known)


def _lost(reference: np.ndarray, errors: np.ndarray) -> int:
    return int(np.sum(np.isfinite(reference) & ~np.isfinite(errors)))


def _grouped(errors: np.ndarray, group: np.ndarray, num_groups: int) -> tuple[list[float], list[float]]:
    """MAE and RMSE per group of errors (N,) or (N, 3), in one pass however many groups there are."""
    errors = errors[:, None] if errors.ndim == 1 else errors
    known = np.isfinite(errors)
    clean = np.where(known, errors, 0.0)

    def total(values):
        return np.bincount(group, weights=values.sum(axis=1), minlength=num_groups)

    with np.errstate(invalid="ignore"):
        count = total(known)
        return (total(np.abs(clean)) / count).tolist(), np.sqrt(total(clean**2) / count).tolist()


def _per_group(predictions: Predictions, of_structure: np.ndarray, labels: list[str]) -> list[GroupErrors]:
    structures = np.bincount(of_structure, minlength=len(labels)).tolist()
    atoms = np.bincount(of_structure, weights=predictions.sizes, minlength=len(labels)).astype(int).tolist()
    energy = _grouped(energy_errors_per_atom(predictions), of_structure, len(labels))
    force = _grouped(1e3 * force_errors(predictions), of_structure[predictions.structure_of_atom], len(labels))
    return [GroupErrors(*row) for row in zip(labels, structures, atoms, *energy, *force, strict=True)]
