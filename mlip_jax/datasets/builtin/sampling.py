"""Sampling of geometries of one molecule: conformers and thermal frames by molecular mechanics.

Displacements along Cartesian normal modes would break flexible molecules, because a torsion is a
rotation and not a straight line. Langevin dynamics instead samples bonds, angles and torsions at
the requested temperature. Units are those of RDKit: Å, kcal/mol and K.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BOLTZMANN = 0.0019872043  # kcal/mol/K
ACCELERATION = 4.184e-4  # acceleration (Å/fs^2) of 1 amu by a force of 1 kcal/mol/Å

# The sampled distribution does not depend on the masses. With heavy hydrogens there are no fast
# vibrations, which allows for a large time step.
MASS = 12.0  # amu, of all atoms
TIME_STEP = 2.0  # fs
FRICTION = 0.02  # 1/fs
STEPS_PER_FRAME = 200
FRAMES_PER_CONFORMER = 3


class Surface:
    """Molecular-mechanics energy surface of a molecule.

    Args:
      mol: RDKit molecule with explicit hydrogens and at least one conformer.
      interfragment: Whether separate fragments of `mol` interact.

    Attributes:
      name: "MMFF94", or "UFF" if MMFF94 lacks parameters for some atom.
      shape: Shape of the positions, (n, 3).

    Raises:
      ValueError: MMFF94 and UFF lack parameters for the molecule.
    """

    def __init__(self, mol, interfragment: bool = False):
        from rdkit.Chem import rdForceFieldHelpers as helpers

        # Older versions register its classes only on this import.
        from rdkit.ForceField import rdForceField  # noqa: F401

        self.shape = (mol.GetNumAtoms(), 3)
        if helpers.MMFFHasAllMoleculeParams(mol):
            self.name = "MMFF94"
            properties = helpers.MMFFGetMoleculeProperties(mol)
            self._build = lambda conf_id: helpers.MMFFGetMoleculeForceField(
                mol, properties, confId=conf_id, ignoreInterfragInteractions=not interfragment
            )
        elif helpers.UFFHasAllMoleculeParams(mol):
            self.name = "UFF"
            self._build = lambda conf_id: helpers.UFFGetMoleculeForceField(
                mol, confId=conf_id, ignoreInterfragInteractions=not interfragment
            )
        else:
            raise ValueError("neither MMFF94 nor UFF has parameters for this molecule")
        self._mol = mol
        self._field = self._build(mol.GetConformer().GetId())
        self._field.Initialize()

    def energy(self, positions: np.ndarray) -> float:
        """Compute the energy (kcal/mol) at positions (Å), (n, 3)."""
        self._field.Initialize()
        return self._field.CalcEnergy(positions.ravel().tolist())

    def gradient(self, positions: np.ndarray) -> np.ndarray:
        """Compute the gradient (kcal/mol/Å), (n, 3), at positions (Å), (n, 3)."""
        # CalcGrad uses cached distances of the previous geometry, which Initialize clears.
        self._field.Initialize()
        return np.array(self._field.CalcGrad(positions.ravel().tolist())).reshape(self.shape)

    def minimum(
        self,
        conf_id: int,
        max_steps: int = 1000,
        held: Sequence[tuple[tuple[int, int, int, int], float]] = (),
        stiffness: float = 0.0,
    ) -> np.ndarray:
        """Relax a conformer by at most `max_steps` steps and return its positions (Å), (n, 3).

        Args:
          conf_id: Conformer of the molecule, changed in place.
          max_steps: Maximum number of steps.
          held: Torsions that are held, as four atoms and the angle (degrees).
          stiffness: Force constant that holds them, kcal/mol/rad^2.
        """
        field = self._build(conf_id)
        field.Initialize()
        hold = (
            field.MMFFAddTorsionConstraint
            if self.name == "MMFF94"
            else field.UFFAddTorsionConstraint
        )
        for torsion, angle in held:
            hold(*torsion, False, angle, angle, stiffness)
        field.Minimize(maxIts=max_steps)
        return self._mol.GetConformer(conf_id).GetPositions()

    def hessian(self, positions: np.ndarray, step: float = 1e-3) -> np.ndarray:
        """Compute the Hessian (kcal/mol/Å^2), (3n, 3n), by central differences of the gradient."""
        rows = []
        for index in range(positions.size):
            shift = np.zeros(positions.size)
            shift[index] = step
            shift = shift.reshape(self.shape)
            rows.append(
                (self.gradient(positions + shift) - self.gradient(positions - shift)).ravel()
                / (2 * step)
            )
        hessian = np.array(rows)
        return (hessian + hessian.T) / 2

    def soft_directions(self, positions: np.ndarray, floor: float = 20.0) -> np.ndarray:
        """Return a matrix S, (3n, 3n), such that S S^T is the inverse of the Hessian.

        Curvatures are replaced by their absolute values, but at least `floor` (kcal/mol/Å^2), which
        limits displacements along soft and negative modes. The columns of S are displacements of
        about equal energy, so they are well-scaled coordinates for a minimizer and for small noise.
        """
        curvatures, modes = np.linalg.eigh(self.hessian(positions))
        return modes / np.sqrt(np.maximum(np.abs(curvatures), floor))


def embed(mol, num_conformers: int, seed: int, max_iterations: int = 0) -> list[int]:
    """Add up to `num_conformers` ETKDG conformers to `mol` and return their ids (at least one).

    Args:
      mol: RDKit molecule with explicit hydrogens.
      num_conformers: Maximum number of conformers.
      seed: Seed of the embedding.
      max_iterations: Maximum number of attempts per conformer. 0 is RDKit's default, ten times the
        number of atoms, which takes half a minute for a molecule without any geometry (because of
        its stereochemistry, for instance).

    Raises:
      ValueError: RDKit found no three-dimensional geometry.
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


