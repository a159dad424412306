"""Predictions of one or several force fields for many structures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlip_jax.foreign_files.archives import open_npz
from mlip_jax.workdir import atomic_open


@dataclasses.dataclass(frozen=True)
class StructurePredictions:
    """Predictions for S structures with A atoms. Fields that do not apply are None.

    Attributes:
      n_atoms: Number of atoms, (S,).
      energy: Total energies including the reference energies (eV), (S,).
      forces: Forces (eV/Å), (A, 3).
      stress: Stress (eV/Å³), (S, 3, 3); NaN for structures that are not periodic in three
        directions. None if no structure is, or a member has no stress.
      charges: Partial charges (e), (A,), if all members predict them.
      energy_std: Standard deviation of the energy over the members (eV), (S,).
      forces_std: Standard deviations of the forces over the members (eV/Å), (A, 3).
      energy_expected_error: Expected error of the energy (eV), (S,).
      forces_expected_error: Expected error of the force components (eV/Å), (A,).
      domain_distance: Distance of the atoms from the training atoms, (A,); 1 at the boundary of the
        domain.
      unseen: Whether charge, spin or periodicity of the structure never occurs in training, (S,).
    """

    n_atoms: np.ndarray
    energy: np.ndarray
    forces: np.ndarray
    stress: np.ndarray | None = None
    charges: np.ndarray | None = None
    energy_std: np.ndarray | None = None
    forces_std: np.ndarray | None = None
    energy_expected_error: np.ndarray | None = None
    forces_expected_error: np.ndarray | None = None
    domain_distance: np.ndarray | None = None
    unseen: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.energy)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """Index of the first atom of each structure, then A; (S + 1,)."""
        return np.concatenate([[0], np.cumsum(self.n_atoms)]).astype(np.int64)

    @functools.cached_property
    def farthest(self) -> np.ndarray | None:
        """Distance of the farthest atom of each structure from the training atoms, (S,), or None.

        It is inf if a distance is not a number.
        """
        if self.domain_distance is None:
            return None
        distance = np.where(np.isnan(self.domain_distance), np.inf, self.domain_distance)
        return np.maximum.reduceat(distance, self.offsets[:-1]) if len(self) else np.zeros(0)

    @property
    def outside_domain(self) -> np.ndarray | None:
        """Whether an atom of each structure is outside the domain, or it is `unseen`; (S,) or None.

        None without a domain, unless a structure is `unseen`.
        """
        if self.farthest is None:
            return self.unseen if self.unseen is not None and self.unseen.any() else None
        return self.farthest > 1 if self.unseen is None else (self.farthest > 1) | self.unseen

    @classmethod
    def concatenate(cls, parts: Sequence[StructurePredictions]) -> StructurePredictions:
        """Concatenate predictions; a part without stress gets NaN if another has stress."""
        fields = {}
        for name in _FIELDS:
            values = [getattr(part, name) for part in parts]
            if name == "stress" and any(v is not None for v in values):
                values = [
                    np.full((len(part), 3, 3), np.nan) if v is None else v
                    for part, v in zip(parts, values)
                ]
            fields[name] = None if any(v is None for v in values) else np.concatenate(values)
        return cls(**fields)

    def save(self, path: Path, **more: np.ndarray) -> None:
        """Write an npz file, with further arrays."""
        arrays = {name: getattr(self, name) for name in _FIELDS if getattr(self, name) is not None}
        with atomic_open(path, shared=True) as file:
            np.savez(file, **arrays, **more)

    @classmethod
    def load(cls, path: Path) -> tuple[StructurePredictions, dict[str, np.ndarray]]:
        """Load a file that `save` wrote; also return the further arrays."""
        with open_npz(path) as file:
            arrays = {name: file[name] for name in file.files}
        own = {name: arrays.pop(name) for name in _FIELDS if name in arrays}
        return cls(**own), arrays


_FIELDS = tuple(field.name for field in dataclasses.fields(StructurePredictions))
