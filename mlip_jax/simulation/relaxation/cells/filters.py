"""Cell filters: positions and cell of a structure as one vector for a minimizer, as in ase.filters.

    M   slots        n   atoms per slot

A structure has the positions x of its atoms in the undeformed cell C and a deformation F, a 3x3
matrix. Its real positions are x F^T and its real cell is C F^T. A minimizer moves the n + 3 rows
(x, N U), with N the number of atoms and U = F - 1 ("unitcell") or log F ("frechet"), along
generalized forces. These are the forces of ase.filters.UnitCellFilter and FrechetCellFilter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.config import unknown_name
from mlip_jax.simulation.relaxation.cells import matrices
from mlip_jax.simulation.relaxation.cells.matrices import matmul, transpose
from mlip_jax.simulation.relaxation.state import Cells

NAMES = ("frechet", "unitcell")
# _VOIGT: index of each strain component in the order xx, yy, zz, yz, xz, xy.
_VOIGT = np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])


@dataclasses.dataclass(frozen=True)
class CellFilter:
    """Filter that relaxes cells together with the positions, with the arguments of ase.filters.

    >>> CellFilter("frechet", mask=(1, 1, 0, 0, 0, 1)).mask
    (1.0, 1.0, 0.0, 0.0, 0.0, 1.0)

    Attributes:
      name: "frechet" or "unitcell".
      mask: Components of the strain that relax (1) or are fixed (0), in the order xx, yy, zz, yz,
        xz, xy; None relaxes all.
      scalar_pressure: External pressure (eV/Å³); 1 GPa is 0.00624 eV/Å³.
      hydrostatic_strain: Whether the shape of the cell is fixed.
      constant_volume: Whether the volume is fixed (approximately).
    """

    name: str = "frechet"
    mask: Sequence[float] | None = None
    scalar_pressure: float = 0.0
    hydrostatic_strain: bool = False
    constant_volume: bool = False

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(unknown_name("cell", self.name, NAMES))
        mask = np.asarray((1,) * 6 if self.mask is None else self.mask)
        if mask.shape != (6,) or not np.isin(mask, (0, 1)).all():
            raise ValueError(
                "mask must have six values of 0 or 1 (xx, yy, zz, yz, xz, xy), received "
                f"{self.mask!r}"
            )
        if not mask.any():
            raise ValueError("mask fixes all components. To keep the cell, set no cell filter.")
        if not np.isfinite(self.scalar_pressure):
            raise ValueError(
                f"scalar_pressure must be finite (eV/Å³), received {self.scalar_pressure}"
            )
        # a tuple, since the filter is part of the static arguments of a compiled program
        object.__setattr__(self, "mask", tuple(float(x) for x in mask))

    def mask_of(self, periodic: np.ndarray) -> np.ndarray:
        """Return the mask of a structure as a matrix, (3, 3).

        Without periodicity along an axis, the components of this axis are fixed.

        Args:
          periodic: Periodicity along x, y and z, (3,).
        """
        mask = np.array(self.mask)[_VOIGT]
        return mask * np.outer(periodic, periodic)

    def deformation(self, strain: jax.Array) -> jax.Array:
        """Return F - 1, (M, 3, 3)."""
        return matrices.expm1(strain) if self.name == "frechet" else strain

    def project(self, cells: Cells, strain: jax.Array) -> jax.Array:
        """Project a strain onto the components that relax, (M, 3, 3)."""
        kept = transpose(transpose(self.deformation(strain)) * cells.mask)
        if self.name == "unitcell":
            return kept
        is_free = (cells.mask == 1).all((1, 2), keepdims=True)
        return jnp.where(is_free, strain, matrices.log1p(kept))

    def generalized_forces(
        self,
        cells: Cells,
        count: jax.Array,
        forces: jax.Array,
        stress: jax.Array,
        volume: jax.Array,
    ) -> jax.Array:
        """Return the forces on the rows of a minimizer, (M, n + 3, 3).

        Args:
          cells: Cells.
          count: Number of atoms, (M,).
          forces: Forces (eV/Å), (M, n, 3).
          stress: Stress (eV/Å³), (M, 3, 3).
          volume: Volume of the deformed cells (Å³), (M,).
        """
        one = matrices.identity(forces)
        factor = one + self.deformation(cells.strain)  # F
        virial = -volume[:, None, None] * (stress + self.scalar_pressure * one)
        by_deformation = transpose(matrices.inverse(factor))  # F^-T
        if self.name == "unitcell":
            virial = matmul(virial, by_deformation)
        if self.hydrostatic_strain:
            virial = _trace(virial) / 3 * one
        virial = virial * cells.mask
        if self.name == "frechet":
            # derivative of the energy by log F: the adjoint of the derivative of the exponential
            _, pullback = jax.vjp(matrices.expm1, cells.strain)
            (virial,) = pullback(matmul(virial, by_deformation))
        if self.constant_volume:
            virial = virial - _trace(virial) / 3 * one
        rows = virial / jnp.maximum(count, 1).astype(forces.dtype)[:, None, None]
        return jnp.concatenate([matmul(forces, factor), rows], axis=1)


def create_filter(cell: Any) -> CellFilter | None:
    """Return the filter of an argument `cell`: a name, a `CellFilter`, or None for fixed cells.

    Raises:
      ValueError: There is no such filter.
    """
    if cell is None or isinstance(cell, CellFilter):
        return cell
    if not isinstance(cell, str):
        raise ValueError(f"cell must be None, a CellFilter or one of {NAMES}, received {cell!r}")
    return CellFilter(cell)


def _trace(matrix):
    return jnp.trace(matrix, axis1=-2, axis2=-1)[:, None, None]
