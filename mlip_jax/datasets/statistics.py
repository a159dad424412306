"""Statistics of the training set: element counts, reference energies and the RMS of the forces."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from mlip_jax.datasets.charges import has_odd_electrons
from mlip_jax.datasets.columns import Columns

log = logging.getLogger(__name__)

NUM_ELEMENTS = len(chemical_symbols)


def element_counts(
    numbers: np.ndarray, n_atoms: np.ndarray, elements: np.ndarray | None = None
) -> np.ndarray:
    """Count the atoms of each element in each structure.

    Args:
      numbers: Atomic numbers of all structures, concatenated, (A,).
      n_atoms: Number of atoms per structure, (S,).
      elements: Sorted atomic numbers to count, (E,). They must include all of `numbers`. The
        default is 0 to 118.

    Returns:
      Number of atoms of each element, (S, E) float64.
    """
    num = NUM_ELEMENTS if elements is None else len(elements)
    column = numbers if elements is None else np.searchsorted(elements, numbers)
    # Count (structure, element) pairs by a single index.
    flat = np.bincount(  # (S * E,)
        np.repeat(np.arange(len(n_atoms)), n_atoms) * num + column, minlength=len(n_atoms) * num
    )
    return flat.reshape(len(n_atoms), num).astype(np.float64)


def sum_reference(reference: np.ndarray, columns: Columns) -> np.ndarray:
    """Sum a value per element, (119,), over the atoms of each structure: (S,) float64."""
    return element_counts(columns.numbers, columns.n_atoms) @ reference


class ElementFit:
    """Streaming least-squares fit of energies to element counts, block by block in little memory.

    The state is the triangular factor of all blocks so far (tall-skinny QR). Normal equations would
    lose half of the digits.

    Attributes:
      present: Whether each element has occurred in a structure with a known energy, (119,) bool.
    """

    def __init__(self):
        self._factor = np.zeros((0, NUM_ELEMENTS + 1))
        self.present = np.zeros(NUM_ELEMENTS, bool)

    def add(self, columns: Columns, energy: np.ndarray) -> None:
        """Add structures with their energies (eV), (S,). Structures with NaN are ignored."""
        known = np.isfinite(energy)
        if not known.any():
            return
        counts = element_counts(columns.numbers, columns.n_atoms)[known]
        self.present |= counts.any(0)
        used = np.append(self.present, True)
        rows = np.concatenate(
            [self._factor[:, used], np.column_stack([counts, energy[known]])[:, used]]
        )
        reduced = np.linalg.qr(rows, mode="r")
        self._factor = np.zeros((len(reduced), NUM_ELEMENTS + 1))
        self._factor[:, used] = reduced

    def undetermined(self) -> np.ndarray:
        """Return the atomic numbers whose energies the compositions do not determine, ascending.

        With methane only, for instance, one hydrogen more and a quarter of a carbon less fit as
        well.
        """
        numbers = np.flatnonzero(self.present)
        counts = self._factor[:, :-1][:, self.present]
        if not len(numbers):
            return numbers
        # Elements with a component along a direction that changes no energy.
        _, values, directions = np.linalg.svd(counts / np.linalg.norm(counts, axis=0))
        rank = int((values > 1e-9 * values[0]).sum())
        free = np.abs(directions[rank:]).max(0, initial=0.0)
        return numbers[free > 1e-6]

    def solve(self) -> np.ndarray:
        """Return the energies of the elements (eV), (119,); zero for elements that did not occur.

        If the compositions do not determine the energies (`undetermined`), the solution of smallest
        norm is used, whose values have no physical meaning.

        Raises:
          ValueError: No energy was known.
        """
        if not self.present.any():
            raise ValueError(
                "the training set has no energies to fit reference energies to. Set "
                "reference_energies = 'none' to train on forces only."
            )
        solution, *_ = np.linalg.lstsq(
            self._factor[:, :-1][:, self.present], self._factor[:, -1], rcond=1e-12
        )
        reference = np.zeros(NUM_ELEMENTS)
        reference[self.present] = solution
        return reference


class Summary:
    """Summary of a training set, accumulated block by block.

    Attributes:
      atoms: Number of atoms of each element, (119,) int64.
      charges: Total charges that occur (e).
      periodic: Whether a structure has a cell.
      spins: Numbers of unpaired electrons that occur.
      odd_electrons: Whether a molecule has an odd number of electrons, but no unpaired ones in its
        labels.
      sizes: Smallest and largest number of atoms of the structures without a cell; None if there
        are none.
      fit: Least-squares fit of the total energies (eV) to the element counts.
    """

    def __init__(self, blocks: Iterable[Columns] = ()):
        self.atoms = np.zeros(NUM_ELEMENTS, np.int64)
        self.charges: set[float] = set()
        self.periodic = False
        self.spins: set[float] = set()
        self.odd_electrons = False
        self.sizes: tuple[int, int] | None = None
        self.fit = ElementFit()
        self._squares, self._components = 0.0, 0
        for columns in blocks:
            self.add(columns)

    def add(self, columns: Columns) -> None:
        """Add the structures of a block."""
        self.atoms += np.bincount(columns.numbers, minlength=NUM_ELEMENTS)
        self.periodic |= columns.cell is not None and bool(columns.cell.any())
        self.charges.update(np.unique(columns.charge).tolist())
        self.spins.update([0.0] if columns.spin is None else np.unique(columns.spin).tolist())
        self.odd_electrons |= bool(has_odd_electrons(columns).any())
        self.sizes = merge_sizes([self.sizes, _sizes(columns)])
        self.fit.add(columns, columns.energy)
        known = np.isfinite(columns.forces)
        self._squares += float((columns.forces[known] ** 2).sum())
        self._components += int(known.sum())

    @property
    def elements(self) -> np.ndarray:
        """Atomic numbers that occur, ascending."""
        return np.flatnonzero(self.atoms)

    @property
    def force_rms(self) -> float:
        """Root mean square of the force components (eV/Å); NaN without forces."""
        return (
            float(np.sqrt(self._squares / self._components)) if self._components else float("nan")
        )


def merge_sizes(ranges: Iterable[tuple[int, int] | None]) -> tuple[int, int] | None:
    """Return the range that contains all ranges of sizes; None if all are None.

    >>> merge_sizes([(3, 9), None, (2, 5)])
    (2, 9)
    """
    known = [each for each in ranges if each is not None]
    return (min(low for low, _ in known), max(high for _, high in known)) if known else None


def _sizes(columns: Columns) -> tuple[int, int] | None:
    """Return the smallest and largest number of atoms of structures without a cell, or None."""
    sizes = columns.n_atoms
    if columns.cell is not None:
        sizes = sizes[~columns.cell.any(axis=(1, 2))]
    return (int(sizes.min()), int(sizes.max())) if len(sizes) else None


def reference_energies(
    summary: Summary, method: str | Mapping[str, float], *, isolated_atoms: np.ndarray | None = None
) -> np.ndarray:
    """Return the reference energy of each element (eV), (119,) float64; 0 if it does not occur.

    Args:
      summary: Summary of the training set.
      method: "least_squares" fits the total energies to the element counts, or uses the isolated
        atoms if the compositions do not determine the fit. "isolated_atoms" uses the energies of
        isolated atoms in the data set. "none" returns zeros. A mapping from symbols to energies
        (eV) sets them explicitly.
      isolated_atoms: Energies of isolated atoms in the data set (eV), (119,), NaN if unknown.

    Raises:
      ValueError: The method is unknown, there is no energy to fit, or an element of the training
        set has no value.
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
            raise ValueError(
                "the data set has no energies of isolated atoms. Set reference_energies = "
                "'least_squares', or give them by element."
            )
        return _complete(isolated_atoms, present, "the data set's isolated atoms")
    if method != "least_squares":
        raise ValueError(
            "reference_energies must be 'least_squares', 'isolated_atoms', 'none' or a mapping "
            f"from symbols to eV; received {method!r}"
        )
    undetermined = summary.fit.undetermined()
    if not len(undetermined):
        return summary.fit.solve()
    problem = (
        "reference energies: the compositions of the training set do not determine those of "
        f"{', '.join(chemical_symbols[z] for z in undetermined)}"
    )
    if isolated_atoms is not None and np.isfinite(isolated_atoms[present]).all():
        log.warning("%s; using the energies of isolated atoms of the data set", problem)
        return _complete(isolated_atoms, present, "the data set's isolated atoms")
    log.warning(
        "%s, so their values have no physical meaning and the force field fails for other "
        "compositions. Add isolated atoms to the data, or give their energies in eV, "
        "--config.data.reference_energies='H=-13.6,C=-1029.4'",
        problem,
    )
    return summary.fit.solve()


