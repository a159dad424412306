"""Statistics of the training set that a force field carries: reference energies, scales, neighbours."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from mlip_jax.datasets.columns import Columns

NUM_ELEMENTS = len(chemical_symbols)


def element_counts(columns: Columns) -> np.ndarray:
    """Atoms of each element in each structure, shape (S, 119)."""
    structure = np.repeat(np.arange(len(columns)), columns.n_atoms)
    flat = np.bincount(structure * NUM_ELEMENTS + columns.numbers, minlength=len(columns) * NUM_ELEMENTS)
    return flat.reshape(len(columns), NUM_ELEMENTS).astype(np.float64)


def sum_reference(reference: np.ndarray, columns: Columns) -> np.ndarray:
    """Sum of the reference energies of the atoms of each structure, shape (S,), eV, float64."""
    return element_counts(columns) @ reference


def reference_energies(columns: Columns, method: str | Mapping[str, float], *,
                       isolated_atoms: np.ndarray | None = None) -> np.ndarray:
    """Reference energy of every element in eV, shape (119,), float64; elements that do not occur have zero.

    Args:
      columns: The training set.
      method: "least_squares": per-element least squares of the total energies. "isolated_atoms": energies of
        free atoms as the data set has them. "none": zeros. Or a mapping from symbols to eV.
      isolated_atoms: What the data set gives, shape (119,), NaN where unknown.

    Raises:
      ValueError: Unknown method, no energies to fit, or an element of the training set without a value.
    """
    present = np.unique(columns.numbers)
    if isinstance(method, Mapping):
        given = np.full(NUM_ELEMENTS, np.nan)
        for symbol, energy in method.items():
            if symbol not in atomic_numbers:
                raise ValueError(f"reference energies: {symbol!r} is not the symbol of an element")
            given[atomic_numbers[symbol]] = float(energy)
        return _complete(given, present, "the given reference energies")
    if method == "none":
        return np.zeros(NUM_ELEMENTS)
    if method == "isolated_atoms":
        if isolated_atoms is None:
            raise ValueError("the data set has no energies of isolated atoms; use reference_energies = "
                             "'least_squares' or give them by element")
        return _complete(isolated_atoms, present, "the data set's isolated atoms")
    if method != "least_squares":
        raise ValueError("reference_energies must be 'least_squares', 'isolated_atoms', 'none' or a mapping from "
                         f"symbols to eV; received {method!r}")
    return fit_elements(columns, columns.energy)


def fit_elements(columns: Columns, energy: np.ndarray) -> np.ndarray:
    """Per-element least squares of `energy` (S,) on the element counts, float64, shape (119,).

    Where compositions do not tell elements apart the solution of smallest norm is taken. NaN energies are left out.
    """
    known = np.isfinite(energy)
    if not known.any():
        raise ValueError("no energy is known in the training set; reference energies cannot be fitted. Use "
                         "reference_energies = 'none' to train on forces alone")
    present = np.unique(columns.numbers)
    solution, *_ = np.linalg.lstsq(element_counts(columns)[known][:, present], energy[known], rcond=None)
    reference = np.zeros(NUM_ELEMENTS)
    reference[present] = solution
    return reference


def isolated_from_formation(columns: Columns, formation: np.ndarray) -> np.ndarray | None:
    """Energies of isolated atoms from total and formation energies, shape (119,); None if those are unknown.

    Elements that stand in no structure with both energies are NaN.
    """
    known = np.isfinite(formation) & np.isfinite(columns.energy)
    if not known.any():
        return None
    fitted = fit_elements(columns, np.where(known, columns.energy - formation, np.nan))
    return np.where(element_counts(columns)[known].any(0), fitted, np.nan)


def force_rms(columns: Columns) -> float:
    """Root mean square of the force components in eV/Å; NaN without forces."""
    return float(np.sqrt(np.nanmean(columns.forces ** 2))) if np.isfinite(columns.forces).any() else float("nan")


def _complete(values, present, what):
    missing = [chemical_symbols[z] for z in present if not np.isfinite(values[z])]
    if missing:
        raise ValueError(f"{what} lack {', '.join(missing)}, which the training set has")
    return np.where(np.isfinite(values), values, 0.0)
