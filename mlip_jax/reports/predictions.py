"""Reference and predicted energies and forces of one split, with what is needed to group the errors."""

import dataclasses
import functools
import os
import zipfile
from pathlib import Path

import numpy as np

from mlip_jax.workdir import atomic_open


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """Labels and predictions of one split: S structures with A atoms in total.

    Structure `s` has the atoms `offsets[s]:offsets[s + 1]`. A label that is missing is NaN; everything that works on
    predictions leaves it out. A *prediction* that is not finite where there is a label is a failure of the model,
    which `errors.summary` counts.

    Attributes:
      numbers: (A,) atomic numbers, 1 to 118.
      offsets: (S + 1,) first atom of each structure, and A at the end.
      energy: (S,) total energies in eV, float64.
      energy_predicted: (S,) total energies in eV, float64.
      forces: (A, 3) in eV/Å.
      forces_predicted: (A, 3) in eV/Å.
      molecule: (S,) name or SMILES; structures with the same name are conformations of one molecule.
      conformer: (S,) index of the conformation within its molecule.
      subset: (S,) part of the data set that the structure belongs to.
      source: (S,) where the labels come from.

    Raises:
      ValueError: where shapes or values do not fit together.
    """

    numbers: np.ndarray
    offsets: np.ndarray
    energy: np.ndarray
    energy_predicted: np.ndarray
    forces: np.ndarray
    forces_predicted: np.ndarray
    molecule: np.ndarray
    conformer: np.ndarray
    subset: np.ndarray
    source: np.ndarray

    def __post_init__(self):
        for name, kind in _KINDS.items():
            # A frozen dataclass lets its own constructor convert only this way.
            object.__setattr__(self, name, _convert(name, getattr(self, name), kind))
        _check_offsets(self.offsets, self.numbers)
        if self.numbers.size and not (1 <= self.numbers.min() and self.numbers.max() <= 118):
            raise ValueError(
                f"numbers must be atomic numbers from 1 to 118, but go from {self.numbers.min()} to "
                f"{self.numbers.max()}; padding atoms must be removed first."
            )
        per_structure, per_atom = (self.num_structures,), (self.num_atoms, 3)
        for name in _KINDS:
            expected = per_atom if name.startswith("forces") else per_structure
            actual = getattr(self, name).shape
            if name not in ("numbers", "offsets") and actual != expected:
                raise ValueError(
                    f"{name} must have shape {expected} for {self.num_structures} structures with {self.num_atoms} "
                    f"atoms (from offsets), but has shape {actual}."
                )

    @property
    def num_structures(self) -> int:
        return self.offsets.size - 1

    @property
    def num_atoms(self) -> int:
        return self.numbers.size

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """(S,) number of atoms of each structure."""
        return np.diff(self.offsets)

    @functools.cached_property
    def structure_of_atom(self) -> np.ndarray:
        """(A,) index of the structure that each atom belongs to."""
        return np.repeat(np.arange(self.num_structures), self.sizes)

    def save(self, path: str | os.PathLike) -> Path:
        """Writes one npz file (no pickled objects) atomically, and returns its path."""
        path = Path(path)
        with atomic_open(path, shared=True) as file:
            np.savez(file, **{name: getattr(self, name) for name in _KINDS})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Predictions":
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: if the file is no npz file, holds pickled objects, or lacks an array.
        """
        try:
            # Opened here, because NumPy leaves a damaged file open.
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                missing = sorted(set(_KINDS) - set(file.files))
                if missing:
                    raise ValueError(f"lacks the arrays {missing}, has {sorted(file.files)}.")
                return cls(**{name: file[name] for name in _KINDS})
        # NumPy hands a single array back where an npz was expected: it has no context manager and no names.
        except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} does not hold predictions: {error}") from error


_KINDS = {
    "numbers": np.int64,
    "offsets": np.int64,
    "energy": np.float64,
    "energy_predicted": np.float64,
    "forces": np.float64,
    "forces_predicted": np.float64,
    "molecule": np.str_,
    "conformer": np.int64,
    "subset": np.str_,
    "source": np.str_,
}


def _convert(name: str, value, kind: type) -> np.ndarray:
    """As an array of the kind; integers are never made from fractions."""
    array = np.asarray(value)
    # An empty list is float64 for NumPy, whatever was meant.
    if kind is np.int64 and array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integers, but has dtype {array.dtype}.")
    if kind is np.float64 and array.size and array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must hold real numbers, but has dtype {array.dtype}.")
    return array.astype(kind)


def _check_offsets(offsets: np.ndarray, numbers: np.ndarray) -> None:
    """Raises ValueError unless the offsets cut the atoms into structures of at least one atom."""
    if numbers.ndim != 1:
        raise ValueError(f"numbers must have shape (atoms,), but has shape {numbers.shape}.")
    if offsets.ndim != 1 or offsets.size < 1:
        raise ValueError(f"offsets must have shape (structures + 1,), but has shape {offsets.shape}.")
    if offsets[0] != 0 or offsets[-1] != numbers.size:
        raise ValueError(
            f"offsets must go from 0 to the number of atoms, {numbers.size}, but go from {offsets[0]} to {offsets[-1]}."
        )
    empty = np.flatnonzero(np.diff(offsets) < 1)
    if empty.size:
        s = empty[0]
        raise ValueError(
            f"Every structure needs at least one atom, but structure {s} goes from atom {offsets[s]} to "
            f"{offsets[s + 1]}."
        )
