"""Initial velocities of dynamics, and the degrees of freedom with kinetic energy."""

from __future__ import annotations

import numpy as np
from ase import Atoms, units

_FLAT = 1e-6  # moments of inertia below this fraction of the largest count as zero


def maxwell_boltzmann(
    masses: np.ndarray, temperature: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw momenta (n, 3) from the Maxwell-Boltzmann distribution, in ASE's units.

    This function exists because ASE renamed its own among the supported versions.

    Args:
      masses: Masses (amu), (n,).
      temperature: Temperature (K).
      rng: Random generator.
    """
    width = np.sqrt(masses * units.kB * temperature)
    return width[:, None] * rng.standard_normal((len(masses), 3))


def draw(
    atoms: Atoms,
    temperature: float,
    rng: np.random.Generator,
    dof: int,
    fix_com: bool,
    fix_rotation: bool,
) -> None:
    """Draw momenta from the Maxwell-Boltzmann distribution, scaled to exactly `temperature`.

    Args:
      atoms: Molecule, which receives the momenta.
      temperature: Temperature (K).
      rng: Random generator.
      dof: Degrees of freedom of the start, see `degrees_of_freedom`.
      fix_com: Whether to remove the motion of the center of mass.
      fix_rotation: Whether to remove the rotation, if the molecule is open.
    """
    atoms.set_momenta(maxwell_boltzmann(atoms.get_masses(), temperature, rng))
    if fix_com:
        stop_center_of_mass(atoms)
    if fix_rotation and not atoms.pbc.any():
        stop_rotation(atoms)
    kinetic = atoms.get_kinetic_energy()
    if dof and kinetic > 0:
        atoms.set_momenta(
            atoms.get_momenta() * np.sqrt(0.5 * dof * units.kB * temperature / kinetic)
        )


def stop_center_of_mass(atoms: Atoms) -> None:
    """Remove the motion of the center of mass."""
    masses, momenta = atoms.get_masses(), atoms.get_momenta()
    atoms.set_momenta(momenta - masses[:, None] * (momenta.sum(0) / masses.sum()))


def stop_rotation(atoms: Atoms) -> None:
    """Remove the rotation about the center of mass. Linear molecules have none about their axis."""
    masses, arms = atoms.get_masses(), atoms.positions - atoms.get_center_of_mass()
    inertia = np.einsum(
        "i,ixy->xy",
        masses,
        (arms * arms).sum(1)[:, None, None] * np.eye(3) - arms[:, :, None] * arms[:, None, :],
    )
    rate = np.linalg.pinv(inertia, rcond=_FLAT, hermitian=True) @ np.cross(
        arms, atoms.get_momenta()
    ).sum(0)
    atoms.set_momenta(atoms.get_momenta() - masses[:, None] * np.cross(rate, arms))


def degrees_of_freedom(atoms: Atoms, fix_com: bool, fix_rotation: bool) -> int:
    """Return the degrees of freedom with kinetic energy.

    These are 3 per atom, minus 3 for a fixed center of mass and minus the fixed rotations.
    """
    if fix_com and len(atoms) == 1:
        return 0
    return (
        3 * len(atoms)
        - 3 * fix_com
        - (rotations(atoms) if fix_rotation and not atoms.pbc.any() else 0)
    )


def rotations(atoms: Atoms) -> int:
    """Return the number of rotations: 3, 2 for a linear molecule, 0 for a single atom."""
    if len(atoms) < 2:
        return 0
    moments = atoms.get_moments_of_inertia()
    return int((moments > _FLAT * moments.max()).sum()) if moments.max() > 0 else 0
