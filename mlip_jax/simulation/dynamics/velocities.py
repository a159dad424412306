"""Velocities at the start of dynamics, and the degrees of freedom that hold kinetic energy."""

from __future__ import annotations

import numpy as np
from ase import Atoms, units

_FLAT = 1e-6  # moments of inertia below this share of the largest are none


def maxwell_boltzmann(masses: np.ndarray, temperature: float, rng: np.random.Generator) -> np.ndarray:
    """Draw momenta (n, 3) of the Maxwell-Boltzmann distribution, in units of ASE.

    ASE has renamed its own function within the versions that are supported here.

    Args:
      masses: Masses (n,) in u. temperature: Temperature in K.
    """
    width = np.sqrt(masses * units.kB * temperature)
    return width[:, None] * rng.standard_normal((len(masses), 3))


def draw(atoms: Atoms, temperature: float, rng: np.random.Generator, dof: int, fix_com: bool,
         fix_rotation: bool) -> None:
    """Give atoms momenta of the Maxwell-Boltzmann distribution, scaled to exactly this temperature (K).

    Args:
      dof: Of `degrees_of_freedom`, that of the start.
      fix_com: Without motion of the centre of mass. fix_rotation: Without rotation, if open.
    """
    atoms.set_momenta(maxwell_boltzmann(atoms.get_masses(), temperature, rng))
    if fix_com:
        stop_centre_of_mass(atoms)
    if fix_rotation and not atoms.pbc.any():
        stop_rotation(atoms)
    kinetic = atoms.get_kinetic_energy()
    if dof and kinetic > 0:
        atoms.set_momenta(atoms.get_momenta() * np.sqrt(0.5 * dof * units.kB * temperature / kinetic))


def stop_centre_of_mass(atoms: Atoms) -> None:
    """Take out the motion of the centre of mass."""
    masses, momenta = atoms.get_masses(), atoms.get_momenta()
    atoms.set_momenta(momenta - masses[:, None] * (momenta.sum(0) / masses.sum()))


def stop_rotation(atoms: Atoms) -> None:
    """Take out the rotation about the centre of mass; atoms in a line have none about that line."""
    masses, arms = atoms.get_masses(), atoms.positions - atoms.get_center_of_mass()
    inertia = np.einsum("i,ixy->xy", masses, (arms * arms).sum(1)[:, None, None] * np.eye(3)
                        - arms[:, :, None] * arms[:, None, :])
    rate = np.linalg.pinv(inertia, rcond=_FLAT, hermitian=True) @ np.cross(arms, atoms.get_momenta()).sum(0)
    atoms.set_momenta(atoms.get_momenta() - masses[:, None] * np.cross(rate, arms))


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
