"""Filters that decide which structures of a block are used, with a reason for each skipped one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from ase.data import atomic_numbers

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality.geometry import (
    chunks,
    finite_positions,
    segment_sum,
    shortest_distances,
)

# Names of the reasons. The index is the code in arrays; 0 means kept. The first reason that applies
# is reported.
REASONS = (
    "kept",
    "positions not finite",
    "charge",
    "elements",
    "too few atoms",
    "too many atoms",
    "no labels",
    "no energy",
    "no forces",
    "force too large",
    "atoms too close",
    "energy outlier",
    "force outlier",
    "invalid cell",
)
CODES = {reason: code for code, reason in enumerate(REASONS)}
REQUIRE = ("any", "energy", "forces", "both", "none")

# Added to the spread within a molecule (eV, eV/Å), so that nearly equal conformations are never
# outliers.
ENERGY_FLOOR = 0.05
FORCE_FLOOR = 0.05
# Tolerance of charges (e): a sum of atomic charges is not an exact integer.
CHARGE_TOLERANCE = 1e-3


@dataclasses.dataclass
class Filters:
    """Conditions that a structure must satisfy to be used; None switches a filter off.

    Attributes:
      elements: Symbols of the allowed elements.
      charge: Required total charge (e). NaN switches the filter off as well.
      min_atoms: Minimum number of atoms.
      max_atoms: Maximum number of atoms.
      max_force: Maximum absolute force component (eV/Å).
      min_distance: Minimum distance between two atoms (Å).
      require: Labels that must be known: "any" (energy or forces), "energy", "forces", "both" or
        "none". Forces are known if at least one component is finite.
      max_energy_deviation: Maximum |energy - median of the molecule| per atom (eV/atom).
      max_energy_z: Maximum robust z-score of the energy within its molecule; see robust_outliers.
      max_force_z: Maximum robust z-score of the root mean square force within its molecule.

    The last three compare all conformations of a molecule; `molecule_outliers` applies them.
    """

    elements: Sequence[str] | None = None
    charge: float | None = None
    min_atoms: int | None = None
    max_atoms: int | None = None
    max_force: float | None = None
    min_distance: float | None = None
    require: str = "any"
    max_energy_deviation: float | None = None
    max_energy_z: float | None = None
    max_force_z: float | None = None

    def __post_init__(self):
        if self.charge is not None and np.isnan(self.charge):
            self.charge = None
        if isinstance(self.elements, str):
            raise ValueError(
                "elements must be a sequence of symbols such as ('H', 'C'), received "
                f"{self.elements!r}"
            )
        for symbol in self.elements or ():
            if symbol not in atomic_numbers:
                raise ValueError(f"elements: {symbol!r} is not the symbol of an element")
        if self.require not in REQUIRE:
            raise ValueError(
                f"require must be one of {', '.join(REQUIRE)}; received {self.require!r}"
            )
        for name in (
            "min_atoms",
            "max_atoms",
            "max_force",
            "min_distance",
            "max_energy_deviation",
            "max_energy_z",
            "max_force_z",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive or None, received {value!r}")

    def reasons(self, columns: Columns, *, shortest: np.ndarray | None = None) -> np.ndarray:
        """Return the first reason to skip each structure, as a code.

        Args:
          columns: Block of structures.
          shortest: Precomputed shortest_distances(columns) (Å), shape (S,).

        Returns:
          Codes as in CODES, shape (S,), int8; 0 for structures that are kept.
        """
        largest, any_force = _largest_forces(columns)
        no_energy, no_forces = ~np.isfinite(columns.energy), ~any_force
        codes = np.zeros(len(columns), np.int8)

        def exclude(reason, where):
            codes[(codes == 0) & where] = CODES[reason]

        exclude("positions not finite", ~finite_positions(columns))
        if self.charge is not None:
            exclude("charge", ~(np.abs(columns.charge - self.charge) < CHARGE_TOLERANCE))
        if self.elements is not None:
            exclude("elements", self._other_elements(columns))
        if self.min_atoms is not None:
            exclude("too few atoms", columns.n_atoms < self.min_atoms)
        if self.max_atoms is not None:
            exclude("too many atoms", columns.n_atoms > self.max_atoms)
        if self.require != "none":
            exclude("no labels", no_energy & no_forces)
        if self.require in ("energy", "both"):
            exclude("no energy", no_energy)
        if self.require in ("forces", "both"):
            exclude("no forces", no_forces)
        if self.max_force is not None:
            exclude("force too large", largest > self.max_force)
        if self.min_distance is not None:
            if shortest is None:
                shortest = shortest_distances(columns)
            exclude("atoms too close", shortest < self.min_distance)
            if columns.pbc is not None:
                # Positions are finite here, so lattice vectors leave distances undefined.
                exclude("invalid cell", np.isnan(shortest) & columns.pbc.any(1))
        return codes

    def _other_elements(self, columns):
        """Return whether a structure contains an element that is not allowed, shape (S,), bool."""
        allowed = np.zeros(256, bool)
        allowed[[atomic_numbers[e] for e in self.elements]] = True
        other = ~allowed[columns.numbers]
        if not other.any():
            return np.zeros(len(columns), bool)
        return segment_sum(other.astype(np.int64), columns.offsets[:-1]) > 0

    @property
    def compares_conformations(self) -> bool:
        """Whether a filter compares the conformations of a molecule."""
        return any(
            v is not None for v in (self.max_energy_deviation, self.max_energy_z, self.max_force_z)
        )

    def molecule_outliers(
        self, molecule: np.ndarray, energy: np.ndarray, force_rms: np.ndarray, n_atoms: np.ndarray
    ) -> np.ndarray:
        """Return codes of outliers within their molecules, shape (S,), int8; 0 for the others.

        Args:
          molecule: Molecule of each structure, any dtype, shape (S,). It must cover the whole data
            set.
          energy: Energies (eV), shape (S,); NaN if unknown.
          force_rms: Result of force_rms_per_structure (eV/Å), shape (S,).
          n_atoms: Number of atoms per structure, shape (S,).
        """
        codes = np.zeros(len(energy), np.int8)
        molecule = molecule_codes(molecule)
        if self.max_force_z is not None:
            outlier = robust_outliers(molecule, force_rms, self.max_force_z, floor=FORCE_FLOOR)
            codes[outlier] = CODES["force outlier"]
        outlier = np.zeros(len(energy), bool)
        if self.max_energy_z is not None:
            outlier |= robust_outliers(molecule, energy, self.max_energy_z, floor=ENERGY_FLOOR)
        if self.max_energy_deviation is not None:
            deviation = np.abs(energy - group_medians(molecule, energy)[0])
            outlier |= deviation > self.max_energy_deviation * n_atoms
        codes[outlier] = CODES["energy outlier"]
        return codes


def count_reasons(reasons: np.ndarray) -> dict[str, int]:
    """Return the number of skipped structures for each reason that occurs."""
    counts = np.bincount(reasons, minlength=len(REASONS))
    return {reason: int(n) for reason, n in list(zip(REASONS, counts))[1:] if n}


def identities(columns: Columns, reasons: np.ndarray) -> list[tuple[str, str]]:
    """Return ("source#conformer", reason) for every skipped structure, in their order."""
    return [
        (f"{columns.source[s]}#{columns.conformer[s]}", REASONS[reasons[s]])
        for s in np.flatnonzero(reasons)
    ]


def force_rms_per_structure(columns: Columns) -> np.ndarray:
    """Return the root mean square of the known force components per structure.

    The result has the shape (S,), in eV/Å; NaN without forces.
    """
    total, known = np.empty(len(columns)), np.empty(len(columns))
    for structures, atoms, starts in chunks(columns):
        forces = columns.forces[atoms]
        squares = np.einsum("ai,ai->a", forces, forces)  # (atoms of the chunk,)
        total[structures] = segment_sum(squares, starts)
        known[structures] = 3 * columns.n_atoms[structures]
        if not np.isfinite(squares).all():  # count only the known components
            finite = np.isfinite(forces)
            total[structures] = segment_sum((np.where(finite, forces, 0) ** 2).sum(1), starts)
            known[structures] = segment_sum(finite.sum(1), starts)
    return np.sqrt(np.divide(total, known, out=np.full(len(columns), np.nan), where=known > 0))


def robust_outliers(
    molecule: np.ndarray, values: np.ndarray, z: float, *, min_count: int = 5, floor: float = 0.0
) -> np.ndarray:
    """Return whether values are far from the median of their molecule, shape (S,), bool.

    The criterion is |x - median| > z (1.4826 MAD + floor). MAD is the median absolute deviation;
    1.4826 MAD is the standard deviation of normally distributed values. Outliers can hide each
    other only if they are more than half of the values of a molecule.

    Args:
      molecule: Molecule of each value, any dtype, shape (S,).
      values: Values, shape (S,). NaN is ignored and never an outlier.
      z: Number of standard deviations.
      min_count: Molecules with fewer known values have no outliers.
      floor: Value added to the spread, in the unit of the values.
    """
    values = np.where(np.isfinite(values), values, np.nan)
    molecule = molecule_codes(molecule)
    median, count = group_medians(molecule, values)
    deviation = np.abs(values - median)
    spread = 1.4826 * group_medians(molecule, deviation)[0] + floor
    return (deviation > z * spread) & (count >= min_count)


def group_medians(group: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the median and the count of the finite values in the group of each value.

    Both have the shape (S,). The median is NaN and the count 0 in groups without finite values.
    """
    known = np.flatnonzero(np.isfinite(values))
    median, count = np.full(len(values), np.nan), np.zeros(len(values), np.int64)
    if not len(known):
        return median, count
    # Sort by group and, within a group, by value.
    order = known[np.lexsort((values[known], group[known]))]
    new = np.flatnonzero(np.concatenate([[True], group[order][1:] != group[order][:-1]]))
    counts = np.diff(np.append(new, len(order)))
    sorted_values = values[order]
    # Median per group, (groups,).
    middle = 0.5 * (sorted_values[new + (counts - 1) // 2] + sorted_values[new + counts // 2])
    # A missing value gets the median of its group, too: look up the group of every value.
    index = np.searchsorted(group[order][new], group)
    index = np.minimum(index, len(new) - 1)
    has_median = group[order][new][index] == group
    median[has_median], count[has_median] = middle[index[has_median]], counts[index[has_median]]
    return median, count


def molecule_codes(molecule: np.ndarray) -> np.ndarray:
    """Return integers that are equal if and only if the molecules are, shape (S,), int64.

    Adjacent conformations of a molecule are compared once, which is faster than np.unique.
    """
    molecule = np.asarray(molecule)
    if molecule.dtype.kind in "iu" or not len(molecule):
        return molecule.astype(np.int64)
    new = np.concatenate([[True], molecule[1:] != molecule[:-1]])
    return np.unique(molecule[new], return_inverse=True)[1].ravel()[np.cumsum(new) - 1]


def _largest_forces(columns):
    """Return the largest absolute force component (0 if unknown), and whether any is known.

    Both have the shape (S,).
    """
    largest, known = np.zeros(len(columns)), np.zeros(len(columns), bool)
    for structures, atoms, starts in chunks(columns):
        filled = columns.n_atoms[structures] > 0
        if not filled.any():
            continue
        size = np.abs(columns.forces[atoms]).ravel()
        highest = np.full(len(filled), np.nan)
        highest[filled] = np.maximum.reduceat(size, 3 * starts[filled])
        if not np.isfinite(highest[filled]).all():  # skip the unknown components
            size[~np.isfinite(size)] = -1.0
            highest[filled] = np.maximum.reduceat(size, 3 * starts[filled])
        known[structures] = highest >= 0
        largest[structures] = np.where(highest >= 0, highest, 0.0)
    return largest, known
