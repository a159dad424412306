"""Geometries of small molecules about their GFN2-xTB minimum: normal modes and stretched bonds.

Molecular mechanics is poor for molecules of a few atoms, so the minimum and the Hessian are those
of GFN2-xTB.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ase.units import Bohr, Hartree

from mlip_jax.datasets.builtin import labels, sampling
from mlip_jax.datasets.smiles.embedding import charge_and_unpaired

MAX_ATOMS = 12  # maximum number of atoms
TEMPERATURES = (20.0, 3000.0)  # range of the temperature of the displacements (K)
LENGTHS = (0.8, 1.35)  # range of the length of a stretched bond, relative to the minimum
STRETCHED_SHARE = 0.35  # share of geometries with a stretched bond
EVALUATIONS = 60  # maximum number of GFN2-xTB evaluations of the relaxation
_SCALE = 0.2  # unit of the minimizer (Å), the length of its first step
_STEP = 0.005  # displacement of the numerical Hessian (Å)
_FLOOR = 0.3  # smallest curvature (eV/Å^2) of the displacements
_BOLTZMANN = 8.617333e-5  # eV/K


def stretched_frames(
    mol: Any, numbers: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[str, list[np.ndarray]]:
    """Return "" (no molecular mechanics) and `count` positions (Å), (n, 3).

    Args:
      mol: RDKit molecule with explicit hydrogens.
      numbers: Atomic numbers, (n,).
      count: Number of geometries.
      rng: NumPy random generator.

    Raises:
      ValueError: RDKit finds no geometry, or GFN2-xTB does not converge at it.
    """
    start = mol.GetConformer(sampling.embed(mol, 1, int(rng.integers(2**31 - 1)))[0]).GetPositions()
    charge, unpaired = charge_and_unpaired(mol)

    def energy_and_slope(flat):
        energy, gradient = labels.energy_and_gradient(
            numbers, flat.reshape(-1, 3) / Bohr, charge, unpaired
        )
        return energy * Hartree, gradient.ravel() * (Hartree / Bohr)

    try:
        minimum, curvatures, modes = _minimum_and_modes(energy_and_slope, start)
    except labels.NotConverged as error:
        raise ValueError(f"GFN2-xTB: {error}") from error
    bonds = _sides(mol)
    frames = []
    for index in range(count):
        temperature = np.exp(rng.uniform(*np.log(TEMPERATURES)))
        spread = np.sqrt(_BOLTZMANN * temperature / np.maximum(np.abs(curvatures), _FLOOR))
        if index == 0:
            spread = 0.1 * spread  # close to the minimum
        stretched = index and bonds and rng.random() < STRETCHED_SHARE
        if stretched:
            spread = 0.3 * spread
        positions = minimum + (modes @ (spread * rng.standard_normal(minimum.size))).reshape(-1, 3)
        if stretched:
            i, j, side = bonds[rng.integers(len(bonds))]
            positions[side] += (rng.uniform(*LENGTHS) - 1) * (minimum[j] - minimum[i])
        frames.append(positions)
    return "", frames


def _minimum_and_modes(energy_and_slope, start):
    """Return the minimum (Å), (n, 3), and the curvatures (eV/Å^2) and modes of the Hessian."""
    from scipy.optimize import minimize

    def scaled(x):
        energy, slope = energy_and_slope(_SCALE * x)
        return energy, _SCALE * slope

    relaxed = (
        _SCALE
        * minimize(
            scaled,
            start.ravel() / _SCALE,
            jac=True,
            method="L-BFGS-B",
            options={"maxfun": EVALUATIONS},
        ).x
    )
    rows = []
    for index in range(relaxed.size):
        shift = np.zeros(relaxed.size)
        shift[index] = _STEP
        forward, backward = (energy_and_slope(relaxed + s)[1] for s in (shift, -shift))
        rows.append((forward - backward) / (2 * _STEP))
    hessian = np.array(rows)
    curvatures, modes = np.linalg.eigh((hessian + hessian.T) / 2)
    # translations and rotations do not change the energy
    return relaxed.reshape(-1, 3), np.where(np.abs(curvatures) < 1e-2, np.inf, curvatures), modes


def _sides(mol) -> list[tuple[int, int, list[int]]]:
    """Return the acyclic bonds as pairs of atoms, with the atoms on the side of the second one."""
    from rdkit import Chem

    found = []
    for bond in mol.GetBonds():
        if bond.IsInRing():
            continue
        cut = Chem.FragmentOnBonds(mol, [bond.GetIdx()], addDummies=False)
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        side = next(each for each in Chem.GetMolFrags(cut) if j in each)
        found.append((i, j, list(side)))
    return found
