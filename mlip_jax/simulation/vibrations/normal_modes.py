"""Normal modes of a molecule from its Hessian, without translations and rotations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# _CM_PER_ROOT: wave number (1/cm) of an eigenvalue of 1 eV/(Å² amu), sqrt(e / amu) / (2 pi c).
_CM_PER_ROOT = 521.470900
# _LINEAR: smallest moment of inertia over the largest, below which a molecule is linear.
_LINEAR = 1e-4


class NormalModes(NamedTuple):
    """Vibrations of a molecule of n atoms; K is 3n - 6, 3n - 5 if linear, 0 for one atom.

    Attributes:
      frequencies: Wave numbers (1/cm), ascending, (K,); imaginary ones are negative.
      displacements: Cartesian displacements of the modes, each of norm 1, (K, n, 3).
      reduced_masses: Reduced masses (amu) for displacements of norm 1, (K,).
      linear: Whether the molecule is linear.
    """

    frequencies: np.ndarray
    displacements: np.ndarray
    reduced_masses: np.ndarray
    linear: bool


def normal_modes(hessian: np.ndarray, positions: np.ndarray, masses: np.ndarray) -> NormalModes:
    """Compute the normal modes; translations and rotations are projected out.

    Args:
      hessian: Second derivatives of the energy (eV/Å²), (3n, 3n).
      positions: Positions (Å), (n, 3).
      masses: Masses (amu), (n,).
    """
    n, root = len(masses), np.sqrt(np.repeat(masses, 3))
    rigid = _rigid_motions(positions, masses)  # (3n, R), orthonormal
    linear = n > 1 and rigid.shape[1] == 5
    # basis of the internal motions, (3n, K): the complement of the rigid motions
    internal = np.linalg.svd(rigid, full_matrices=True)[0][:, rigid.shape[1] :]
    weighted = hessian / np.outer(root, root)
    eigenvalues, vectors = np.linalg.eigh(internal.T @ weighted @ internal)
    displacements = (internal @ vectors) / root[:, None]  # (3n, K)
    norms = np.linalg.norm(displacements, axis=0)
    return NormalModes(
        np.sign(eigenvalues) * np.sqrt(np.abs(eigenvalues)) * _CM_PER_ROOT,
        (displacements / norms).T.reshape(-1, n, 3),
        norms**-2.0,
        linear,
    )


def _rigid_motions(positions: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis of mass-weighted translations and rotations, (3n, R), R of 3, 5 or 6."""
    centered = positions - masses @ positions / masses.sum()
    root = np.sqrt(masses)[:, None]
    translations = [np.broadcast_to(axis, positions.shape) * root for axis in np.eye(3)]
    inertia = (masses * (centered**2).sum(1)).sum() * np.eye(3) - (centered.T * masses) @ centered
    moments, axes = np.linalg.eigh(inertia)
    turning = moments > _LINEAR * max(moments.max(), 1e-12)
    rotations = [np.cross(axis, centered) * root for axis in axes.T[turning]]
    motions = np.array([*translations, *rotations]).reshape(-1, positions.size).T
    return np.linalg.qr(motions)[0]


def rotational_symmetry_number(
    numbers: np.ndarray, positions: np.ndarray, masses: np.ndarray, tolerance: float = 0.05
) -> int:
    """Return the number of rotations that bring a molecule onto itself.

    Args:
      numbers: Atomic numbers, (n,).
      positions: Positions (Å), (n, 3).
      masses: Masses (amu), (n,): atoms of different isotopes are different.
      tolerance: Largest distance (Å) between an atom and the image of another one.
    """
    x = positions - masses @ positions / masses.sum()
    radii = np.linalg.norm(x, axis=1)
    kinds = np.unique(np.column_stack([numbers, masses]), axis=0, return_inverse=True)[1].ravel()
    if len(x) < 2:
        return 1
    if _rigid_motions(positions, masses).shape[1] == 5:
        return 2 if _maps_onto_itself(-x, x, kinds, tolerance) else 1
    # two atoms that are not on a line with the center determine a rotation
    first = int(np.argmax(radii))
    sines = np.linalg.norm(np.cross(x, x[first]), axis=1)
    second = int(np.argmax(sines))
    count, frame = 0, _frame(x[first], x[second])
    for i in _alike(first, kinds, radii, tolerance):
        for j in _alike(second, kinds, radii, tolerance):
            given = np.linalg.norm(x[first] - x[second])
            if i == j or abs(np.linalg.norm(x[i] - x[j]) - given) > 2 * tolerance:
                continue
            image = x @ (_frame(x[i], x[j]) @ frame.T).T
            count += _maps_onto_itself(image, x, kinds, tolerance)
    return max(count, 1)


def _alike(atom: int, kinds: np.ndarray, radii: np.ndarray, tolerance: float) -> np.ndarray:
    """Return the atoms of the same kind and at the same distance from the center."""
    return np.flatnonzero((kinds == kinds[atom]) & (np.abs(radii - radii[atom]) < tolerance))


def _frame(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the right-handed orthonormal frame of two vectors as columns, (3, 3)."""
    first = a / np.linalg.norm(a)
    third = np.cross(a, b)
    third = third / np.linalg.norm(third)
    return np.column_stack([first, np.cross(third, first), third])


def _maps_onto_itself(
    image: np.ndarray, positions: np.ndarray, kinds: np.ndarray, tolerance: float
) -> bool:
    """Return whether each atom of the image is at the position of an atom of its kind."""
    distances = np.linalg.norm(image[:, None] - positions[None], axis=-1)
    distances[kinds[:, None] != kinds[None]] = np.inf
    return bool((distances.min(axis=1) < tolerance).all())
