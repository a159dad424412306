"""Structure: one conformation of a molecule or crystal, with its labels.

All host-side modules exchange structures in this form. Units are eV, Å and elementary charges. A
missing label is NaN, never zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from ase.data import chemical_symbols


def hill_formula(numbers: np.ndarray) -> str:
    """Return the formula in the order of Hill: carbon, hydrogen, then the alphabet.

    >>> hill_formula(np.array([8, 1, 6, 1, 1, 1])), hill_formula(np.array([11, 17]))
    ('CH4O', 'ClNa')
    """
    counts = {
        chemical_symbols[z]: n for z, n in zip(*np.unique(numbers, return_counts=True), strict=True)
    }
    first = ["C", "H"] if "C" in counts else []
    order = [s for s in first if s in counts] + sorted(counts.keys() - set(first))
    return "".join(s + (str(counts[s]) if counts[s] > 1 else "") for s in order)


from mlip_jax.state_labels import charge_names, find_unpaired, spin_names, unpaired_of_moments


@dataclasses.dataclass(frozen=True, slots=True)
class Structure:
    """Atoms, positions and labels of one conformation.

    Attributes:
      numbers: Atomic numbers, shape (n_atoms,), int.
      positions: Cartesian positions (Å), shape (n_atoms, 3), float64.
      energy: Total energy (eV); NaN if unknown.
      forces: Forces, minus the gradient (eV/Å), shape (n_atoms, 3); None or NaN if unknown.
      charge: Total charge (elementary charges).
      spin: Number of unpaired electrons.
      cell: Lattice vectors as rows (Å), shape (3, 3), or None.
      pbc: Periodicity along each lattice vector, shape (3,), or None for no periodicity.
      molecule: Identity of the molecule: equal for all its conformations, different for other
        molecules.
      smiles: SMILES of the molecule; empty if the source does not provide it.
      conformer: Index of the conformation within its source record.
      record: Index of the record in its file.
      subset: Name of the subset of the data set that the structure belongs to.
      source: File and record, for error messages.
      properties: Further labels of the whole structure by name: numbers or arrays of the same shape
        in all structures.
      atom_properties: Further labels of the atoms by name, shape (n_atoms, ...) each.
    """

    numbers: np.ndarray
    positions: np.ndarray
    energy: float = float("nan")
    forces: np.ndarray | None = None
    charge: float = 0.0
    spin: float = 0.0
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
                f"{self.source or 'structure'}: positions must have shape "
                f"({len(self.numbers)}, 3), received {self.positions.shape}"
            )
        if self.forces is not None and self.forces.shape != self.positions.shape:
            raise ValueError(
                f"{self.source or 'structure'}: forces must have shape {self.positions.shape}, "
                f"received {self.forces.shape}"
            )

    def __len__(self) -> int:
        return len(self.numbers)


_MIN_HEIGHT = 0.1  # distance of lattice planes (Å); a thinner cell has millions of close images


def cell_problem(cell: np.ndarray | None, pbc: np.ndarray | None) -> str:
    """Return the problem of the lattice vectors of periodic directions, "" if there is none.

    Args:
      cell: Lattice vectors as rows (Å), shape (3, 3), or None.
      pbc: Periodicity along each lattice vector, shape (3,), or None for no periodicity.
    """
    if cell is None or pbc is None or not np.any(pbc):
        return ""
    vectors = np.asarray(cell, np.float64)[np.asarray(pbc, bool)]  # (periodic directions, 3)
    if not np.isfinite(vectors).all():
        return "cell not finite"
    lengths = np.linalg.norm(vectors, axis=1)
    if not lengths.all():
        return "lattice vector of length zero"
    # The singular values of parallel or coplanar unit vectors include zero.
    if np.linalg.svd(vectors / lengths[:, None], compute_uv=False).min() < 1e-6:
        return "parallel or coplanar lattice vectors"
    # The columns of the inverse have the lengths of the reciprocal vectors.
    if np.linalg.norm(np.linalg.pinv(vectors), axis=0).max() > 1 / _MIN_HEIGHT:
        return f"lattice planes closer than {_MIN_HEIGHT} Å"
    return ""


STATES = ("charge", "num_unpaired_electrons")  # keys of `ase.Atoms.info`
INITIAL_MOMENTS = "initial_magmoms"  # key of `ase.Atoms.arrays`


def electronic_value(atoms, name: str) -> float:
    """Return the field `name` of `atoms.info` (one of STATES) as a number, 0 if it is missing.

    A missing field is searched under its other usual names, such as "total_charge", "spin" and
    "multiplicity", see `state_labels`. Without any, initial magnetic moments of a molecule state its
    unpaired electrons.

    Raises:
      ValueError: The value is not a finite number, or a spin does not fit the number of electrons.
    """
    if name == "charge" and name not in atoms.info:
        name = next(iter(charge_names(atoms.info)), name)
    elif name not in atoms.info:
        return _unpaired_electrons(atoms) or 0.0
    raw = atoms.info.get(name, 0.0)
    try:
        value = float(raw)
    except (TypeError, ValueError):
        value = np.nan
    if not np.isfinite(value):
        raise ValueError(
            f"atoms.info[{name!r}] must be a finite number, received {raw!r}. Remove it for 0."
        )
    return value


def _unpaired_electrons(atoms) -> float | None:
    """Return the number of unpaired electrons by labels under other names, or None.

    Without such labels it is that of the initial magnetic moments of a molecule.
    """
    names = spin_names(atoms.info)
    if not names and INITIAL_MOMENTS in atoms.arrays:
        charge, moments = electronic_value(atoms, "charge"), atoms.arrays[INITIAL_MOMENTS]
        return unpaired_of_moments(moments, atoms.numbers, charge, atoms.pbc)
    if not names:
        return None
    return find_unpaired(atoms.info, atoms.numbers, electronic_value(atoms, "charge"), names)


def electronic_state(atoms) -> dict[str, Any]:
    """Return the fields of STATES that the info of an `ase.Atoms` object contains.

    These are the charge (elementary charges) and the number of unpaired electrons. Fields under
    other usual names are returned under these.
    """
    state = {name: atoms.info[name] for name in STATES if name in atoms.info}
    if "charge" not in state and charge_names(atoms.info):
        state["charge"] = electronic_value(atoms, "charge")
    if "num_unpaired_electrons" not in state:
        unpaired = _unpaired_electrons(atoms)
        state |= {} if unpaired is None else {"num_unpaired_electrons": int(unpaired)}
    return state


def from_ase(atoms, **labels) -> Structure:
    """Convert an `ase.Atoms` object; `labels` are further fields of Structure."""
    periodic = bool(np.any(atoms.pbc))
    return Structure(
        numbers=np.asarray(atoms.numbers, np.int32),
        positions=np.asarray(atoms.positions, np.float64),
        cell=np.asarray(atoms.cell.array, np.float64) if periodic else None,
        pbc=np.asarray(atoms.pbc, bool) if periodic else None,
        charge=electronic_value(atoms, "charge"),
        spin=electronic_value(atoms, "num_unpaired_electrons"),
        **labels,
    )
