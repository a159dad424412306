"""Stress labels: ASE's sign and eV/Å³, from stresses and virials under their usual names.

The stress is the derivative of the energy with respect to the strain divided by the volume; it
is positive under tension. The virial is minus the stress times the volume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mlip_jax.config import ConfigError
from mlip_jax.datasets import file_units, options
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.state_labels import plain_name

# STRESS: name of the property of structures, (3, 3) in eV/Å³, NaN if unknown.
STRESS = "stress"
# NO_STRESS: value of the reader option stress_key that ignores the stress.
NO_STRESS = "none"
_VIRIALS = ("virial", "virials")
# Rows and columns of the components xx, yy, zz, yz, xz, xy, in ASE's order.
_ROWS, _COLUMNS = (0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)


def stress_names(labels: Iterable[str]) -> list[str]:
    """Return the names of labels that contain a stress or a virial, stresses first.

    >>> stress_names(["energy", "virials", "REF_stress"])
    ['REF_stress', 'virials']
    """
    usual = [name for name in labels if plain_name(name) in (STRESS, *_VIRIALS)]
    return sorted(usual, key=is_virial)


def check_property_names(names: Iterable[str]) -> None:
    """Raise ConfigError if a stress is requested as a property.

    It would be read as it is in the file, without its unit and sign, and loss.stress would use it.
    """
    if STRESS in names:
        raise ConfigError(
            f"property_keys contains {STRESS!r}, which is the name of the stress that loss.stress "
            f"uses, in eV/Å³ and with ASE's sign. Remove it: the option stress_key={STRESS} reads "
            "it, with stress_unit and stress_sign_reversed"
        )


def chosen_stress(names: Sequence[str], source: str) -> str:
    """Return the only name of a stress.

    Raises:
      DatasetError: There are several.
    """
    if len(names) > 1:
        raise DatasetError(
            f"{source}: contains several stresses: {', '.join(names)}. Choose one, "
            f"{options.as_flag('stress_key', names[0])}, or none, "
            f"{options.as_flag('stress_key', NO_STRESS)}."
        )
    return names[0]


def common_stress(stresses: Mapping[str, np.ndarray], source: str) -> np.ndarray:
    """Return the stress (eV/Å³), (3, 3), on which the labels of a structure agree, or NaN.

    Args:
      stresses: Stresses (eV/Å³), (3, 3), by the names of their labels.
      source: File and record, for messages.

    Raises:
      DatasetError: The labels differ.
    """
    first, *others = stresses.values() or [unknown_stress()]
    if any(not np.allclose(first, other, rtol=1e-3, atol=1e-6) for other in others):
        chosen_stress(list(stresses), source)
    return first


def is_virial(name: str) -> bool:
    """Return whether the label with this name is a virial rather than a stress."""
    return plain_name(name) in _VIRIALS


def stress_labels(columns: Columns) -> np.ndarray | None:
    """Return the stresses of structures (eV/Å³), (S, 3, 3), or None if there are none."""
    stress = columns.properties.get(STRESS)
    return stress if stress is not None and stress.shape[1:] == (3, 3) else None


def complete_stress(columns: Columns) -> Columns:
    """Return the structures with a stress, which is NaN where it is missing.

    Batches without structures, and shards without stresses, lack this property.
    """
    if STRESS in columns.properties:
        return columns
    unknown = {STRESS: np.full((len(columns), 3, 3), np.nan)}
    return dataclasses.replace(columns, properties={**columns.properties, **unknown})


def unknown_stress() -> np.ndarray:
    """Return the property of a structure without a stress, (3, 3)."""
    return np.full((3, 3), np.nan)


def stress_matrix(value: Any, name: str, source: str) -> np.ndarray:
    """Return a symmetric matrix from 3x3, nine or six numbers (xx, yy, zz, yz, xz, xy).

    Raises:
      DatasetError: The label has another shape or is not symmetric.
    """
    try:
        numbers = np.asarray(value, np.float64).ravel()
    except (TypeError, ValueError) as error:
        raise DatasetError(f"{source}: {name!r} is not numeric ({error})") from error
    if numbers.size == 6:
        matrix = np.zeros((3, 3))
        matrix[_ROWS, _COLUMNS] = matrix[_COLUMNS, _ROWS] = numbers
        return matrix
    if numbers.size != 9:
        raise DatasetError(
            f"{source}: {name!r} has shape {np.shape(value)}, expected six or nine numbers"
        )
    matrix = numbers.reshape(3, 3)
    if np.abs(matrix - matrix.T).max() > 1e-2 * np.abs(matrix).max() + 1e-9:
        raise DatasetError(f"{source}: {name!r} is not symmetric: {matrix.tolist()}")
    return 0.5 * (matrix + matrix.T)


def same_stress(name: str, source: str, a: Any, b: Any) -> bool:
    """Return whether two labels are one stress, in six or in nine numbers."""
    a, b = (stress_matrix(value, name, source) for value in (a, b))
    return np.allclose(a, b, rtol=1e-6, atol=1e-9)


@dataclasses.dataclass(frozen=True)
class StressConversion:
    """Conversion of the stresses and virials of a file to ASE's sign and eV/Å³.

    Attributes:
      stress: Factor of stresses, which includes a change of the sign (eV/Å³).
      virial: Factor of virials, likewise (eV).
    """

    stress: float
    virial: float

    @classmethod
    def from_options(
        cls, stress_unit: str, stress_sign_reversed: bool, energy: float, length: float
    ) -> StressConversion:
        """Return the conversion of the options of a reader.

        Args:
          stress_unit: Option of this name; "" means energy/length³.
          stress_sign_reversed: Option of this name.
          energy: Unit of energies in the file (eV).
          length: Unit of lengths in the file (Å).

        Raises:
          ConfigError: An option is invalid.
        """
        unit = options.text("stress_unit", stress_unit)
        factor = file_units.stress_unit(unit) if unit else energy / length**3
        sign = -1 if options.flag("stress_sign_reversed", stress_sign_reversed) else 1
        return cls(sign * factor, sign * energy)

    def convert(self, value: Any, name: str, cell: np.ndarray, source: str) -> np.ndarray:
        """Return the stress (eV/Å³), (3, 3), of a label of a structure.

        Args:
          value: Stress, or virial if `name` is that of a virial.
          name: Name of the label.
          cell: Lattice vectors (Å), (3, 3).
          source: File and record, for messages.

        Raises:
          DatasetError: See `stress_matrix`.
        """
        matrix = stress_matrix(value, name, source)
        if is_virial(name):
            return -self.virial * matrix / abs(np.linalg.det(cell))
        return self.stress * matrix
