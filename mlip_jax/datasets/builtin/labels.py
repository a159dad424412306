"""GFN2-xTB energies and gradients of a geometry, and what makes a geometry unfit to be labelled.

Everything is in tblite's units here, which are SPICE's too: bohr, hartree, hartree/bohr.
"""

from __future__ import annotations

import functools

import numpy as np

METHOD = "GFN2-xTB"

# Unpaired electrons of the neutral ground-state atoms of the main groups.
UNPAIRED_ELECTRONS = {
    1: 1, 2: 0, 3: 1, 4: 0, 5: 1, 6: 2, 7: 3, 8: 2, 9: 1, 10: 0, 11: 1, 12: 0, 13: 1, 14: 2, 15: 3, 16: 2, 17: 1,
    18: 0, 19: 1, 20: 0, 31: 1, 32: 2, 33: 3, 34: 2, 35: 1, 36: 0, 53: 1,
}

# Bonds stretched beyond, and other pairs closer than, this multiple of the sum of covalent radii are a reaction.
LONGEST_BOND = 1.4
CLOSEST_CONTACT = 1.15


class NotConverged(Exception):
    """The self-consistent field did not converge at this geometry."""


def energy_and_gradient(numbers: np.ndarray, positions: np.ndarray, charge: int = 0,
                        unpaired: int = 0) -> tuple[float, np.ndarray]:
    """GFN2-xTB energy and gradient.

    Args:
      numbers: atomic numbers (n,).
      positions: (n, 3) in bohr.
      charge: total charge in e.
      unpaired: number of unpaired electrons.

    Returns:
      Energy in hartree, float, and gradient (n, 3) in hartree/bohr, float64.

    Raises:
      NotConverged: if the SCF does not converge or gives numbers that are not finite.
    """
    from tblite.exceptions import TBLiteRuntimeError
    from tblite.interface import Calculator

    try:
        calculator = Calculator(METHOD, np.asarray(numbers), np.asarray(positions, np.float64), charge, unpaired)
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
    """Energy in hartree of a neutral atom in its ground state.

    Raises:
      ValueError: for elements outside the main groups.
    """
    if number not in UNPAIRED_ELECTRONS:
        raise ValueError(f"no isolated-atom energy for atomic number {number}; known: {sorted(UNPAIRED_ELECTRONS)}")
    return energy_and_gradient(np.array([number]), np.zeros((1, 3)), unpaired=UNPAIRED_ELECTRONS[number])[0]


def bond_matrix(mol) -> np.ndarray:
    """Boolean (n, n): which atoms of an RDKit molecule are bonded."""
    from rdkit import Chem

    return Chem.GetAdjacencyMatrix(mol).astype(bool)


def covalent_radii(numbers: np.ndarray) -> np.ndarray:
    """Covalent radii (n,) in Å."""
    from rdkit import Chem

    table = Chem.GetPeriodicTable()
    return np.array([table.GetRcovalent(int(number)) for number in numbers])


def is_intact(positions: np.ndarray, radii: np.ndarray, bonded: np.ndarray) -> bool:
    """Whether the bonds of the molecule are there and no others.

    Args:
      positions: (n, 3) in Å.
      radii: covalent radii (n,) in Å.
      bonded: boolean (n, n).
    """
    if not np.all(np.isfinite(positions)):
        return False
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    reach = radii[:, None] + radii[None]
    others = ~bonded & ~np.eye(len(radii), dtype=bool)
    return bool(np.all(distances[bonded] < LONGEST_BOND * reach[bonded])
                and np.all(distances[others] > CLOSEST_CONTACT * reach[others]))
