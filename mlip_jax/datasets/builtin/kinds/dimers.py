"""Geometries of two molecules at random orientations, from close contact to no interaction."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlip_jax.datasets.builtin import sampling

CLOSE = (0.68, 1.1)  # range of the closest contact, relative to the sum of van der Waals radii
FAR = 6.0  # maximum distance beyond contact (Å)
CLOSE_SHARE, FAR_SHARE = 0.4, 0.2  # shares of close and separate pairs; the others are relaxed
RELAX_STEPS = (10, 200)  # range of the number of steps of molecular mechanics of relaxed pairs
TEMPERATURES = (5.0, 600.0)  # range of the temperature of the noise (K)
NOISE_STEPS = 20  # steps of Langevin dynamics
_GRID = np.linspace(0.0, 40.0, 1601)  # distances of the centers that are tried (Å)


def dimer_frames(
    mol: Any, numbers: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[str, list[np.ndarray]]:
    """Return the name of the force field and `count` positions (Å), (n, 3).

    Args:
      mol: RDKit molecule of two fragments with explicit hydrogens.
      numbers: Atomic numbers, (n,).
      count: Number of geometries.
      rng: NumPy random generator.

    Raises:
      ValueError: There are not two fragments, no geometry exists, or parameters are missing.
    """
    from rdkit import Chem

    rows: list[tuple[int, ...]] = []
    parts = Chem.GetMolFrags(mol, asMols=True, fragsMolAtomMapping=rows)
    if len(parts) != 2:
        raise ValueError(f"expected two fragments, received {len(parts)}")
    num_conformers = -(-count // sampling.FRAMES_PER_CONFORMER)
    minima = [_minima(part, num_conformers, rng) for part in parts]
    conformer = Chem.Conformer(mol.GetNumAtoms())
    # molecular mechanics needs different positions of all atoms when it is built
    apart = np.array([[0.0, 0.0, 0.0], [20.0, 0.0, 0.0]])
    for part_rows, positions, origin in zip(rows, minima, apart):
        for atom, position in zip(part_rows, positions[0] + origin):
            conformer.SetAtomPosition(atom, position)
    conf_id = mol.AddConformer(conformer, assignId=True)
    surface = sampling.Surface(mol, interfragment=True)
    frames = []
    for index in range(count):
        monomers = [each[index % len(each)] for each in minima]
        far = rng.random()
        relaxed = far > CLOSE_SHARE + FAR_SHARE
        closest, beyond = rng.uniform(*CLOSE), 0.0
        if relaxed:
            closest = 1.0
        elif far > CLOSE_SHARE:
            closest, beyond = 1.0, rng.uniform(0.0, FAR)
        pair = place(monomers, [numbers[list(r)] for r in rows], closest, beyond, rng)
        positions = np.empty((len(numbers), 3))
        for part_rows, part in zip(rows, pair):
            positions[list(part_rows)] = part
        if relaxed:
            conformer = mol.GetConformer(conf_id)
            for atom, position in enumerate(positions):
                conformer.SetAtomPosition(atom, position)
            positions = surface.minimum(conf_id, int(rng.integers(*RELAX_STEPS)))
        temperature = np.exp(rng.uniform(*np.log(TEMPERATURES)))
        frames.append(
            sampling.langevin(surface, positions, temperature, 1, rng, steps=NOISE_STEPS)[0]
        )
    return surface.name, frames


def place(
    monomers: list[np.ndarray],
    numbers: list[np.ndarray],
    closest: float,
    beyond: float,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Turn two molecules randomly and place them at a distance of each other.

    Args:
      monomers: Positions of the two molecules (Å), (n, 3) each.
      numbers: Their atomic numbers, (n,) each.
      closest: Closest contact, relative to the sum of the van der Waals radii of the pair.
      beyond: Distance (Å) by which they are separated further.
      rng: NumPy random generator.

    Returns:
      Positions of the two molecules (Å).
    """
    from rdkit import Chem

    table = Chem.GetPeriodicTable()
    radii = [np.array([table.GetRvdw(int(z)) for z in each]) for each in numbers]
    first, second = ((each - each.mean(0)) @ _rotation(rng).T for each in monomers)
    axis = _rotation(rng)[0]
    contact = radii[0][:, None] + radii[1]  # (n1, n2)
    gaps = second[None] - first[:, None]
    # |gap + d axis|² for all distances d, (D, n1, n2)
    along = gaps @ axis
    squares = (gaps**2).sum(-1) + 2 * _GRID[:, None, None] * along + _GRID[:, None, None] ** 2
    ratios = (np.sqrt(np.maximum(squares, 0.0)) / contact).min((1, 2))
    inside = np.flatnonzero(ratios < closest)
    distance = _GRID[inside[-1]] if len(inside) else 0.0
    return [first, second + (distance + beyond) * axis]


def _minima(part: Any, num_conformers: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return positions of minima of one molecule; an atom is at the origin."""
    if part.GetNumAtoms() == 1:
        return [np.zeros((1, 3))]
    ids = sampling.embed(part, num_conformers, int(rng.integers(2**31 - 1)))
    surface = sampling.Surface(part)
    return [surface.minimum(conf_id) for conf_id in ids]


def _rotation(rng: np.random.Generator) -> np.ndarray:
    """Return a uniformly distributed rotation matrix, (3, 3)."""
    from scipy.spatial.transform import Rotation

    return Rotation.random(random_state=rng).as_matrix()
