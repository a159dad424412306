"""GFN2-xTB energies and gradients, and a check of the bonds of a geometry.

Energies and gradients are in the units of tblite and SPICE: bohr, hartree, hartree/bohr.
"""

from __future__ import annotations

import functools

import numpy as np

METHOD = "GFN2-xTB"

# Unpaired electrons of the neutral ground-state atoms of the main groups.
UNPAIRED_ELECTRONS = {
    1: 1,
    2: 0,
    3: 1,
    4: 0,
    5: 1,
    6: 2,
    7: 3,
    8: 2,
    9: 1,
    10: 0,
    11: 1,
    12: 0,
    13: 1,
    14: 2,
    15: 3,
    16: 2,
    17: 1,
    18: 0,
    19: 1,
    20: 0,
    31: 1,
    32: 2,
    33: 3,
    34: 2,
    35: 1,
    36: 0,
    53: 1,
}

# Multiples of the sum of the covalent radii. A geometry is considered to have reacted if a bond is
# longer than the first, or another pair of atoms closer than the second.
LONGEST_BOND = 1.4
CLOSEST_CONTACT = 1.15


class NotConverged(Exception):
    """The self-consistent field did not converge at this geometry."""


def energy_and_gradient(
    numbers: np.ndarray, positions: np.ndarray, charge: int = 0, unpaired: int = 0
) -> tuple[float, np.ndarray]:
    """Compute the GFN2-xTB energy and gradient.

    Args:
      numbers: Atomic numbers, (n,).
      positions: Positions (bohr), (n, 3).
      charge: Total charge (e).
      unpaired: Number of unpaired electrons.

    Returns:
      Energy (hartree), and gradient (hartree/bohr), (n, 3) float64.

    Raises:
      NotConverged: The SCF does not converge, or the energy or gradient is not finite.
    """
    from tblite.exceptions import TBLiteRuntimeError
    from tblite.interface import Calculator

    try:
        calculator = Calculator(
            METHOD, np.asarray(numbers), np.asarray(positions, np.float64), charge, unpaired
        )
        calculator.set("verbosity", 0)
        result = calculator.singlepoint()
    except TBLiteRuntimeError as error:
        raise NotConverged(str(error)) from error
    energy, gradient = float(result.get("energy")), np.array(result.get("gradient"))
    if not (np.isfinite(energy) and np.all(np.isfinite(gradient))):
        raise NotConverged("energy or gradient is not finite")
    return energy, gradient


@functools.cache
def isolated_atom_energy(number: int) -> float:
    """Return the GFN2-xTB energy of a neutral atom in its ground state (hartree).

    Raises:
      ValueError: The ground state of the element is not in UNPAIRED_ELECTRONS.
    """
    if number not in UNPAIRED_ELECTRONS:
        raise ValueError(
            f"no isolated-atom energy for atomic number {number}; known: "
            f"{sorted(UNPAIRED_ELECTRONS)}"
        )
    return energy_and_gradient(
        np.array([number]), np.zeros((1, 3)), unpaired=UNPAIRED_ELECTRONS[number]
    )[0]


def bond_matrix(mol) -> np.ndarray:
    """Return whether each pair of atoms of an RDKit molecule is bonded, (n, n) bool."""
    from rdkit import Chem

    return Chem.GetAdjacencyMatrix(mol).astype(bool)


def covalent_radii(numbers: np.ndarray) -> np.ndarray:
    """Return the covalent radii (Å), (n,), from RDKit's periodic table."""
    from rdkit import Chem

    table = Chem.GetPeriodicTable()
    return np.array([table.GetRcovalent(int(number)) for number in numbers])


def is_intact(positions: np.ndarray, radii: np.ndarray, bonded: np.ndarray) -> bool:
    """Return whether no bond of the molecule is broken and no new bond is formed.

    Args:
      positions: Positions (Å), (n, 3).
      radii: Covalent radii (Å), (n,).
      bonded: Whether each pair of atoms is bonded, (n, n) bool.
    """
    if not np.all(np.isfinite(positions)):
        return False
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    # (n, n)
    radius_sum = radii[:, None] + radii[None]
    others = ~bonded & ~np.eye(len(radii), dtype=bool)
    return bool(
        np.all(distances[bonded] < LONGEST_BOND * radius_sum[bonded])
        and np.all(distances[others] > CLOSEST_CONTACT * radius_sum[others])
    )
