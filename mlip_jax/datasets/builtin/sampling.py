"""Geometries of one molecule: conformers, and thermal displacements of them on a molecular-mechanics surface.

Displacing atoms along Cartesian normal modes tears floppy molecules apart, since a torsion is a rotation and not a
straight line. Langevin dynamics stays on the surface, so bonds, angles and torsions all vary as they do at the
temperature asked for. Lengths are in Å, energies in kcal/mol and temperatures in K, RDKit's units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BOLTZMANN = 0.0019872043  # kcal/mol/K
ACCELERATION = 4.184e-4  # Å/fs^2 of 1 kcal/mol/Å on 1 amu

# What is drawn does not depend on the masses. With heavy hydrogens nothing vibrates fast, and steps are long.
MASS = 12.0  # amu
TIME_STEP = 2.0  # fs
FRICTION = 0.02  # 1/fs
STEPS_PER_FRAME = 200
FRAMES_PER_CONFORMER = 3


class Surface:
    """The molecular-mechanics energy of a molecule that has at least one conformer.

    Args:
      mol: RDKit molecule with explicit hydrogens and conformers.

    Attributes:
      name: 'MMFF94', or 'UFF' where MMFF94 has no parameters for some atom.

    Raises:
      ValueError: if neither force field has parameters for the molecule.
    """

    def __init__(self, mol):
        from rdkit.Chem import rdForceFieldHelpers as helpers

        self.shape = (mol.GetNumAtoms(), 3)
        if helpers.MMFFHasAllMoleculeParams(mol):
            self.name = "MMFF94"
            properties = helpers.MMFFGetMoleculeProperties(mol)
            self._build = lambda conf_id: helpers.MMFFGetMoleculeForceField(mol, properties, confId=conf_id)
        elif helpers.UFFHasAllMoleculeParams(mol):
            self.name = "UFF"
            self._build = lambda conf_id: helpers.UFFGetMoleculeForceField(mol, confId=conf_id)
        else:
            raise ValueError("neither MMFF94 nor UFF has parameters for this molecule")
        self._mol = mol
        self._field = self._build(mol.GetConformer().GetId())
        self._field.Initialize()

    def energy(self, positions: np.ndarray) -> float:
        """Energy in kcal/mol at positions (n, 3) in Å."""
        self._field.Initialize()
        return self._field.CalcEnergy(positions.ravel().tolist())

    def gradient(self, positions: np.ndarray) -> np.ndarray:
        """Gradient (n, 3) in kcal/mol/Å at positions (n, 3) in Å."""
        # CalcGrad alone would use interatomic distances remembered from the geometry before; Initialize forgets them.
        self._field.Initialize()
        return np.array(self._field.CalcGrad(positions.ravel().tolist())).reshape(self.shape)

    def minimum(self, conf_id: int, max_steps: int = 1000) -> np.ndarray:
        """Positions (n, 3) in Å of the minimum next to a conformer (or the best found in max_steps)."""
        field = self._build(conf_id)
        field.Initialize()
        field.Minimize(maxIts=max_steps)
        return self._mol.GetConformer(conf_id).GetPositions()

    def hessian(self, positions: np.ndarray, step: float = 1e-3) -> np.ndarray:
        """Second derivatives (3n, 3n) in kcal/mol/Å^2 by central differences of the gradient."""
        rows = []
        for index in range(positions.size):
            shift = np.zeros(positions.size)
            shift[index] = step
            shift = shift.reshape(self.shape)
            rows.append((self.gradient(positions + shift) - self.gradient(positions - shift)).ravel() / (2 * step))
        hessian = np.array(rows)
        return (hessian + hessian.T) / 2

    def soft_directions(self, positions: np.ndarray, floor: float = 20.0) -> np.ndarray:
        """Matrix S (3n, 3n) with S S^T the inverse Hessian, all curvatures raised to at least `floor` kcal/mol/Å^2.

        Columns are displacements that cost about the same energy: steps of a minimiser and small noise are well
        scaled in them. The floor keeps soft and negative modes from running away.
        """
        curvatures, modes = np.linalg.eigh(self.hessian(positions))
        return modes / np.sqrt(np.maximum(np.abs(curvatures), floor))


def embed(mol, num_conformers: int, seed: int, max_iterations: int = 0) -> list[int]:
    """Adds up to `num_conformers` ETKDG conformers to mol and returns their ids (at least one).

    RDKit tries `max_iterations` times for each; 0 is its own limit, ten times the number of atoms, with which it is at
    a molecule that has no geometry (by its stereochemistry, say) for half a minute.

    Raises:
      ValueError: if RDKit finds no three-dimensional geometry.
    """
    from rdkit.Chem import rdDistGeom

    options = rdDistGeom.ETKDGv3()
    options.randomSeed = seed
    options.numThreads = 1
    options.maxIterations = max_iterations
    ids = list(rdDistGeom.EmbedMultipleConfs(mol, num_conformers, options))
    if not ids:
        options.useRandomCoords = True
        ids = list(rdDistGeom.EmbedMultipleConfs(mol, num_conformers, options))
    if not ids:
        raise ValueError("RDKit found no three-dimensional geometry")
    return ids


def langevin(surface: Surface, positions: np.ndarray, temperature: float, num_frames: int,
             rng: np.random.Generator) -> np.ndarray:
    """Frames (num_frames, n, 3) in Å of Langevin dynamics (BAOAB) from a minimum at a temperature in K."""
    thermal = np.sqrt(BOLTZMANN * temperature * ACCELERATION / MASS)
    keep = np.exp(-FRICTION * TIME_STEP)
    half_kick = -0.5 * TIME_STEP * ACCELERATION / MASS
    # At a minimum half of the energy put in goes to the potential, so twice the temperature equilibrates at once.
    velocities = np.sqrt(2) * thermal * rng.standard_normal(surface.shape)
    gradient = surface.gradient(positions)
    frames = []
    for _ in range(num_frames):
        noise = np.sqrt(1 - keep**2) * thermal * rng.standard_normal((STEPS_PER_FRAME, *surface.shape))
        for kick in noise:
            velocities = velocities + half_kick * gradient
            positions = positions + 0.5 * TIME_STEP * velocities
            velocities = keep * velocities + kick
            positions = positions + 0.5 * TIME_STEP * velocities
            gradient = surface.gradient(positions)
            velocities = velocities + half_kick * gradient
        frames.append(positions)
    return np.array(frames)


def thermal_frames(surface: Surface, minima: Sequence[np.ndarray], num_frames: int,
                   temperatures: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Frames (num_frames, n, 3) in Å around the minima in turn, each trajectory at a temperature of its own.

    Args:
      surface: the :class:`Surface`.
      minima: sequence of positions (n, 3) in Å.
      num_frames: how many frames.
      temperatures: (lowest, highest) in K; drawn evenly in the logarithm.
      rng: numpy random generator.
    """
    frames = []
    trajectory = 0
    while len(frames) < num_frames:
        wanted = min(FRAMES_PER_CONFORMER, num_frames - len(frames))
        temperature = np.exp(rng.uniform(*np.log(temperatures)))
        frames.extend(langevin(surface, minima[trajectory % len(minima)], temperature, wanted, rng))
        trajectory += 1
    return np.array(frames).reshape(num_frames, *surface.shape)
