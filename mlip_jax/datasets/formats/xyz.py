"""Frames of XYZ and extended XYZ: parsing of one frame, and labels in its comment line.

ASE parses the frames. In addition, this module reads symbols such as "D", "6" and "C0", and the
energies (hartree) that CREST, xtb and ORCA write into the comment line without a name:

    -12.3456789                                        CREST, also "-12.3456789 !CONF1"
    energy: -5.070544 gnorm: 0.000057 xtb: 6.7.1       xtb
    Coordinates from ORCA-job water E -76.323          ORCA
"""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols

from mlip_jax.datasets.text_files import BOM, READ_ERRORS, open_bytes

# Symbols of the isotopes of hydrogen, and their masses (amu).
_ISOTOPES = {"D": 2.01410178, "T": 3.01604928}
_NUMBERED = re.compile(r"([A-Za-z]{1,2})\d+")
# Possessive (++), and only from the start of a word, so that the time is linear.
_KEY = re.compile(rb'((?<![^\s="])[^\s="]++|"[^"]++")\s*+=')
_NUMBER = r"(-?\d+\.\d+(?:[eE][+-]?\d+)?)"
_LONGEST_ENERGY = 1000  # characters of a comment that states an energy
_ENERGIES = (
    re.compile(rf"\s*(?=-){_NUMBER}(?:\s+!\S+)?\s*"),
    re.compile(rf"\s*energy:\s*{_NUMBER}\b.*"),
    re.compile(rf".*\bORCA\b.*\bE\s+{_NUMBER}\s*"),
)


class XyzFrame(NamedTuple):
    """One frame of an XYZ file.

    Attributes:
      atoms: Atoms with their labels.
      comment_energy: Energy (hartree) of a comment line of CREST, xtb or ORCA; None for others.
    """

    atoms: Atoms
    comment_energy: float | None = None


def parse_frame(text: str, format: str = "extxyz") -> XyzFrame:
    """Parse a frame. Errors are those of ASE, which raises exceptions of any type.

    Args:
      text: Number of atoms, comment line and atoms.
      format: ASE's name of the format, "extxyz" or "xyz".
    """
    from ase.io import read

    text = text.removeprefix(BOM.decode())
    try:
        atoms = read(io.StringIO(text), format=format)
    except KeyError:  # an unknown symbol
        text, masses = _with_known_symbols(text)
        atoms = read(io.StringIO(text), format=format)
        if masses and not atoms.has("masses"):
            atoms.set_masses([masses.get(i, m) for i, m in enumerate(atoms.get_masses())])
    comment = text.split("\n", 2)[1]
    if "=" not in comment:
        atoms.info.clear()  # ASE stores each word of the comment as a label
        return XyzFrame(atoms, comment_energy(comment))
    return XyzFrame(atoms)


def comment_energy(comment: str) -> float | None:
    """Return the energy (hartree) in a comment line of CREST, xtb or ORCA, None for other lines.

    >>> comment_energy("   -12.25 !CONF3"), comment_energy("frame 2, 0.5 ps")
    (-12.25, None)
    """
    if len(comment) > _LONGEST_ENERGY:
        return None
    match = next(filter(None, (pattern.fullmatch(comment) for pattern in _ENERGIES)), None)
    return float(match[1]) if match else None


def label_names(comment: bytes) -> list[str]:
    """Return the names of the labels of a frame from its comment line."""
    names = [key.strip(b'"').decode("utf-8", "replace") for key in _KEY.findall(comment)]
    columns = re.search(rb'Properties\s*=\s*"?([^\s"]+)', comment)
    if columns:
        names += columns[1].decode("utf-8", "replace").split(":")[::3]
    return names


def is_xyz(path: Path) -> bool:
    """Return whether a file begins like XYZ.

    It must have a number of atoms, a comment, and one line per atom with a symbol and at least
    three numbers. It can be compressed and begin with a byte-order mark.
    """
    try:
        with open_bytes(path) as file:
            first = file.readline(50).removeprefix(BOM)
            if not first.strip().isdigit() or not 0 < int(first) < 10_000_000:
                return False
            file.readline(1 << 20)
            for _ in range(min(int(first), 20)):
                cells = file.readline(10_000).split()
                if len(cells) < 4:
                    return False
            return sum(_is_number(c) for c in cells) >= 3
    except READ_ERRORS:
        return False


def _with_known_symbols(text: str) -> tuple[str, dict[int, float]]:
    """Return a frame with ASE's symbols, and the mass (amu) of each atom of D and T by index."""
    head, comment, *rows = text.split("\n")
    columns = re.search(r'Properties\s*=\s*"?([^\s"]+)', comment)
    column = 0
    if columns:
        fields = columns[1].split(":")
        widths = dict(zip(fields[::3], np.cumsum([0, *map(int, fields[2::3])]).tolist()))
        column = widths.get("species", 0)
    masses = {}
    for i in range(min(int(head), len(rows))):
        cells = rows[i].split()
        if len(cells) > column:
            symbol = cells[column]
            if symbol in _ISOTOPES:
                masses[i] = _ISOTOPES[symbol]
            cells[column] = _known_symbol(symbol)
            rows[i] = " ".join(cells)
    return "\n".join([head, comment, *rows]), masses


def _known_symbol(symbol: str) -> str:
    """Return ASE's symbol for an isotope of hydrogen, an atomic number or a numbered atom.

    >>> [_known_symbol(s) for s in ("D", "6", "C0", "cl12", "Q")]
    ['H', 'C', 'C', 'Cl', 'Q']
    """
    if symbol in _ISOTOPES:
        return "H"
    if symbol.isdecimal() and 0 < int(symbol) < len(chemical_symbols):
        return chemical_symbols[int(symbol)]
    match = _NUMBERED.fullmatch(symbol)
    known = match and match[1].capitalize() in atomic_numbers
    return match[1].capitalize() if known else symbol


def _is_number(text: bytes) -> bool:
    """Return whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
