"""Units of energies, lengths, forces and stresses that data files and options of readers state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Self

from ase import units

from mlip_jax.config import ConfigError, unknown_name
from mlip_jax.datasets import options

ENERGY_UNITS = {
    "eV": 1.0,
    "meV": 1e-3,
    "hartree": units.Hartree,
    "Ha": units.Hartree,
    "Eh": units.Hartree,
    "rydberg": units.Rydberg,
    "Ry": units.Rydberg,
    "kcal/mol": units.kcal / units.mol,
    "kJ/mol": units.kJ / units.mol,
}
STRESS_UNITS = {"GPa": units.GPa, "kbar": 1e3 * units.bar, "bar": units.bar, "Pa": units.Pascal}
LENGTH_UNITS = {"Ang": 1.0, "angstrom": 1.0, "Å": 1.0, "bohr": units.Bohr, "nm": 10.0, "pm": 0.01}


# UNITS, PROBLEM_OPTIONS of readers with the options of `FileUnits`, see reader.Reader.
READER_UNITS = {
    "positions": "length_unit (Å)",
    "energy": "energy_unit (eV)",
    "forces": "forces_unit (eV/Å)",
    "stress": "stress_unit (eV/Å³)",
}
READER_PROBLEM_OPTIONS = {
    "units": "forces_unit=hartree/bohr",
    "gradients": "forces_are_gradients=True",
    "positions": "length_unit=bohr",
    "stress": "stress_unit=GPa",
}


@dataclasses.dataclass(frozen=True)
class FileUnits:
    """Factors from the units of a file to eV and Å.

    Attributes:
      energy: Energy unit (eV).
      length: Length unit (Å).
      forces: Factor of the forces (eV/Å), negative if the file has gradients.
    """

    energy: float
    length: float
    forces: float

    @classmethod
    def from_options(
        cls, energy: str, length: str, forces: str, forces_are_gradients: bool
    ) -> Self:
        """Create the factors from options of a reader.

        Args:
          energy: Option energy_unit.
          length: Option length_unit.
          forces: Option forces_unit; "" means the energy unit per length unit.
          forces_are_gradients: Whether the file has the gradient, whose sign is then changed.

        Raises:
          ConfigError: An option is invalid.
        """
        energy_factor = energy_unit(options.text("energy_unit", energy))
        length_factor = length_unit(options.text("length_unit", length))
        forces = options.text("forces_unit", forces)
        force_factor = force_unit(forces) if forces else energy_factor / length_factor
        # Forces are minus the gradient.
        sign = -1 if options.flag("forces_are_gradients", forces_are_gradients) else 1
        return cls(energy_factor, length_factor, sign * force_factor)


def energy_unit(text: str) -> float:
    """Return the value of an energy unit in eV. Raise ConfigError if it is unknown."""
    return _unit(text, ENERGY_UNITS, "energy_unit")


def length_unit(text: str) -> float:
    """Return the value of a length unit in Å. Raise ConfigError if it is unknown."""
    return _unit(text, LENGTH_UNITS, "length_unit")


def force_unit(text: str) -> float:
    """Return the value in eV/Å of a force unit, written as energy/length.

    >>> round(force_unit("kcal/mol/Ang"), 6), round(force_unit("hartree/bohr"), 4)
    (0.043364, 51.4221)
    """
    energy, _, length = text.rpartition("/")
    return _unit(energy, ENERGY_UNITS, "energy in forces_unit") / _unit(
        length, LENGTH_UNITS, "length in forces_unit"
    )


def stress_unit(text: str) -> float:
    """Return the value in eV/Å³ of a unit of stress: GPa, kbar, bar, Pa or energy/length^3.

    >>> round(stress_unit("GPa"), 6), stress_unit("eV/Ang^3")
    (0.006242, 1.0)
    """
    energy, slash, length = text.rpartition("/")
    if not slash:
        return _unit(text, STRESS_UNITS, "stress_unit")
    length = length.removesuffix("^3").removesuffix("³")
    return (
        _unit(energy, ENERGY_UNITS, "energy in stress_unit")
        / _unit(length, LENGTH_UNITS, "length in stress_unit") ** 3
    )


def _unit(text: str, table: Mapping[str, float], option: str) -> float:
    """Look up a unit in a table, ignoring case. Raise ConfigError if it is unknown."""
    for name, value in table.items():
        if name.lower() == text.strip().lower():
            return value
    raise ConfigError(unknown_name(option, text, list(table)))
