"""Columns: many structures in a few long arrays, as in stores and in the input of batching."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from mlip_jax.structure import Structure

PER_ATOM = ("numbers", "positions", "forces")
PER_STRUCTURE = (
    "energy",
    "charge",
    "molecule",
    "smiles",
    "conformer",
    "record",
    "subset",
    "source",
    "cell",
    "pbc",
    "spin",
)
_OPTIONAL = ("cell", "pbc", "spin")


@dataclasses.dataclass(frozen=True)
class Columns:
    """S structures with A atoms in total. Structure s has the atoms offsets[s]:offsets[s + 1].

    Text columns are object arrays of str: NumPy's fixed-width strings would pad every name to the
    length of the longest one.

    Attributes:
      numbers: Atomic numbers, (A,) int32.
      positions: Positions (Å), (A, 3) float64.
      forces: Forces (eV/Å), (A, 3) float64; NaN if unknown.
      offsets: First atom of each structure, then A, (S + 1,) int64.
      energy: Energies (eV), (S,) float64; NaN if unknown.
      charge: Total charges (e), (S,) float64.
      molecule: Names of the molecules, (S,) object. Conformers of one molecule share a name.
      smiles: SMILES or "", (S,) object.
      conformer: Indices of the conformations within their records, (S,) int64.
      record: Numbers of the records in the source, (S,) int64.
      subset: Names of the subsets of the data set, (S,) object.
      source: Files and records of the structures, for messages, (S,) object.
      cell: Cell vectors (Å), (S, 3, 3) float64, or None if no structure is periodic.
      pbc: Periodic directions, (S, 3) bool, or None if no structure is periodic.
      spin: Numbers of unpaired electrons, (S,) float64, or None if all are zero.
      properties: Properties of structures by name, (S, ...) float64; NaN if unknown.
      atom_properties: Properties of atoms by name, (A, ...) float64; NaN if unknown.
    """

    numbers: np.ndarray
    positions: np.ndarray
    forces: np.ndarray
    offsets: np.ndarray
    energy: np.ndarray
    charge: np.ndarray
    molecule: np.ndarray
    smiles: np.ndarray
    conformer: np.ndarray
    record: np.ndarray
    subset: np.ndarray
    source: np.ndarray
    cell: np.ndarray | None = None
    pbc: np.ndarray | None = None
    spin: np.ndarray | None = None
    properties: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    atom_properties: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.energy)

    @property
    def n_atoms(self) -> np.ndarray:
        """Number of atoms per structure, (S,)."""
        return np.diff(self.offsets)

    @classmethod
    def from_structures(cls, structures: Iterable[Structure]) -> Columns:
        """Build columns from structures. Missing labels become NaN.

        Raises:
          ValueError: A property has different shapes in different structures.
        """
        items = list(structures)
        periodic = any(s.pbc is not None for s in items)

        def per_structure(name, dtype):
            return np.array([getattr(s, name) for s in items], dtype)

        def per_atom(arrays, tail, dtype):
            arrays = list(arrays)
            return (
                np.concatenate(arrays).astype(dtype, copy=False)
                if arrays
                else np.zeros((0, *tail), dtype)
            )

        return cls(
            numbers=per_atom((s.numbers for s in items), (), np.int32),
            positions=per_atom((s.positions for s in items), (3,), np.float64),
            forces=per_atom(
                (np.full((len(s), 3), np.nan) if s.forces is None else s.forces for s in items),
                (3,),
                np.float64,
            ),
            offsets=np.concatenate([[0], np.cumsum([len(s) for s in items])]).astype(np.int64),
            energy=per_structure("energy", np.float64),
            charge=per_structure("charge", np.float64),
            molecule=per_structure("molecule", object),
            smiles=per_structure("smiles", object),
            conformer=per_structure("conformer", np.int64),
            record=per_structure("record", np.int64),
            subset=per_structure("subset", object),
            source=per_structure("source", object),
            cell=np.array([np.zeros((3, 3)) if s.cell is None else s.cell for s in items])
            if periodic
            else None,
            pbc=np.array([np.zeros(3, bool) if s.pbc is None else s.pbc for s in items])
            if periodic
            else None,
            spin=per_structure("spin", np.float64) if any(s.spin for s in items) else None,
            properties={
                name: np.stack(list(_values(items, "properties", name)))
                for name in _names(items, "properties")
            },
            atom_properties={
                name: np.concatenate(list(_values(items, "atom_properties", name)))
                for name in _names(items, "atom_properties")
            },
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Columns]) -> Columns:
        """Concatenate columns in order.

        Properties that a part lacks become NaN, a part without cells becomes non-periodic, and one
        without spins gets zeros.
        """
        from_parts = {
            name: np.concatenate([getattr(p, name) for p in parts])
            for name in (*PER_ATOM, *PER_STRUCTURE)
            if name not in _OPTIONAL
        }
        offsets = np.concatenate(
            [[0], np.cumsum(np.concatenate([p.n_atoms for p in parts]))]
        ).astype(np.int64)
        cell = pbc = None
        if any(p.pbc is not None for p in parts):
            cell = np.concatenate(
                [np.zeros((len(p), 3, 3)) if p.cell is None else p.cell for p in parts]
            )
            pbc = np.concatenate(
                [np.zeros((len(p), 3), bool) if p.pbc is None else p.pbc for p in parts]
            )
        spin = None
        if any(p.spin is not None for p in parts):
            spin = np.concatenate([np.zeros(len(p)) if p.spin is None else p.spin for p in parts])
        properties = _concatenate_properties([(p.properties, len(p)) for p in parts])
        atom_properties = _concatenate_properties(
            [(p.atom_properties, len(p.numbers)) for p in parts]
        )
        return cls(
            **from_parts,
            offsets=offsets,
            cell=cell,
            pbc=pbc,
            spin=spin,
            properties=properties,
            atom_properties=atom_properties,
        )

    def __getitem__(self, s: int) -> Structure:
        atoms = slice(self.offsets[s], self.offsets[s + 1])
        periodic = self.pbc is not None and self.pbc[s].any()
        return Structure(
            numbers=self.numbers[atoms],
            positions=self.positions[atoms],
            forces=self.forces[atoms],
            energy=float(self.energy[s]),
            charge=float(self.charge[s]),
            cell=self.cell[s] if periodic else None,
            pbc=self.pbc[s] if periodic else None,
            spin=0.0 if self.spin is None else float(self.spin[s]),
            molecule=str(self.molecule[s]),
            smiles=str(self.smiles[s]),
            conformer=int(self.conformer[s]),
            record=int(self.record[s]),
            subset=str(self.subset[s]),
            source=str(self.source[s]),
            properties={name: values[s] for name, values in self.properties.items()},
            atom_properties={name: values[atoms] for name, values in self.atom_properties.items()},
        )

    def __iter__(self) -> Iterator[Structure]:
        return (self[s] for s in range(len(self)))

    def take(self, indices: np.ndarray, *, labels_only: bool = False) -> Columns:
        """Return the structures `indices`, in that order.

        `labels_only` exists for compatibility with `Store.take`, which then skips texts and
        properties. It has no effect here, because everything is in memory.
        """
        indices = np.asarray(indices, np.int64)
        atoms = self.atoms_of(indices)
        fields = {name: getattr(self, name)[atoms] for name in PER_ATOM}
        fields |= {
            name: None if getattr(self, name) is None else getattr(self, name)[indices]
            for name in PER_STRUCTURE
        }
        fields["offsets"] = np.concatenate([[0], np.cumsum(self.n_atoms[indices])]).astype(np.int64)
        return Columns(
            **fields,
            properties={name: values[indices] for name, values in self.properties.items()},
            atom_properties={name: values[atoms] for name, values in self.atom_properties.items()},
        )

    def atoms_of(self, indices: np.ndarray) -> np.ndarray:
        """Return the rows of the atom arrays that belong to the structures `indices`, in order."""
        counts = self.n_atoms[indices]
        # Shift of the rows of each structure from its place in the result, repeated per atom.
        starts = np.repeat(
            self.offsets[:-1][indices] - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts
        )
        return starts + np.arange(counts.sum())


def _names(items: list[Structure], field: str) -> list[str]:
    """Return the sorted names of all properties in `field` of the structures."""
    return sorted({name for s in items for name in getattr(s, field)})


def _values(items: list[Structure], field: str, name: str) -> Iterator[np.ndarray]:
    """Yield the property `name` of every structure, filled with NaN if it is missing."""
    first = next(np.asarray(getattr(s, field)[name]) for s in items if name in getattr(s, field))
    per_atom = field == "atom_properties"
    tail = first.shape[1:] if per_atom else first.shape
    for s in items:
        shape = (len(s), *tail) if per_atom else tail
        value = np.asarray(getattr(s, field).get(name, np.full(shape, np.nan)), np.float64)
        if value.shape != shape:
            raise ValueError(
                f"{s.source or 'structure'}: property {name!r} has shape {value.shape}, "
                f"expected {shape} as in the structures before"
            )
        yield value


def _concatenate_properties(
    parts: Sequence[tuple[Mapping[str, np.ndarray], int]],
) -> dict[str, np.ndarray]:
    """Concatenate properties of parts, each with its length. Missing properties become NaN."""
    tails = {
        name: values.shape[1:] for properties, _ in parts for name, values in properties.items()
    }
    return {
        name: np.concatenate(
            [
                properties.get(name, np.full((count, *tails[name]), np.nan))
                for properties, count in parts
            ]
        )
        for name in sorted(tails)
    }


class Rows(Protocol):
    """Protocol of random access to structures by index, as in `Store` and `Columns`."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray, *, labels_only: bool = False) -> Columns:
        """Return the structures `indices`, in that order."""
        ...
