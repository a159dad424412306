"""Cutoffs of long-range pairs of force fields that sum over the lattice of crystals.

A cutoff is a distance in Å, inf for all pairs, or a `LatticeSumCutoff`.

>>> cutoff = LatticeSumCutoff(12.0, (LatticeSum(k_max=1.9, num_vectors=1000),))
>>> float(cutoff), in_cells(cutoff), in_cells(8.0)
(inf, 12.0, 8.0)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

# _ROUNDING: largest relative error of the lengths of lattice vectors in float32.
_ROUNDING = 1e-6
# _ROOM: ratio of the vectors that programs have room for to those of the largest accepted cell. A
# cell of twice the length needs 8 times as many, and more for numbers that are rounded down.
# _LEAST_ROOM: least number of vectors that programs have room for.
_ROOM, _LEAST_ROOM = 16, 4096


class LatticeSum(NamedTuple):
    """Sum over reciprocal lattice vectors.

    Attributes:
      k_max: Length up to which the vectors are needed (1/Å).
      num_vectors: Largest number of vectors of a cell that is accepted, one of k and -k.
    """

    k_max: float
    num_vectors: int

    @property
    def room(self) -> int:
        """Return the number of vectors that programs have room for.

        Cells grow in relaxations and dynamics. This is sufficient for twice the lattice vectors of
        the largest cell that is accepted.
        """
        return max(_ROOM * self.num_vectors, _LEAST_ROOM)


class LatticeSumCutoff(float):
    """Cutoff of a force field with lattice sums: inf for molecules, a distance for crystals.

    As a number it is inf, so that molecules get all pairs.

    Attributes:
      periodic: Cutoff of periodic structures (Å).
      sums: Lattice sums of the force field.
    """

    def __new__(cls, periodic: float, sums: tuple[LatticeSum, ...]):
        cutoff = super().__new__(cls, math.inf)
        cutoff.periodic, cutoff.sums = float(periodic), tuple(sums)
        return cutoff

    def __reduce__(self):
        return type(self), (self.periodic, self.sums)

    def __eq__(self, other):
        if not isinstance(other, LatticeSumCutoff):
            return False
        return (self.periodic, self.sums) == (other.periodic, other.sums)

    def __ne__(self, other):
        return not self == other

    def __hash__(self):
        return hash((self.periodic, self.sums))

    def __repr__(self):
        return f"{self.periodic:g} in crystals, all pairs of molecules"


def in_cells(cutoff: float | None) -> float | None:
    """Return the long-range cutoff of periodic structures (Å), None if there are no such pairs."""
    return cutoff.periodic if isinstance(cutoff, LatticeSumCutoff) else cutoff


def of_boundaries(cutoff: float | None, periodic: bool) -> float | None:
    """Return the long-range cutoff of periodic structures or of molecules as a number (Å)."""
    if cutoff is None:
        return None
    return in_cells(cutoff) if periodic else float(cutoff)


def count_vectors(cell: np.ndarray, k_max: float) -> int:
    """Return the number of reciprocal vectors in the box around a sphere, one of k and -k.

    Programs compute it in float32, so vectors on the surface of the sphere count.

    Args:
      cell: Lattice vectors as rows (Å), (3, 3).
      k_max: Radius of the sphere (1/Å).
    """
    shells = np.floor(k_max * np.linalg.norm(cell, axis=-1) / (2 * np.pi) * (1 + _ROUNDING))
    return int((np.prod(2 * shells + 1) - 1) // 2)


def find_lattice_obstacle(cutoff: float | None, cell: np.ndarray, pbc: np.ndarray) -> str:
    """Return the reason why long-range terms cannot be computed in a cell, or "".

    Args:
      cutoff: Long-range cutoff of the force field.
      cell: Lattice vectors as rows (Å), (3, 3).
      pbc: Periodicity along each lattice vector, (3,).
    """
    if cutoff is None:
        return ""
    if np.isinf(in_cells(cutoff)):
        return (
            f"a periodic structure (pbc={np.asarray(pbc).tolist()}) has infinitely many pairs: its "
            "long-range cutoff must be finite, received inf. Set a cutoff for the long-range "
            "terms."
        )
    for lattice in cutoff.sums if isinstance(cutoff, LatticeSumCutoff) else ():
        if not np.all(pbc):
            return (
                f"pbc={np.asarray(pbc).tolist()}: Ewald sums require periodicity in all three "
                "directions. Add vacuum and set pbc=True."
            )
        needed = count_vectors(np.asarray(cell, np.float64), lattice.k_max)
        if needed > lattice.num_vectors:
            return (
                f"the Ewald sum needs {needed} reciprocal vectors for this cell, but the force "
                f"field accepts at most {lattice.num_vectors}. Increase k_vectors: set "
                f'potential.electrostatics_options.k_vectors, or load "...#k_vectors={needed}".'
            )
    return ""
