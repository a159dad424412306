"""Records of QM9: properties, units and the parser of one molecule."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ase import units

from mlip_jax.datasets.formats.elements import validate_numbers
from mlip_jax.datasets.reader import DatasetError, symbols_to_numbers

_CAL = units.kcal / units.mol / 1000
ATOM_ENERGIES = {
    "H": -0.500273,
    "C": -37.846772,
    "N": -54.583861,
    "O": -75.064579,
    "F": -99.718730,
}  # hartree
BINDING = (-9.0, -0.5)  # plausible binding energies, eV per atom; QM9 has -6 to -3

# Property: (name in line 2 of the archive's files, in extended xyz, in databases; unit in QM9; unit
# in older databases in eV)
FIELDS = {
    "energy": ("U0", "U0", "energy_U0", units.Hartree, 1.0),
    "internal_energy": ("U", "U", "energy_U", units.Hartree, 1.0),
    "enthalpy": ("H", "H", "enthalpy_H", units.Hartree, 1.0),
    "free_energy": ("G", "G", "free_energy", units.Hartree, 1.0),
    "zpve": ("zpve", "zpve", "zpve", units.Hartree, 1.0),
    "homo": ("homo", "epsHOMO", "homo", units.Hartree, 1.0),
    "lumo": ("lumo", "epsLUMO", "lumo", units.Hartree, 1.0),
    "gap": ("gap", "epsgap", "gap", units.Hartree, 1.0),
    "dipole_moment": ("mu", "mu", "dipole_moment", units.Debye, 1.0),
    "polarizability": ("alpha", "alpha", "isotropic_polarizability", units.Bohr**3, 1.0),
    "electronic_spatial_extent": ("r2", "<R2>", "electronic_spatial_extent", units.Bohr**2, 1.0),
    "heat_capacity": ("Cv", "Cv", "heat_capacity", _CAL, _CAL),
    "A": ("A", "A", "rotational_constant_A", 1.0, 1.0),
    "B": ("B", "B", "rotational_constant_B", 1.0, 1.0),
    "C": ("C", "C", "rotational_constant_C", 1.0, 1.0),
}
_LINE_2 = (
    "A",
    "B",
    "C",
    "mu",
    "alpha",
    "homo",
    "lumo",
    "gap",
    "r2",
    "zpve",
    "U0",
    "U",
    "H",
    "G",
    "Cv",
)

LENGTH_UNITS = {
    "ang": 1.0,
    "angstrom": 1.0,
    "å": 1.0,
    "a": 1.0,
    "bohr": units.Bohr,
    "a0": units.Bohr,
}
ENERGY_UNITS = {"ev": 1.0, "ha": units.Hartree, "hartree": units.Hartree, "kcal/mol": 1000 * _CAL}
_DIPOLE = {
    "debye": units.Debye,
    "d": units.Debye,
    "e ang": 1.0,
    "e*ang": 1.0,
    "eang": 1.0,
    "a.u.": units.Bohr,
    "e a0": units.Bohr,
}
UNITS_OF = {
    "dipole_moment": _DIPOLE,
    "heat_capacity": {"cal/mol/k": _CAL, "cal/(mol k)": _CAL, "ev/k": 1.0},
    "A": {"ghz": 1.0},
    "B": {"ghz": 1.0},
    "C": {"ghz": 1.0},
    **{
        name: {
            spelling: factor**power
            for u, factor in LENGTH_UNITS.items()
            for spelling in (f"{u}^{power}", f"{u}**{power}", " ".join([u] * power))
        }
        for name, power in (("polarizability", 3), ("electronic_spatial_extent", 2))
    },
}


def parse_member(content: bytes, index: int, source: str) -> dict[str, Any]:
    """Return the fields of a Structure from one file of the archive.

    Raises:
      DatasetError: The file is truncated, or its index differs from that of its name.
    """
    lines = content.decode("utf-8", "replace").split("\n")
    n = parse_integer(lines[0].strip(), source)
    if len(lines) < n + 5:
        raise DatasetError(
            f"{source}: has {len(lines)} lines, expected {n + 5} for {n} atoms; the file is "
            "truncated. Download it again."
        )
    tag, stated, *values = split_columns(lines[1], len(_LINE_2) + 2, source)
    if tag != "gdb" or parse_integer(stated, source) != index:
        raise DatasetError(
            f"{source}: line 2 begins with {tag!r} {stated!r}, expected 'gdb' and the index {index}"
        )
    by_key = dict(zip(_LINE_2, (parse_number(v, source) for v in values)))
    rows = [split_columns(line, 5, source) for line in lines[2 : n + 2]]
    table = parse_table([row[1:5] for row in rows], source)
    smiles = lines[n + 3].split()
    return structure_fields(
        numbers=symbols_to_numbers((row[0] for row in rows), source),
        positions=table[:, :3].copy(),
        raw={name: by_key[f[0]] for name, f in FIELDS.items()},
        factors={name: f[3] for name, f in FIELDS.items()},
        source=source,
        smiles=smiles[-1] if smiles else "",
        mulliken_charges=table[:, 3].copy(),
        unread=("frequencies",),
    )


def structure_fields(
    *,
    numbers,
    positions,
    raw: dict[str, float],
    factors: dict[str, float | None],
    source: str,
    smiles: str = "",
    mulliken_charges=None,
    unread: Iterable[str] = (),
) -> dict[str, Any]:
    """Return the fields of a Structure from raw values, and "unread": labels that are not read.

    Args:
      numbers: Atomic numbers, shape (n,).
      positions: Positions (Å), shape (n, 3).
      raw: Values of the properties in the units of the file. Missing ones become NaN.
      factors: Conversion factor per property; None if its unit is unknown.
      source: Name of the record, for messages.
      smiles: SMILES, or "".
      mulliken_charges: Mulliken charges (e), shape (n,), or None.
      unread: Names of the labels of the record that are not read.

    Raises:
      DatasetError: The unit of a property is unknown, or the atomic numbers are invalid.
    """
    for name in raw:
        if factors[name] is None:
            raise DatasetError(
                f"{source}: the database has {FIELDS[name][2]}, but its metadata state no unit for "
                "it"
            )
    values = {name: raw[name] * factors[name] if name in raw else float("nan") for name in FIELDS}
    energy = values.pop("energy")
    rotational = np.array([values.pop(axis) for axis in "ABC"])
    return dict(
        numbers=validate_numbers(numbers, source),
        positions=positions,
        energy=energy,
        smiles=smiles,
        properties=values | {"rotational_constants": rotational},
        atom_properties={} if mulliken_charges is None else {"mulliken_charges": mulliken_charges},
        unread=sorted(unread),
    )


def binding_energy(energy: float, numbers: np.ndarray) -> float:
    """Return the energy relative to the isolated atoms (eV per atom).

    It is NaN for elements that QM9 does not contain.
    """
    by_number = {1: "H", 6: "C", 7: "N", 8: "O", 9: "F"}
    atoms = (
        sum(ATOM_ENERGIES.get(by_number.get(z), np.nan) for z in numbers.tolist()) * units.Hartree
    )
    return (energy - atoms) / max(1, len(numbers))


def unit_factor(name: str, unit: Any, known: dict[str, float], path: Path) -> float:
    """Return the conversion factor of a unit. Raise DatasetError if it is not one of `known`."""
    factor = known.get(" ".join(str(unit).lower().split()))
    if factor is None:
        raise DatasetError(
            f"{path}: the unit of {name} is {unit!r}, expected one of {', '.join(known)}"
        )
    return factor


def comment_fields(line: str) -> dict[str, str]:
    """Return the key=value pairs of the comment line of extended xyz."""
    # possessive (++), and only from the start of a word, so that the time is linear
    pairs = re.findall(r'(?<![^\s=])([^\s=]++)=("[^"]*"|\S*)', line)
    return {key: value.strip('"') for key, value in pairs}


def split_columns(line: str, count: int, source: str) -> list[str]:
    """Split a line into `count` words. Raise DatasetError if their number differs."""
    words = line.split()
    if len(words) != count:
        raise DatasetError(
            f"{source}: expected {count} columns, found {len(words)}: {line.strip()[:120]!r}"
        )
    return words


def parse_number(text: str, source: str) -> float:
    """Parse a number, also in Mathematica's format: 1.2*^-6."""
    try:
        return float(text.replace("*^", "e"))
    except ValueError as error:
        raise DatasetError(f"{source}: {text!r} is not a number") from error


def parse_integer(text: str, source: str) -> int:
    """Parse a number of atoms or an index."""
    if not text.isdecimal():
        raise DatasetError(f"{source}: expected a number of atoms or an index, found {text[:60]!r}")
    return int(text)


def parse_table(rows: list[list[str]], source: str) -> np.ndarray:
    """Parse rows of numbers into a float64 array, shape (rows, columns)."""
    return np.array(
        [[parse_number(word, source) for word in row] for row in rows], np.float64
    ).reshape(len(rows), -1)
