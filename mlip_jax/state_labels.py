"""Labels of the total charge and the spin of molecules, under their usual names."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

# Usual names, in the form of `plain_name`.
_CHARGE_NAMES = {"charge", "totalcharge", "netcharge", "totcharge", "molecularcharge", "molcharge"}
_UNPAIRED_NAMES = {"numunpairedelectrons", "nunpaired", "unpairedelectrons", "unpaired", "uhf"}
_MULTIPLICITY_NAMES = {"multiplicity", "spinmultiplicity", "mult"}
_SPIN_NAMES = {"spin", "totalspin"}
# _MOMENT_TOLERANCE: largest deviation of a sum of magnetic moments from an integer.
_MOMENT_TOLERANCE = 0.01


class ElectronicStateError(ValueError):
    """A label of the total charge or the spin is invalid or contradicts another one."""


def plain_name(label: str) -> str:
    """Return the name of a label in lower case, without separators and the prefixes REF and DFT.

    >>> plain_name("REF_total_charge")
    'totalcharge'
    """
    return re.sub(r"^(ref|dft)", "", re.sub(r"[^a-z0-9]", "", str(label).lower()))


def charge_names(labels: Iterable[str]) -> list[str]:
    """Return the names of labels that contain a total charge.

    >>> charge_names(["Charge", "total_charge", "charges", "REF_charge"])
    ['Charge', 'total_charge', 'REF_charge']
    """
    return [name for name in labels if plain_name(name) in _CHARGE_NAMES]


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


def unpaired_of_moments(
    moments: np.ndarray | None, numbers: np.ndarray, charge: float, pbc: np.ndarray
) -> float | None:
    """Return the number of unpaired electrons to which initial magnetic moments add up.

    None without moments, and for periodic structures, whose moments are usually a guess. A sum that
    does not fit the number of electrons is ignored with a warning.

    >>> unpaired_of_moments([0.6, -1.6], [7, 8], 0.0, [False] * 3)
    1.0

    Args:
      moments: Initial magnetic moments of ASE, (n,), or (n, 3) if they are not collinear.
      numbers: Atomic numbers, (n,).
      charge: Total charge (e).
      pbc: Periodicity along each lattice vector, (3,).
    """
    if moments is None or np.any(pbc) or not np.any(moments) or not math.isfinite(charge):
        return None
    total = float(np.linalg.norm(np.sum(moments, axis=0)))
    if math.isfinite(total) and abs(total - round(total)) < _MOMENT_TOLERANCE:
        if (round(total) - round(float(np.sum(numbers)) - charge)) % 2 == 0:
            return float(round(total))
    warnings.warn(
        f"initial magnetic moments that add up to {total:.4g} do not fit the number of electrons and "
        "are ignored. Set atoms.info['num_unpaired_electrons'] or correct the total charge.",
        stacklevel=2,
    )
    return None


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
