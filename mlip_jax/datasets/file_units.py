"""Units of energies, lengths, forces and stresses that data files and options of readers state."""

from __future__ import annotations

from collections.abc import Mapping

from ase import units

from mlip_jax.config import ConfigError, unknown_name

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
