"""Velocities at the start of dynamics, and the degrees of freedom that hold kinetic energy."""

from __future__ import annotations

import numpy as np
from ase import Atoms, units
from ase.md.velocitydistribution import Stationary, ZeroRotation

_FLAT = 1e-6  # moments of inertia below this share of the largest are none


def draw(atoms: Atoms, temperature: float, rng: np.random.Generator, dof: int, fix_com: bool,
         fix_rotation: bool) -> None:
    """Give atoms momenta of the Maxwell-Boltzmann distribution, scaled to exactly this temperature (K).

    Args:
      dof: Of `degrees_of_freedom`, that of the start.
      fix_com: Without motion of the centre of mass. fix_rotation: Without rotation, if open.
    """
    width = np.sqrt(atoms.get_masses() * units.kB * temperature)
    atoms.set_momenta(width[:, None] * rng.standard_normal((len(atoms), 3)))
    if fix_com:
        Stationary(atoms, preserve_temperature=False)
    if fix_rotation and not atoms.pbc.any() and len(atoms) > 1:
        ZeroRotation(atoms, preserve_temperature=False)
    kinetic = atoms.get_kinetic_energy()
    if dof and kinetic > 0:
        atoms.set_momenta(atoms.get_momenta() * np.sqrt(0.5 * dof * units.kB * temperature / kinetic))


def degrees_of_freedom(atoms: Atoms, fix_com: bool, fix_rotation: bool) -> int:
    """Of the kinetic energy: 3 for each atom, less 3 for the centre of mass and the rotations that there are."""
    if fix_com and len(atoms) == 1:
        return 0
    return 3 * len(atoms) - 3 * fix_com - (rotations(atoms) if fix_rotation and not atoms.pbc.any() else 0)


def rotations(atoms: Atoms) -> int:
    """3, 2 for atoms in a line, 0 for a single one."""
    if len(atoms) < 2:
        return 0
    moments = atoms.get_moments_of_inertia()
    return int((moments > _FLAT * moments.max()).sum()) if moments.max() > 0 else 0
