"""Structure: one conformation of one molecule or crystal, with its labels. The word of all host-side rooms.

Units are eV, Å and elementary charges. A label that is missing is NaN, never zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Structure:
    """Atoms, positions and labels of one conformation.

    Attributes:
      numbers: Atomic numbers, shape (n_atoms,), int.
      positions: Cartesian positions in Å, shape (n_atoms, 3), float64.
      energy: Total energy in eV; NaN where unknown.
      forces: Forces (minus the gradient) in eV/Å, shape (n_atoms, 3); None or NaN where unknown.
      charge: Total charge in elementary charges.
      cell: Lattice vectors as rows in Å, shape (3, 3), or None.
      pbc: Periodicity along each lattice vector, shape (3,), or None for no periodicity.
      molecule: Identity of the molecule: equal for all its conformations, different for other molecules.
      smiles: Of the molecule, where the source knows it.
      conformer: Index of the conformation within its source record.
      record: Number of the record in its file.
      subset: The part of the data set that it comes from.
      source: File and record, for messages.
      properties: Further labels of the whole structure by name: numbers or arrays of one shape.
      atom_properties: Further labels of the atoms by name, each of shape (n_atoms, ...).
    """

    numbers: np.ndarray
    positions: np.ndarray
    energy: float = float("nan")
    forces: np.ndarray | None = None
    charge: float = 0.0
    cell: np.ndarray | None = None
    pbc: np.ndarray | None = None
    molecule: str = ""
    smiles: str = ""
    conformer: int = 0
    record: int = 0
    subset: str = ""
    source: str = ""
    properties: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    atom_properties: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.positions.shape != (len(self.numbers), 3):
            raise ValueError(
                f"{self.source or 'structure'}: positions must have shape ({len(self.numbers)}, 3), "
                f"received {self.positions.shape}")
        if self.forces is not None and self.forces.shape != self.positions.shape:
            raise ValueError(
                f"{self.source or 'structure'}: forces must have shape {self.positions.shape}, "
                f"received {self.forces.shape}")

    def __len__(self) -> int:
        return len(self.numbers)


STATES = ("charge", "num_unpaired_electrons")  # names in the info of an `ase.Atoms` object


def electronic_value(atoms, name: str) -> float:
    """Return `atoms.info[name]` of STATES as a number, 0 if it is missing.

    Raises:
      ValueError: It is not a finite number.
    """
    given = atoms.info.get(name, 0.0)
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = np.nan
    if not np.isfinite(value):
        raise ValueError(f"atoms.info[{name!r}] must be a finite number, received {given!r}; leave it out for 0")
    return value


def electronic_state(atoms) -> dict[str, Any]:
    """What the info of an `ase.Atoms` object says of charge (e) and "num_unpaired_electrons", where it says so."""
    return {name: atoms.info[name] for name in STATES if name in atoms.info}


def from_ase(atoms, **labels) -> Structure:
    """Structure of an `ase.Atoms` object; `labels` are further fields of Structure."""
    periodic = bool(np.any(atoms.pbc))
    return Structure(
        numbers=np.asarray(atoms.numbers, np.int32),
        positions=np.asarray(atoms.positions, np.float64),
        cell=np.asarray(atoms.cell.array, np.float64) if periodic else None,
        pbc=np.asarray(atoms.pbc, bool) if periodic else None,
        charge=electronic_value(atoms, "charge"),
        **labels)
