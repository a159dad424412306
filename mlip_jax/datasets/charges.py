"""Total charges and unpaired electrons of molecules, from labels, SMILES or initial charges."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mlip_jax.structure import charge_names, plain_name

_BRACKET = re.compile(r"\[([^\]]*)\]")
_CHARGE = re.compile(r"([+]+|-+)(\d*)(?::\d+)?$")
_TOLERANCE = 1e-3  # maximum distance to a whole number (e)
# Usual names of labels, in the form of structure.plain_name.
_UNPAIRED_NAMES = {"numunpairedelectrons", "nunpaired", "unpairedelectrons", "unpaired", "uhf"}
_MULTIPLICITY_NAMES = {"multiplicity", "spinmultiplicity", "mult"}
_SPIN_NAMES = {"spin", "totalspin"}


class ElectronicStateError(ValueError):
    """A label of the total charge or the spin is invalid or contradicts another one."""


def spin_names(labels: Iterable[str]) -> list[str]:
    """Return the names of labels that contain a spin, a multiplicity or unpaired electrons."""
    known = _UNPAIRED_NAMES | _MULTIPLICITY_NAMES | _SPIN_NAMES
    return [name for name in labels if plain_name(name) in known]


def find_charge(labels: Mapping[str, Any], names: Iterable[str] | None = None) -> float | None:
    """Return the total charge (e) in the labels of a molecule, or None if it is missing.

    Args:
      labels: Labels by name.
      names: Names of labels to use; None uses all that `charge_names` recognizes.

    Raises:
      ElectronicStateError: A label is not a number, or two labels differ.
    """
    names = charge_names(labels) if names is None else names
    return _common_value({n: _number(labels[n], n) for n in names if n in labels})


def find_unpaired(
    labels: Mapping[str, Any],
    numbers: np.ndarray,
    charge: float,
    names: Iterable[str] | None = None,
) -> float | None:
    """Return the number of unpaired electrons in the labels of a molecule, None if it is missing.

    "spin" can mean the multiplicity 2S + 1, the number of unpaired electrons 2S, or S. S is used if
    the value is not an integer. The other two meanings differ by one, so only one of them fits the
    number of electrons.

    Args:
      labels: Labels by name.
      numbers: Atomic numbers, (n,).
      charge: Total charge (e).
      names: Names of labels to use; None uses all that `spin_names` recognizes.

    Raises:
      ElectronicStateError: A label does not fit the number of electrons, or two labels differ.
    """
    names = spin_names(labels) if names is None else names
    if not math.isfinite(charge):  # an infinite charge is reported elsewhere
        return None
    electrons = round(float(np.sum(numbers)) - charge)
    values = {}
    for name in names:
        value = _number(labels[name], name) if name in labels else None
        if value is not None:
            values[name] = _unpaired(name, value, electrons)
    return _common_value(values)


def _unpaired(name: str, value: float, electrons: int) -> float:
    """Return the number of unpaired electrons that a label states."""
    plain = plain_name(name)
    if plain in _MULTIPLICITY_NAMES:
        unpaired = value - 1
    elif plain in _UNPAIRED_NAMES:
        unpaired = value
    elif not float(value).is_integer():
        unpaired = 2 * value
    else:
        unpaired = value if (value - electrons) % 2 == 0 else value - 1
    if not float(unpaired).is_integer() or unpaired < 0 or (unpaired - electrons) % 2:
        raise ElectronicStateError(
            f"{name!r} is {value:g}, which does not fit {electrons} electrons. Correct it, or the "
            "total charge"
        )
    return unpaired


def _common_value(values: Mapping[str, float | None]) -> float | None:
    """Return the value on which all labels agree, ignoring missing ones."""
    known = {name: value for name, value in values.items() if value is not None}
    if len(set(known.values())) > 1:
        described = ", ".join(f"{name} = {value:g}" for name, value in known.items())
        raise ElectronicStateError(f"labels contradict each other: {described}")
    return next(iter(known.values()), None)


def _number(value: Any, name: str) -> float | None:
    """Return a label as a number. None for NaN, empty labels and arrays of several numbers."""
    if value is None or isinstance(value, str) and not value.strip():
        return None
    try:
        array = np.asarray(value)
        if array.size != 1:
            return None
        if array.dtype.kind == "b":
            raise ValueError("a truth value")
        number = float(array.reshape(()))
    except (TypeError, ValueError) as error:
        raise ElectronicStateError(f"{name!r} is {value!r}, expected a number") from error
    return None if math.isnan(number) else number


def total_charge(label: float | None, smiles: str, initial: float) -> float:
    """Return the total charge of a molecule in e.

    The sources are tried in this order: the label; the SMILES; the sum of ASE's initial charges, if
    it is a whole number. If all of them fail, the charge is 0. Initial charges are often partial
    charges, whose sum is not a total charge.

    Args:
      label: Total charge in the file, from `find_charge`, or None.
      smiles: SMILES of the molecule, or "" if unknown.
      initial: Sum of the initial charges of the atoms (e).
    """
    if label is not None and not math.isnan(label):
        return float(label)
    if smiles:
        return float(charge_from_smiles(smiles))
    return whole_charge(initial) or 0.0


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
