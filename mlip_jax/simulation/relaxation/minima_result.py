"""Minima of a molecule and their Boltzmann populations."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from ase import Atoms, units


@dataclasses.dataclass
class Minimum:
    """Minimum of a molecule.

    Attributes:
      atoms: Geometry with energy and forces.
      energy: Energy (eV).
      round: Round that found it first; 0 is that of the starting geometries.
      times: How often it was found.
      mirror_images: 2 if it stands for itself and its mirror image, otherwise 1.
    """

    atoms: Atoms
    energy: float
    round: int
    times: int = 1
    mirror_images: int = 1


@dataclasses.dataclass
class MinimaResult:
    """Result of the search for one molecule.

    Attributes:
      minima: Minima by energy, the lowest first.
      relaxed: Number of relaxed geometries per round.
      new: Number of new minima per round.
      left_out: Number of rejected geometries by reason.
    """

    minima: list[Minimum]
    relaxed: list[int]
    new: list[int]
    left_out: collections.Counter

    def populations(self, temperature: float = 298.15) -> np.ndarray:
        """Return the Boltzmann populations of the minima by their energies, (K,), with sum 1.

        Args:
          temperature: Temperature (K).
        """
        return boltzmann_populations(
            [m.energy for m in self.minima], [m.mirror_images for m in self.minima], temperature
        )


def boltzmann_populations(
    energies: Sequence[float], degeneracies: Sequence[int], temperature: float
) -> np.ndarray:
    """Return the populations of states with energies (eV) and degeneracies, (K,), with sum 1."""
    relative = np.asarray(energies, np.float64) - min(energies, default=0.0)
    weights = np.asarray(degeneracies) * np.exp(-relative / (units.kB * temperature))
    return weights / max(weights.sum(), 1.0)
