"""Total charges of molecules: from a label, from SMILES, or from ASE's initial charges of the atoms."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

_BRACKET = re.compile(r"\[([^\]]*)\]")
_CHARGE = re.compile(r"([+]+|-+)(\d*)(?::\d+)?$")
_TOLERANCE = 1e-3  # e


def total_charge(label: Any, smiles: str, initial: float) -> float:
    """Return the label if it is a number other than NaN, else the charge of the SMILES, else the sum of ASE's initial
    charges if it is whole, else 0; in e.

    The charges of atoms are often partial charges of a method, whose sum is not a total charge.

    Args:
      label: Value that a file gives for the total charge; of any type.
      smiles: SMILES of the molecule, or "".
      initial: Sum of the initial charges.
    """
    if isinstance(label, int | float | np.integer | np.floating) and not math.isnan(label):
        return float(label)
    if smiles:
        return float(charge_from_smiles(smiles))
    return whole_charge(initial) or 0.0


def whole_charge(charge: float) -> float | None:
    """Return the whole number within 0.001 of a charge, or None."""
    return float(round(charge)) if math.isfinite(charge) and abs(charge - round(charge)) <= _TOLERANCE else None


def charge_from_smiles(smiles: str) -> int:
    """Return the total charge: the sum of the formal charges of the bracket atoms.

    >>> charge_from_smiles("[H:3][N+:1]([H:4])([H:5])[C:2](=[O:6])[O-:7]"), charge_from_smiles("[Ca++].[Cl-]")
    (0, 1)
    """
    total = 0
    for atom in _BRACKET.findall(smiles):
        match = _CHARGE.search(atom)
        if match:
            signs, digits = match.groups()
            total += (1 if signs[0] == "+" else -1) * (int(digits) if digits else len(signs))
    return total
