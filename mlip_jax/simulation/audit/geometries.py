"""Molecules of the audit, and their geometries: bond scans, torsion scans, conformers, dimers."""

from __future__ import annotations

import dataclasses

import numpy as np
from ase import Atoms
from ase.data import covalent_radii, vdw_radii

from mlip_jax.datasets.molecules.files import from_smiles

# (name, SMILES, indices of atoms in it)
BONDS = (
    ("ethane C–C", "CC", (0, 1)),
    ("ethene C=C", "C=C", (0, 1)),
    ("methanol C–O", "CO", (0, 1)),
    ("methylamine C–N", "CN", (0, 1)),
    ("acetaldehyde C=O", "CC=O", (1, 2)),
    ("methanethiol C–S", "CS", (0, 1)),
    ("fluoromethane C–F", "CF", (0, 1)),
    ("chloromethane C–Cl", "CCl", (0, 1)),
)
TORSIONS = (
    ("butane", "CCCC", (0, 1, 2, 3)),
    ("methyl acetate", "CC(=O)OC", (0, 1, 3, 4)),
    ("N-methylacetamide", "CC(=O)NC", (0, 1, 3, 4)),
    ("biphenyl", "c1ccccc1-c1ccccc1", (4, 5, 6, 7)),
    ("anisole", "COc1ccccc1", (0, 1, 2, 3)),
    ("benzenesulfonamide", "NS(=O)(=O)c1ccccc1", (0, 1, 4, 5)),
)
FLEXIBLE = (
    ("alanine dipeptide", "CC(=O)NC(C)C(=O)NC"),
    ("ibuprofen", "CC(C)Cc1ccc(cc1)C(C)C(=O)O"),
    ("lidocaine", "CCN(CC)CC(=O)Nc1c(C)cccc1C"),
    ("sulfamethoxazole", "Cc1cc(NS(=O)(=O)c2ccc(N)cc2)no1"),
)
RINGS = (
    ("benzene", "c1ccccc1"),
    ("pyridine", "c1ccncc1"),
    ("pyrrole", "c1cc[nH]c1"),
    ("furan", "c1ccoc1"),
    ("thiophene", "c1ccsc1"),
    ("imidazole", "c1c[nH]cn1"),
    ("naphthalene", "c1ccc2ccccc2c1"),
    ("indole", "c1ccc2[nH]ccc2c1"),
)
DIMERS = (
    ("water, water", "O", "O"),
    ("methane, methane", "C", "C"),
    ("ammonia, water", "N", "O"),
    ("formamide, water", "NC=O", "O"),
    ("benzene, methane", "c1ccccc1", "C"),
    ("benzene, water", "c1ccccc1", "O"),
)
_BOND_RANGE, _NUM_BOND = (0.8, 1.6), 81  # lengths relative to the initial one; number of points
_NUM_TORSION = 24
_DIMER_SCALES = (0.85, 0.9, 0.95, 1.0, 1.1, 1.25, 1.5, 2.0)  # relative to van der Waals contact
_APART = 30.0  # distance at which monomers do not interact, Å


@dataclasses.dataclass(frozen=True)
class GeometryScan:
    """Geometries of a molecule along a coordinate.

    Attributes:
      name: Name of the molecule.
      x: Coordinate: bond length (Å), torsion (degrees), or distance relative to van der Waals
        contact.
      frames: Geometries.
      moving: Indices of the atoms that move along `direction`, for bonds.
      direction: Unit vector, (3,), for bonds.
    """

    name: str
    x: np.ndarray
    frames: list[Atoms]
    moving: np.ndarray | None = None
    direction: np.ndarray | None = None


def bond_scan(name: str, smiles: str, bond: tuple[int, int]) -> GeometryScan:
    """Return geometries in which one side of a bond moves along it, rigidly."""
    atoms = from_smiles(smiles, mmff=True)
    i, j = bond
    vector = atoms.positions[j] - atoms.positions[i]
    length = float(np.linalg.norm(vector))
    moving, direction = side_of_bond(atoms, i, j), vector / length
    x, frames = length * np.linspace(*_BOND_RANGE, _NUM_BOND), []
    for value in x:
        frames.append(atoms.copy())
        frames[-1].positions[moving] += (value - length) * direction
    return GeometryScan(name, x, frames, moving, direction)


def torsion_scan(name: str, smiles: str, torsion: tuple[int, int, int, int]) -> GeometryScan:
    """Return geometries in which one side of a bond turns about it, rigidly."""
    atoms = from_smiles(smiles, mmff=True)
    moving = side_of_bond(atoms, torsion[1], torsion[2])
    x, frames = np.linspace(0.0, 360.0, _NUM_TORSION, endpoint=False), []
    for angle in x:
        frames.append(atoms.copy())
        frames[-1].set_dihedral(*torsion, angle, indices=moving.tolist())
    return GeometryScan(name, x, frames)


def conformers(smiles: str, count: int) -> list[Atoms]:
    """Return geometries of different embeddings, relaxed with MMFF94."""
    return [from_smiles(smiles, mmff=True, seed=seed) for seed in range(count)]


def dimer_scan(name: str, first: str, second: str) -> GeometryScan:
    """Return two molecules at several distances; the last frame has separate monomers.

    The second molecule is displaced along a fixed axis until the closest pair of atoms has a
    multiple of the sum of its van der Waals radii. The axis is that of the largest moment of the
    first molecule, so that planar molecules are stacked.
    """
    a, b = (from_smiles(smiles, mmff=True) for smiles in (first, second))
    for atoms in (a, b):
        atoms.positions -= atoms.get_center_of_mass()
    axis = a.get_moments_of_inertia(vectors=True)[1][-1]
    contact = vdw_radii[a.numbers][:, None] + vdw_radii[b.numbers]

    def frame(distance: float) -> Atoms:
        shifted = b.copy()
        shifted.positions += distance * axis
        return a + shifted

    def closest(distance: float) -> float:
        gaps = a.positions[:, None] - (b.positions + distance * axis)
        return float((np.linalg.norm(gaps, axis=-1) / contact).min())

    grid = np.linspace(0.0, _APART, 3001)
    ratios = np.array([closest(distance) for distance in grid])
    # from outside, the first distance at which the molecules are closer than the scale
    distances = [grid[np.flatnonzero(ratios < scale)[-1]] for scale in _DIMER_SCALES]
    frames = [frame(distance) for distance in (*distances, _APART)]
    return GeometryScan(name, np.array(_DIMER_SCALES), frames)


def bonded_pairs(atoms: Atoms) -> np.ndarray:
    """Return the pairs of atoms closer than 1.25 times the sum of their covalent radii, (B, 2)."""
    radii = covalent_radii[atoms.numbers]
    near = atoms.get_all_distances() < 1.25 * (radii[:, None] + radii)
    return np.argwhere(np.triu(near, 1))


def side_of_bond(atoms: Atoms, i: int, j: int) -> np.ndarray:
    """Return the atoms on the side of `j` of the bond between `i` and `j`."""
    pairs, side, new = bonded_pairs(atoms).tolist(), {j}, {j}
    while new:
        neighbors = {b if a in new else a for a, b in pairs if (a in new) != (b in new)}
        new = neighbors - side - {i}
        side |= new
    return np.array(sorted(side))


def out_of_plane(atoms: Atoms) -> float:
    """Return the largest distance of a heavy atom from their common plane (Å)."""
    positions = atoms.positions[atoms.numbers > 1]
    positions = positions - positions.mean(0)
    normal = np.linalg.svd(positions)[2][-1]
    return float(np.abs(positions @ normal).max())
