"""Hypotheses about the units of a file that explain the ratio of its energies to its forces."""

from __future__ import annotations

import math
from typing import NamedTuple

from ase import units

# Maximum factor between a measured scale and the units that explain it.
MAX_SCALE_FACTOR = 2.5
# Maximum relative deviation of a ratio from the quotient of units that explains it.
MAX_RATIO_DEVIATION = 0.08
_ENERGY = {
    "eV": 1.0,
    "hartree": units.Hartree,
    "kcal/mol": units.kcal / units.mol,
    "kJ/mol": units.kJ / units.mol,
}
# Length unit of forces: conversion factor of a force per Å, and how far-fetched the unit is.
_PER_LENGTH = {"Å": (1.0, 0), "bohr": (units.Bohr, 0), "nm": (10.0, 2)}


class UnitGuess(NamedTuple):
    """Hypothesis about the units of a file.

    Attributes:
      ratio: Ratio ΔE/W that these units cause; NaN if the energies are not considered.
      scale: Factor by which forces are too large in these units.
      far: How far-fetched the hypothesis is; 0 is the simplest.
      words: Hypothesis in words.
    """

    ratio: float
    scale: float
    far: int
    words: str


def describe_guesses(guesses):
    """Return the simplest explanation, and a second one if it is hardly more far-fetched."""
    return ", or ".join(g.words for g in guesses[:2] if g.far <= guesses[0].far + 1)


def energy_and_force_guesses():
    """Return hypotheses about energies and forces.

    Both were read as eV and eV/Å although they had other units, or they were converted although
    they had these units already.
    """
    table = []
    for energy, energy_unit in _ENERGY.items():
        for force, force_unit in _ENERGY.items():
            for length, (per_length, far) in _PER_LENGTH.items():
                simple = (
                    far + (energy != force) + (length != "Å") + 2 * ("eV" not in (energy, force))
                )
                # A force of 1 eV/Å is per_length / force_unit in the other unit.
                table.append(
                    UnitGuess(
                        force_unit / energy_unit / per_length,
                        per_length / force_unit,
                        simple,
                        f"energies were in {energy} and forces in {force}/{length}",
                    )
                )
    for force, factor, far in (
        ("eV/bohr", 1 / units.Bohr, 1),
        ("hartree/bohr", units.Hartree / units.Bohr, 1),
        ("hartree/Å", units.Hartree, 2),
        ("kcal/mol/Å", _ENERGY["kcal/mol"], 2),
        ("kJ/mol/Å", _ENERGY["kJ/mol"], 3),
    ):
        table.append(
            UnitGuess(1 / factor, factor, far, f"forces were converted twice from {force}")
        )
    for unit in ("hartree", "kcal/mol", "kJ/mol"):
        table += [
            UnitGuess(
                1.0, _ENERGY[unit], 2, f"energies and forces were converted twice from {unit}"
            ),
            UnitGuess(_ENERGY[unit], 1.0, 3, f"energies were converted twice from {unit}"),
        ]
    return table


def force_guesses():
    """Return hypotheses about forces only, for data without energies."""
    table = []
    for energy, unit in _ENERGY.items():
        for length, (per_length, far) in _PER_LENGTH.items():
            scale, name = per_length / unit, f"{energy}/{length}"
            far += length == "bohr" and energy not in ("eV", "hartree")
            table += [
                UnitGuess(math.nan, scale, far, f"they were in {name}"),
                UnitGuess(math.nan, 1 / scale, far + 1, f"they were converted twice from {name}"),
            ]
    return table


def near_guesses(ratio, scale):
    """Return all guesses within MAX_RATIO_DEVIATION of the ratio, the simplest first.

    If some of them fit the scale of the forces, only those are returned.
    """
    if not ratio > 0:
        return []
    near = [(abs(math.log(ratio / g.ratio)), g) for g in energy_and_force_guesses()]
    near = [(distance, g) for distance, g in near if distance <= math.log(1 + MAX_RATIO_DEVIATION)]
    if scale > 0:
        near = [
            (d, g) for d, g in near if abs(math.log(scale / g.scale)) <= math.log(MAX_SCALE_FACTOR)
        ] or near
    return [g for _, g in sorted(near, key=lambda entry: (entry[1].far, round(entry[0], 6)))]
