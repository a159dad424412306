"""Reference and predicted energies and forces of one split, with labels to group the errors."""

import dataclasses
import functools
import os
from pathlib import Path

import numpy as np

from mlip_jax.files import NUMPY_ERRORS
from mlip_jax.foreign_files.archives import open_npz
from mlip_jax.workdir import atomic_open


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """Labels and predictions of one split: S structures with A atoms in total.

    Structure `s` has the atoms `offsets[s]:offsets[s + 1]`. Missing labels are NaN, and all
    functions that use predictions ignore them. If the label is finite but the *prediction* is not,
    the model has failed; `errors.summary` counts such predictions.

    Attributes:
      numbers: Atomic numbers from 1 to 118, (A,).
      offsets: Index of the first atom of each structure, and A at the end, (S + 1,).
      energy: Reference total energies in eV, (S,) float64.
      energy_predicted: Predicted total energies in eV, (S,) float64.
      forces: Reference forces in eV/Å, (A, 3).
      forces_predicted: Predicted forces in eV/Å, (A, 3).
      molecule: Name or SMILES, (S,). Structures with the same name are conformations of one
        molecule.
      conformer: Index of the conformation within its molecule, (S,).
      subset: Subset of the data set that the structure belongs to, (S,).
      source: Origin of the labels, (S,).
      stress: Reference stress in eV/Å³, (S, 3, 3), or None.
      stress_predicted: Predicted stress in eV/Å³, (S, 3, 3), or None.

    Raises:
      ValueError: Shapes or values are inconsistent.
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
    stress: np.ndarray | None = None
    stress_predicted: np.ndarray | None = None

    def __post_init__(self):
        for name, kind in _KINDS.items():
            # The constructor of a frozen dataclass can only set attributes this way.
            object.__setattr__(self, name, _convert(name, getattr(self, name), kind))
        _check_offsets(self.offsets, self.numbers)
        if self.numbers.size and not (1 <= self.numbers.min() and self.numbers.max() <= 118):
            raise ValueError(
                "numbers: must be atomic numbers from 1 to 118, received values from "
                f"{self.numbers.min()} to {self.numbers.max()}. Remove padding atoms first."
            )
        per_structure, per_atom = (self.num_structures,), (self.num_atoms, 3)
        for name in _KINDS:
            expected = per_atom if name.startswith("forces") else per_structure
            actual = getattr(self, name).shape
            if name not in ("numbers", "offsets") and actual != expected:
                raise ValueError(
                    f"{name}: expected shape {expected} for {self.num_structures} structures with "
                    f"{self.num_atoms} atoms (from offsets), received {actual}"
                )
        for name in _OPTIONAL:
            value = getattr(self, name)
            if value is not None and np.shape(value) != (self.num_structures, 3, 3):
                raise ValueError(
                    f"{name}: expected shape {(self.num_structures, 3, 3)}, received "
                    f"{np.shape(value)}"
                )

    @property
    def num_structures(self) -> int:
        """Number of structures, S."""
        return self.offsets.size - 1

    @property
    def num_atoms(self) -> int:
        """Total number of atoms, A."""
        return self.numbers.size

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Number of atoms of each structure, (S,)."""
        return np.diff(self.offsets)

    @functools.cached_property
    def structure_of_atom(self) -> np.ndarray:
        """Index of the structure that each atom belongs to, (A,)."""
        return np.repeat(np.arange(self.num_structures), self.sizes)

    def save(self, path: str | os.PathLike) -> Path:
        """Write one npz file (without pickled objects) atomically, and return its path."""
        path = Path(path)
        with atomic_open(path, shared=True) as file:
            arrays = {name: getattr(self, name) for name in (*_KINDS, *_OPTIONAL)}
            np.savez(file, **{name: x for name, x in arrays.items() if x is not None})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Predictions":
        """Load a file that `save` wrote.

        Raises:
          FileNotFoundError: The file does not exist.
          ValueError: The file is not an npz file, contains pickled objects, or lacks an array.
        """
        try:
            with open_npz(path) as file:
                missing = sorted(set(_KINDS) - set(file.files))
                if missing:
                    raise ValueError(
                        f"missing arrays {missing}; the file contains {sorted(file.files)}"
                    )
                names = [*_KINDS, *(name for name in _OPTIONAL if name in file.files)]
                return cls(**{name: file[name] for name in names})
        except FileNotFoundError:
            raise
        except NUMPY_ERRORS as error:
            raise ValueError(f"{path}: not a valid file of predictions: {error}") from error


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
_OPTIONAL = ("stress", "stress_predicted")


def _convert(name: str, value, kind: type) -> np.ndarray:
    """Convert to an array of the given kind; floats are never converted to integers."""
    array = np.asarray(value)
    # NumPy converts any empty list to float64.
    if kind is np.int64 and array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name}: must contain integers, received dtype {array.dtype}")
    if kind is np.float64 and array.size and array.dtype.kind not in "fiu":
        raise ValueError(f"{name}: must contain real numbers, received dtype {array.dtype}")
    return array.astype(kind)


def _check_offsets(offsets: np.ndarray, numbers: np.ndarray) -> None:
    """Raise ValueError unless the offsets divide the atoms into non-empty structures."""
    if numbers.ndim != 1:
        raise ValueError(f"numbers: expected shape (atoms,), received {numbers.shape}")
    if offsets.ndim != 1 or offsets.size < 1:
        raise ValueError(f"offsets: expected shape (structures + 1,), received {offsets.shape}")
    if offsets[0] != 0 or offsets[-1] != numbers.size:
        raise ValueError(
            f"offsets: must start at 0 and end at the number of atoms, {numbers.size}; received "
            f"{offsets[0]} to {offsets[-1]}"
        )
    empty = np.flatnonzero(np.diff(offsets) < 1)
    if empty.size:
        s = empty[0]
        raise ValueError(
            f"offsets: every structure must have at least one atom, but structure {s} has the "
            f"atoms {offsets[s]} to {offsets[s + 1]} (exclusive)"
        )
