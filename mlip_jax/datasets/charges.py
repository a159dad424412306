"""Total charges and unpaired electrons of molecules, from SMILES or initial charges.

Labels of charge and spin in files are read by `mlip_jax.state_labels`.
"""

from __future__ import annotations

import math
import re

import numpy as np

from mlip_jax.datasets.columns import Columns

_BRACKET = re.compile(r"\[([^\]]*)\]")
_CHARGE = re.compile(r"([+]+|-+)(\d*)(?::\d+)?$")
_TOLERANCE = 1e-3  # maximum distance to a whole number (e)


def total_charge(label: float | None, smiles: str, initial: float) -> float:
    """Return the total charge of a molecule in e.

    The sources are tried in this order: the label; the SMILES; the sum of ASE's initial charges, if
    it is a whole number. If all of them fail, the charge is 0. Initial charges are often partial
    charges, whose sum is not a total charge.

    Args:
      label: Total charge in the file, from `state_labels.find_charge`, or None.
      smiles: SMILES of the molecule, or "" if unknown.
      initial: Sum of the initial charges of the atoms (e).
    """
    if label is not None and not math.isnan(label):
        return float(label)
    if smiles:
        return float(charge_from_smiles(smiles))
    return whole_charge(initial) or 0.0


def has_odd_electrons(columns: Columns) -> np.ndarray:
    """Return which molecules have an odd number of electrons, all of them paired by their labels.

    Such labels contradict themselves: at least one electron is unpaired. Crystals are not counted,
    because electrons of neighboring cells can pair.

    Returns:
      (S,) bool.
    """
    electrons = np.zeros(len(columns), np.int64)
    np.add.at(electrons, np.repeat(np.arange(len(columns)), columns.n_atoms), columns.numbers)
    charge = np.round(np.nan_to_num(columns.charge)).astype(np.int64)
    odd = (electrons - charge) % 2 == 1
    if columns.spin is not None:
        odd &= columns.spin == 0
    return odd if columns.pbc is None else odd & ~columns.pbc.any(axis=1)


def whole_charge(charge: float) -> float | None:
    """Return the whole number within 0.001 e of a charge, or None if there is none."""
    return (
        float(round(charge))
        if math.isfinite(charge) and abs(charge - round(charge)) <= _TOLERANCE
        else None
    )


def charge_from_smiles(smiles: str) -> int:
    """Return the total charge of a SMILES (e), the sum of the formal charges of its bracket atoms.

    >>> charge_from_smiles("[H:3][N+:1]([H:4])([H:5])[C:2](=[O:6])[O-:7]")
    0
    >>> charge_from_smiles("[Ca++].[Cl-]")
    1
    """
    total = 0
    for atom in _BRACKET.findall(smiles):
        match = _CHARGE.search(atom)
        if match:
            signs, digits = match.groups()
            total += (1 if signs[0] == "+" else -1) * (int(digits) if digits else len(signs))
    return total
