"""Phonons of a crystal from the exact Hessian of a supercell.

    n   atoms of the cell        R   cells of the supercell        Q   wave vectors

The dynamical matrix of a wave vector is the Fourier transform of the force constants between the
first cell and all cells. A pair of atoms acts along its shortest vectors in the supercell; those of
equal length share it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from ase import Atoms, units

from mlip_jax.graphs.long_range import in_cells
from mlip_jax.potential import Potential
from mlip_jax.simulation.calculators.calculator import MLIPCalculator
from mlip_jax.structure import STATES, electronic_value

# _TO_THZ: frequency (THz) of a force constant of 1 eV/Å² and a mass of 1 amu.
_TO_THZ = 1e3 * units.fs / (2 * np.pi)
# _QUANTUM: energy of a quantum of 1 THz (eV).
_QUANTUM = 4.135667696e-3
_SAME_LENGTH = 1e-3  # Å


@dataclasses.dataclass(frozen=True)
class ForceConstants:
    """Force constants of a crystal.

    Attributes:
      constants: Force constants between the first cell and all cells of the supercell (eV/Å²),
        (3 n, R, 3 n).
      vectors: Lattice translations of each pair of atoms in cells, (P, 3).
      pair: Atom of the first cell, cell and its atom of each of these translations, (P, 3).
      weights: Weights of these translations, (P,).
      masses: Masses (amu), (n,).
    """

    constants: np.ndarray
    vectors: np.ndarray
    pair: np.ndarray
    weights: np.ndarray
    masses: np.ndarray

    def frequencies(self, wave_vectors: np.ndarray) -> np.ndarray:
        """Return the frequencies (THz), ascending, (Q, 3 n); imaginary ones are negative.

        Args:
          wave_vectors: Wave vectors in reciprocal lattice vectors, (Q, 3).
        """
        n = len(self.masses)
        blocks = self.constants.reshape(n, 3, -1, n, 3).transpose(0, 2, 3, 1, 4)  # (n, R, n, 3, 3)
        i, cell, j = self.pair.T
        terms = self.weights[:, None, None] * blocks[i, cell, j]
        terms = terms / np.sqrt(self.masses[i] * self.masses[j])[:, None, None]
        result = []
        for q in np.atleast_2d(wave_vectors):
            phase = np.exp(2j * np.pi * (self.vectors @ q))
            matrix = np.zeros((n, n, 3, 3), complex)
            np.add.at(matrix, (i, j), phase[:, None, None] * terms)
            matrix = matrix.transpose(0, 2, 1, 3).reshape(3 * n, 3 * n)
            values = np.linalg.eigvalsh(0.5 * (matrix + matrix.conj().T))
            result.append(np.sign(values) * np.sqrt(np.abs(values)) * _TO_THZ)
        return np.array(result)


def supercell_repeats(atoms: Atoms, length: float) -> tuple[int, int, int]:
    """Return the numbers of cells of a supercell whose lattice planes are `length` Å apart."""
    heights = 1 / np.linalg.norm(np.linalg.inv(atoms.cell.complete().array), axis=0)
    repeats = np.where(atoms.pbc, np.maximum(np.ceil(length / heights - 1e-6), 1), 1)
    return tuple(int(x) for x in repeats)


def interaction_range(potential: Potential) -> float:
    """Return the distance (Å) up to which an atom influences the energy of another one.

    In a message-passing model this is the cutoff times the number of layers. Models without
    message passing set `local`. The smooth part of Ewald sums, which has no such distance, is not
    considered.
    """
    models = getattr(potential.model, "members", (potential.model,))
    bases = [getattr(model, "model", model) for model in models]
    layers = [1 if getattr(m, "local", False) else getattr(m, "num_layers", 1) for m in bases]
    return max(potential.cutoff * max(layers), in_cells(potential.long_range_cutoff) or 0.0)


def supercell_spacing(atoms: Atoms, repeats: Sequence[int]) -> float:
    """Return the smallest distance (Å) of the lattice planes of a supercell."""
    heights = 1 / np.linalg.norm(np.linalg.inv(atoms.cell.complete().array), axis=0)
    return float((heights * np.array(repeats))[atoms.pbc].min())


def compute_force_constants(
    atoms: Atoms, calculator: MLIPCalculator, repeats: tuple[int, int, int]
) -> ForceConstants:
    """Compute the force constants of a relaxed crystal.

    Args:
      atoms: Crystal at a minimum.
      calculator: Calculator in float64 of the force field.
      repeats: Numbers of cells of the supercell along the lattice vectors.
    """
    n, cells = len(atoms), np.array(list(itertools.product(*map(range, repeats))))
    plain = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    plain.wrap()  # the images below include the nearest ones only if atoms are within the cell
    supercell = plain.repeat(repeats)  # cell by cell, in the order of `cells`
    supercell.info = {name: electronic_value(atoms, name) * len(cells) for name in STATES}
    constants = calculator.get_hessian_columns(supercell, n).reshape(3 * n, len(cells), 3 * n)
    images = np.array(list(itertools.product(*((-1, 0, 1) if p else (0,) for p in atoms.pbc))))
    lattice = atoms.cell.complete().array
    scaled = plain.positions @ np.linalg.inv(lattice)
    # candidates (R, images, 3) of the translation to each cell, in cells
    candidates = cells[:, None] + images * np.array(repeats)
    vectors, pair, weights = [], [], []
    for i, j in itertools.product(range(n), range(n)):
        moves = (candidates + scaled[j] - scaled[i]) @ lattice
        lengths = np.linalg.norm(moves, axis=-1)  # (R, images)
        near = lengths < lengths.min(1, keepdims=True) + _SAME_LENGTH
        cell, image = np.nonzero(near)
        vectors.append(candidates[cell, image])
        pair.append(np.stack([np.full_like(cell, i), cell, np.full_like(cell, j)], axis=1))
        weights.append(1 / near.sum(1)[cell])
    return ForceConstants(
        constants,
        np.concatenate(vectors),
        np.concatenate(pair),
        np.concatenate(weights),
        atoms.get_masses(),
    )


def heat_capacity(frequencies: np.ndarray, temperature: float) -> float:
    """Return the heat capacity (k_B) of harmonic modes (THz); modes without frequency count as 1."""
    x = np.maximum(frequencies, 0) * _QUANTUM / (units.kB * temperature)
    small = x < 1e-4
    x = np.where(small, 1.0, x)
    return float(np.where(small, 1.0, (x / (2 * np.sinh(np.minimum(x, 700) / 2))) ** 2).sum())


def zero_point_energy(frequencies: np.ndarray) -> float:
    """Return half the sum of the quanta (eV) of modes (THz); imaginary modes contribute nothing."""
    return float(0.5 * np.maximum(frequencies, 0).sum() * _QUANTUM)