def isolated_from_structures(blocks: Iterable[Columns]) -> np.ndarray | None:
    """Return the energies of neutral single atoms (eV), (119,), the lowest of each element.

    Elements without a single atom are NaN. The result is None if there are no single atoms.

    Args:
      blocks: Structures. Those with several atoms are ignored.
    """
    energies = np.full(NUM_ELEMENTS, np.inf)
    for columns in blocks:
        single = (columns.n_atoms == 1) & np.isfinite(columns.energy) & (columns.charge == 0)
        numbers = columns.numbers[columns.offsets[:-1][single]]
        np.minimum.at(energies, numbers, columns.energy[single])
    known = np.isfinite(energies)
    return np.where(known, energies, np.nan) if known.any() else None


def isolated_from_formation(blocks: Iterable[tuple[Columns, np.ndarray]]) -> np.ndarray | None:
    """Return the energies of isolated atoms (eV), (119,), from total and formation energies.

    Elements without any structure that has both energies are NaN. The result is None if no
    structure has both.

    Args:
      blocks: Pairs of columns and their formation energies (eV), (S,).
    """
    fit = ElementFit()
    for columns, formation in blocks:
        fit.add(columns, columns.energy - formation)
    return np.where(fit.present, fit.solve(), np.nan) if fit.present.any() else None


def _complete(values, present, source):
    """Return energies with zeros for absent elements. Raise ValueError if a present one is NaN."""
    missing = [chemical_symbols[z] for z in present if not np.isfinite(values[z])]
    if missing:
        raise ValueError(f"{source} lack {', '.join(missing)}, which occur in the training set")
    return np.where(np.isfinite(values), values, 0.0)
