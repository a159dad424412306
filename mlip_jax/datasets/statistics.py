"""Statistics of the training set that a force field carries: reference energies, scales, neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from mlip_jax.datasets.columns import Columns

NUM_ELEMENTS = len(chemical_symbols)


def element_counts(numbers: np.ndarray, n_atoms: np.ndarray, elements: np.ndarray | None = None) -> np.ndarray:
    """Count the atoms of each element in each structure.

    Args:
      numbers: Atomic numbers of all structures, one after the other, (A,).
      n_atoms: Atoms of each structure, (S,).
      elements: Atomic numbers to count, (E,), sorted; they must cover `numbers`. By default 0 to 118.

    Returns:
      Numbers of atoms, (S, E), float64.
    """
    num = NUM_ELEMENTS if elements is None else len(elements)
    place = numbers if elements is None else np.searchsorted(elements, numbers)
    flat = np.bincount(np.repeat(np.arange(len(n_atoms)), n_atoms) * num + place, minlength=len(n_atoms) * num)
    return flat.reshape(len(n_atoms), num).astype(np.float64)


def sum_reference(reference: np.ndarray, columns: Columns) -> np.ndarray:
    """Sum of a value per element (119,), as a reference energy, over the atoms of each structure, (S,), float64."""
    return element_counts(columns.numbers, columns.n_atoms) @ reference


class ElementFit:
    """Per-element least squares of energies on element counts, in any number of blocks and little memory.

    Keeps the triangular factor of all blocks so far (a tall-skinny QR), which loses no digits to normal equations.
    """

    def __init__(self):
        self._factor = np.zeros((0, NUM_ELEMENTS + 1))
        self.present = np.zeros(NUM_ELEMENTS, bool)

    def add(self, columns: Columns, energy: np.ndarray) -> None:
        """Structures with their energies (S,) in eV; those with NaN are left out."""
        known = np.isfinite(energy)
        if not known.any():
            return
        counts = element_counts(columns.numbers, columns.n_atoms)[known]
        self.present |= counts.any(0)
        used = np.append(self.present, True)
        rows = np.concatenate([self._factor[:, used], np.column_stack([counts, energy[known]])[:, used]])
        reduced = np.linalg.qr(rows, mode="r")
        self._factor = np.zeros((len(reduced), NUM_ELEMENTS + 1))
        self._factor[:, used] = reduced

    def solve(self) -> np.ndarray:
        """Energies of the elements, (119,) eV; zero for those that did not occur.

        Where compositions do not tell elements apart the solution of smallest norm is taken.

        Raises:
          ValueError: No energy was known.
        """
        if not self.present.any():
            raise ValueError("no energy is known in the training set; reference energies cannot be fitted. Use "
                             "reference_energies = 'none' to train on forces alone")
        solution, *_ = np.linalg.lstsq(self._factor[:, :-1][:, self.present], self._factor[:, -1], rcond=1e-12)
        reference = np.zeros(NUM_ELEMENTS)
        reference[self.present] = solution
        return reference


class Summary:
    """What a force field is told of its training set, gathered block by block.

    Attributes:
      atoms: Atoms of each element, (119,) int64. charges: Total charges that occur. fit: Of the total energies.
    """

    def __init__(self, blocks: Iterable[Columns] = ()):
        self.atoms = np.zeros(NUM_ELEMENTS, np.int64)
        self.charges: set[float] = set()
        self.fit = ElementFit()
        self._squares, self._components = 0.0, 0
        for columns in blocks:
            self.add(columns)

    def add(self, columns: Columns) -> None:
        """Count a block in."""
        self.atoms += np.bincount(columns.numbers, minlength=NUM_ELEMENTS)
        self.charges.update(np.unique(columns.charge).tolist())
        self.fit.add(columns, columns.energy)
        known = np.isfinite(columns.forces)
        self._squares += float((columns.forces[known] ** 2).sum())
        self._components += int(known.sum())

    @property
    def elements(self) -> np.ndarray:
        """Atomic numbers that occur."""
        return np.flatnonzero(self.atoms)

    @property
    def force_rms(self) -> float:
        """Root mean square of the force components in eV/Å; NaN without forces."""
        return float(np.sqrt(self._squares / self._components)) if self._components else float("nan")


def reference_energies(summary: Summary, method: str | Mapping[str, float], *,
                       isolated_atoms: np.ndarray | None = None) -> np.ndarray:
    """Reference energy of every element in eV, shape (119,), float64; elements that do not occur have zero.

    Args:
      summary: Of the training set.
      method: "least_squares": per-element least squares of the total energies. "isolated_atoms": energies of
        free atoms as the data set has them. "none": zeros. Or a mapping from symbols to eV.
      isolated_atoms: What the data set gives, shape (119,), NaN where unknown.

    Raises:
      ValueError: Unknown method, no energies to fit, or an element of the training set without a value.
    """
    present = summary.elements
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
    return summary.fit.solve()


def isolated_from_formation(blocks: Iterable[tuple[Columns, np.ndarray]]) -> np.ndarray | None:
    """Energies of isolated atoms (119,) from blocks and their formation energies (S,); None if those are unknown.

    Elements that stand in no structure with both energies are NaN.
    """
    fit = ElementFit()
    for columns, formation in blocks:
        fit.add(columns, columns.energy - formation)
    return np.where(fit.present, fit.solve(), np.nan) if fit.present.any() else None


def _complete(values, present, what):
    missing = [chemical_symbols[z] for z in present if not np.isfinite(values[z])]
    if missing:
        raise ValueError(f"{what} lack {', '.join(missing)}, which the training set has")
    return np.where(np.isfinite(values), values, 0.0)
