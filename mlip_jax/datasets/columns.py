"""Columns: many structures as a few long arrays, the form that batches are built from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from mlip_jax.structure import Structure


@dataclasses.dataclass(frozen=True)
class Columns:
    """Structures end to end; structure s owns the atoms offsets[s]:offsets[s + 1].

    Attributes:
      numbers: (A,) int32. positions, forces: (A, 3) float64, Å and eV/Å, NaN where a force is unknown.
      offsets: (S + 1,) int64. energy, charge: (S,) float64, eV and e.
      molecule, subset, source: (S,) str. conformer: (S,) int64.
      cell: (S, 3, 3) float64 in Å and pbc: (S, 3) bool, or None if nothing is periodic.
    """

    numbers: np.ndarray
    positions: np.ndarray
    forces: np.ndarray
    offsets: np.ndarray
    energy: np.ndarray
    charge: np.ndarray
    molecule: np.ndarray
    conformer: np.ndarray
    subset: np.ndarray
    source: np.ndarray
    cell: np.ndarray | None = None
    pbc: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.energy)

    @property
    def n_atoms(self) -> np.ndarray:
        """Atoms of each structure, shape (S,)."""
        return np.diff(self.offsets)

    @classmethod
    def from_structures(cls, structures: Iterable[Structure]) -> Columns:
        """Columns of an iterable of structures; missing forces become NaN."""
        items = list(structures)
        periodic = any(s.pbc is not None for s in items)

        def per_structure(name, dtype):
            return np.array([getattr(s, name) for s in items], dtype)

        def per_atom(arrays, tail, dtype):
            arrays = list(arrays)
            return np.concatenate(arrays).astype(dtype) if arrays else np.zeros((0, *tail), dtype)

        return cls(
            numbers=per_atom((s.numbers for s in items), (), np.int32),
            positions=per_atom((s.positions for s in items), (3,), np.float64),
            forces=per_atom((np.full((len(s), 3), np.nan) if s.forces is None else s.forces for s in items),
                            (3,), np.float64),
            offsets=np.concatenate([[0], np.cumsum([len(s) for s in items])]).astype(np.int64),
            energy=per_structure("energy", np.float64), charge=per_structure("charge", np.float64),
            molecule=per_structure("molecule", np.str_), conformer=per_structure("conformer", np.int64),
            subset=per_structure("subset", np.str_), source=per_structure("source", np.str_),
            cell=np.array([np.zeros((3, 3)) if s.cell is None else s.cell for s in items]) if periodic else None,
            pbc=np.array([np.zeros(3, bool) if s.pbc is None else s.pbc for s in items]) if periodic else None)

    def __getitem__(self, s: int) -> Structure:
        atoms = slice(self.offsets[s], self.offsets[s + 1])
        periodic = self.pbc is not None and self.pbc[s].any()
        return Structure(
            numbers=self.numbers[atoms], positions=self.positions[atoms], forces=self.forces[atoms],
            energy=float(self.energy[s]), charge=float(self.charge[s]),
            cell=self.cell[s] if periodic else None, pbc=self.pbc[s] if periodic else None,
            molecule=str(self.molecule[s]), conformer=int(self.conformer[s]),
            subset=str(self.subset[s]), source=str(self.source[s]))

    def __iter__(self) -> Iterator[Structure]:
        return (self[s] for s in range(len(self)))

    def take(self, indices: np.ndarray) -> Columns:
        """The structures `indices`, in that order."""
        indices = np.asarray(indices, np.int64)
        atoms = self.atoms_of(indices)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("numbers", "positions", "forces"):
            fields[name] = fields[name][atoms]
        for name in ("energy", "charge", "molecule", "conformer", "subset", "source", "cell", "pbc"):
            if fields[name] is not None:
                fields[name] = fields[name][indices]
        fields["offsets"] = np.concatenate([[0], np.cumsum(self.n_atoms[indices])]).astype(np.int64)
        return Columns(**fields)

    def atoms_of(self, indices: np.ndarray) -> np.ndarray:
        """Rows of the atom arrays that belong to the structures `indices`, in that order."""
        counts = self.n_atoms[indices]
        starts = np.repeat(self.offsets[:-1][indices] - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
        return starts + np.arange(counts.sum())
