"""Summary of a data set: counts, histograms and labels, from which its report is written.

The symbols n_s, n_c and N are those of the literature: number of molecules, mean number of
conformations per molecule, and total number of conformations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from mlip_jax.datasets.quality.histogram import Histogram

# (field, title, axis label, unit, counted objects)
DISTRIBUTIONS = (
    ("n_atoms", "Atoms per structure", "number of atoms", "", "structures"),
    ("conformers", "Conformers per molecule", "number of conformations", "", "molecules"),
    (
        "energy_per_atom",
        "Energy minus reference",
        "energy minus reference of elements",
        "eV/atom",
        "structures",
    ),
    ("total_energy_per_atom", "Total energy", "total energy", "eV/atom", "structures"),
    ("force", "Force on an atom", "|F|", "eV/Å", "atoms"),
    (
        "shortest_distance",
        "Shortest distance",
        "shortest distance in a structure",
        "Å",
        "structures",
    ),
)


@dataclasses.dataclass(frozen=True)
class PropertySummary:
    """Summary of a further label.

    Attributes:
      minimum: Minimum of the known values.
      maximum: Maximum of the known values.
      labelled: Fraction of structures with this label, from 0 to 1.
      unit: Unit, "" if unknown.
      shape: Shape of the label of one structure.
    """

    minimum: float
    maximum: float
    labelled: float
    unit: str = ""
    shape: tuple[int, ...] = ()


@dataclasses.dataclass
class DatasetSummary:
    """Summary of a data set for its report.

    Histograms may also be given as (edges, counts). The report skips those that are None.

    Attributes:
      title: Name of the data set.
      level_of_theory: Level of theory of the labels.
      files: Names of the source files.
      elements: Number of atoms by symbol.
      num_structures: Number of structures, N.
      num_molecules: Number of molecules, n_s.
      n_atoms: Histogram of the number of atoms per structure.
      conformers: Histogram of the number of conformations per molecule.
      energy_per_atom: Histogram of the energy minus the per-element reference, divided by the
        number of atoms (eV/atom).
      total_energy_per_atom: Histogram of the total energy divided by the number of atoms (eV/atom).
      force: Histogram of the norms of the forces on atoms (eV/Å), with logarithmic bins.
      shortest_distance: Histogram of the shortest distance between two atoms of a structure (Å).
      charges: Number of structures by total charge in e.
      labels: Fraction of structures with a label, from 0 to 1: {"energy": 1.0, "forces": 0.98}.
      properties: Further labels by name.
      reference: Name of the reference that is subtracted in `energy_per_atom`.
      reference_energies: Reference energies in eV by symbol.
      counts: Further counts, such as numbers of skipped structures by reason.
      notes: Notes for the reader.
      problems: Problems of the data.
    """

    title: str
    level_of_theory: str
    files: Sequence[str]
    elements: Mapping[str, int]
    num_structures: int
    num_molecules: int
    n_atoms: Histogram | None = None
    conformers: Histogram | None = None
    energy_per_atom: Histogram | None = None
    total_energy_per_atom: Histogram | None = None
    force: Histogram | None = None
    shortest_distance: Histogram | None = None
    charges: Mapping[float, int] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, float] = dataclasses.field(default_factory=dict)
    properties: Mapping[str, PropertySummary] = dataclasses.field(default_factory=dict)
    reference: str = "per-element least squares"
    reference_energies: Mapping[str, float] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    problems: Sequence[str] = ()

    def __post_init__(self):
        for name, *_ in DISTRIBUTIONS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, Histogram):
                setattr(self, name, Histogram.from_counts(*value))
        unknown = [symbol for symbol in self.elements if symbol not in atomic_numbers]
        if unknown:
            raise ValueError(f"elements: {unknown[0]!r} is not the symbol of an element")
        fractions = [*self.labels.items(), *((n, p.labelled) for n, p in self.properties.items())]
        for name, fraction in fractions:
            if not 0 <= fraction <= 1:
                raise ValueError(
                    f"the fraction of structures with {name!r} must be between 0 and 1, "
                    f"received {fraction}"
                )

    @property
    def mean_conformers(self) -> float:
        """Mean number of conformations per molecule, n_c; NaN without molecules."""
        return self.num_structures / self.num_molecules if self.num_molecules else math.nan

    def symbols(self) -> list[str]:
        """Return the symbols of the elements in the order of atomic numbers."""
        return sorted(self.elements, key=atomic_numbers.__getitem__)

    def distributions(self) -> dict[str, tuple[str, str, str, Histogram]]:
        """Return {title: (axis label, unit, counted objects, histogram)} of all non-empty ones."""
        given = ((title, *texts, getattr(self, name)) for name, title, *texts in DISTRIBUTIONS)
        return {title: (*texts, h) for title, *texts, h in given if h is not None and h.known}

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain values, ready for JSON; NaN and infinity become None."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {
            "mean_conformers": self.mean_conformers
        }
        return _plain(fields)


def _plain(value: Any) -> Any:
    """Convert to plain values for JSON; NaN and infinity become None."""
    if isinstance(value, Histogram):
        return _plain(value.to_json())
    if dataclasses.is_dataclass(value):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
