"""Reference systems of the D3 dispersion correction, for elements 1 (H) to 94 (Pu).

d3_reference.npz contains 32,385 C6 coefficients between 254 reference systems, as published by
Grimme, Antony, Ehrlich and Krieg (J. Chem. Phys. 132, 154104, 2010). They were converted from the
file dftd3_params.npz of torch-dftd 0.5.3 (MIT license), which converts those of the original
program. For elements 87 to 94 the program dftd3 has used newer values since 2024. All values have
four decimals, so integers in units of 1e-4 contain them without rounding:

    c6            lower triangle of the matrix of C6 coefficients (1e-4 hartree bohr⁶), (32385,)
    coordination  coordination number of each reference system (1e-4), (254,)
    counts        number of reference systems of each element, (94,)
    radii         covalent radii (0.01 Å), (94,): Pyykkö and Atsumi 2009, metals times 0.9
    moments       ratios <r⁴>/<r²> of the atoms (1e-4 bohr²), (94,)

    Z   95 atomic numbers, with 0 for padding      R   255 reference systems, the last one empty
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import NamedTuple

import numpy as np

LAST_ELEMENT = 94
# MAX_REFERENCES: largest number of reference systems of an element.
MAX_REFERENCES = 5


class D3Reference(NamedTuple):
    """Tables of D3 in atomic units (float64).

    Attributes:
      c6: C6 coefficients (hartree bohr⁶), (R, R); zero for the empty system.
      systems: Reference systems of each element, (Z, 5); the empty one for missing systems.
      coordination: Their coordination numbers, (Z, 5).
      exists: Whether they exist, (Z, 5) bool; padding has one.
      radii: Covalent radii (bohr), (Z,).
      ratios: Square roots of <r⁴>/<r²> sqrt(Z) / 2 (bohr), (Z,). C8 is 3 C6 times those of both
        atoms.
    """

    c6: np.ndarray
    systems: np.ndarray
    coordination: np.ndarray
    exists: np.ndarray
    radii: np.ndarray
    ratios: np.ndarray


@functools.cache
def reference() -> D3Reference:
    """Return the tables."""
    from ase.units import Bohr

    with resources.as_file(resources.files(__package__) / "d3_reference.npz") as path:
        with np.load(path) as file:
            stored = {name: file[name] for name in file.files}
    counts, number = stored["counts"], int(stored["counts"].sum())
    lower = np.zeros((number + 1, number + 1))
    lower[np.tril_indices(number)] = stored["c6"] * 1e-4
    systems = np.full((LAST_ELEMENT + 1, MAX_REFERENCES), number)
    coordination = np.zeros(systems.shape)
    first = np.cumsum(counts) - counts
    for z, (start, count) in enumerate(zip(first, counts), start=1):
        systems[z, :count] = np.arange(start, start + count)
        coordination[z, :count] = stored["coordination"][start : start + count] * 1e-4
    exists = systems < number
    exists[0, 0] = True
    z = np.arange(1, LAST_ELEMENT + 1)
    return D3Reference(
        lower + np.tril(lower, -1).T,
        systems,
        coordination,
        exists,
        np.append(1.0, stored["radii"] * 0.01 / Bohr),
        np.append(1.0, np.sqrt(0.5 * stored["moments"] * 1e-4 * np.sqrt(z))),
    )