def langevin(
    surface: Surface,
    positions: np.ndarray,
    temperature: float,
    num_frames: int,
    rng: np.random.Generator,
    *,
    steps: int = STEPS_PER_FRAME,
) -> np.ndarray:
    """Run Langevin dynamics (BAOAB) from a minimum and return frames (Å), (num_frames, n, 3).

    Args:
      surface: Energy surface.
      positions: Positions of the minimum (Å), (n, 3).
      temperature: Temperature (K).
      num_frames: Number of frames.
      rng: NumPy random generator.
      steps: Number of steps per frame.
    """
    thermal = np.sqrt(BOLTZMANN * temperature * ACCELERATION / MASS)
    keep = np.exp(-FRICTION * TIME_STEP)
    half_kick = -0.5 * TIME_STEP * ACCELERATION / MASS
    # From a minimum, half of the kinetic energy becomes potential energy. Velocities at twice the
    # temperature therefore equilibrate immediately.
    velocities = np.sqrt(2) * thermal * rng.standard_normal(surface.shape)
    gradient = surface.gradient(positions)
    frames = []
    for _ in range(num_frames):
        noise = np.sqrt(1 - keep**2) * thermal * rng.standard_normal((steps, *surface.shape))
        for kick in noise:  # half kick, half drift, thermostat, half drift, half kick
            velocities = velocities + half_kick * gradient
            positions = positions + 0.5 * TIME_STEP * velocities
            velocities = keep * velocities + kick
            positions = positions + 0.5 * TIME_STEP * velocities
            gradient = surface.gradient(positions)
            velocities = velocities + half_kick * gradient
        frames.append(positions)
    return np.array(frames)


def thermal_frames(
    surface: Surface,
    minima: Sequence[np.ndarray],
    num_frames: int,
    temperatures: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:
    """Sample frames (Å), (num_frames, n, 3), by short trajectories that cycle through the minima.

    Args:
      surface: Energy surface.
      minima: Positions of each minimum (Å), (n, 3).
      num_frames: Number of frames.
      temperatures: Lowest and highest temperature (K). The temperature of each trajectory is drawn
        uniformly in the logarithm.
      rng: NumPy random generator.
    """
    frames = []
    trajectory = 0
    while len(frames) < num_frames:
        count = min(FRAMES_PER_CONFORMER, num_frames - len(frames))
        temperature = np.exp(rng.uniform(*np.log(temperatures)))
        frames.extend(langevin(surface, minima[trajectory % len(minima)], temperature, count, rng))
        trajectory += 1
    return np.array(frames).reshape(num_frames, *surface.shape)
