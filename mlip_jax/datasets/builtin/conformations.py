"""Labeled conformations of one molecule, generated in a worker process."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ase.units import Bohr, Hartree

from mlip_jax.datasets.builtin import kinds, labels, sampling
from mlip_jax.datasets.builtin.molecules import Molecule
from mlip_jax.datasets.smiles.embedding import charge_and_unpaired

TEMPERATURES = (150.0, 2000.0)  # range of temperatures of the thermal frames (K)
NEAR_MINIMUM_SHARE = 0.1  # fraction of conformations that are near minima of GFN2-xTB
NEAR_MINIMUM_TEMPERATURES = (1.0, 50.0)  # range for harmonic noise on relaxed geometries (K)
NEAR_MINIMUM_STEPS = 12  # maximum number of GFN2-xTB evaluations per relaxation
MAX_FORCE = 25.0  # maximum norm of the force on an atom (eV/Å)


class Task(NamedTuple):
    """Job of `make_conformations`.

    Attributes:
      molecule: Molecule.
      count: Number of conformations.
      seed: Seed of the whole data set.
      kind: Kind of the geometries, one of kinds.KINDS.
    """

    molecule: Molecule
    count: int
    seed: int
    kind: str = kinds.CONFORMATIONS


class Conformations(NamedTuple):
    """Labeled conformations of a molecule: m conformations of n atoms, in bohr and hartree.

    m can be smaller than requested, and is zero if the molecule failed. `dropped` counts the
    missing conformations by reason.
    """

    smiles: str  # from `mapped_smiles`
    atomic_numbers: np.ndarray  # (n,) int16
    conformations: np.ndarray  # positions (bohr), (m, n, 3) float32
    energies: np.ndarray  # total energies (hartree), (m,) float64
    gradients: np.ndarray  # (hartree/bohr), (m, n, 3) float32
    formation_energies: np.ndarray  # total energies minus isolated atoms (hartree), (m,) float64
    atom_energies: dict[str, float]  # energies of isolated atoms (hartree), by symbol
    force_field: str  # force field of the sampling, "MMFF94", "UFF" or ""
    dropped: dict[str, int]  # missing conformations by reason


def make_conformations(task: Task) -> Conformations:
    """Sample and label the conformations of one molecule.

    The result depends only on the task and the versions of RDKit, tblite and NumPy, not on the
    order of the molecules or the process.

    Args:
      task: Molecule, number of conformations and seed.

    Returns:
      Conformations. They are empty, with a reason in `dropped`, if the molecule cannot be embedded
      or lacks parameters.
    """
    from rdkit import Chem

    rng = np.random.default_rng(stable_hash(task.seed, task.molecule.smiles))
    mol = Chem.AddHs(Chem.MolFromSmiles(task.molecule.smiles))
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], np.int16)
    try:
        atom_energies = {
            atom.GetSymbol(): labels.isolated_atom_energy(atom.GetAtomicNum())
            for atom in mol.GetAtoms()
        }
        sample = kinds.FRAMES.get(task.kind, _geometries)
        force_field, frames = sample(mol, numbers, task.count, rng)
    except (ValueError, RuntimeError) as error:  # RDKit raises both
        return empty_result(mol, numbers, f"molecule: {error}", task.count)
    dropped = Counter({"scf": task.count - len(frames)})  # relaxations without SCF convergence
    return label_frames(mol, numbers, frames, force_field, atom_energies, dropped)


def label_frames(
    mol: Any,
    numbers: np.ndarray,
    frames: Sequence[np.ndarray],
    force_field: str,
    atom_energies: dict[str, float],
    dropped: Counter[str],
) -> Conformations:
    """Label the frames and drop the unusable ones.

    Args:
      mol: RDKit molecule of n atoms.
      numbers: Atomic numbers, (n,).
      frames: Positions of each frame (Å), (n, 3).
      force_field: Name of the force field that generated the frames.
      atom_energies: Energies of isolated atoms (hartree) by symbol.
      dropped: Counts of dropped frames by reason, updated in place.
    """
    kept, energies, gradients = _label(mol, numbers, frames, dropped)
    shape = (len(kept), len(numbers), 3)
    baseline = sum(atom_energies[atom.GetSymbol()] for atom in mol.GetAtoms())
    return Conformations(
        smiles=mapped_smiles(mol),
        atomic_numbers=numbers,
        conformations=np.array(kept, np.float32).reshape(shape),
        energies=np.array(energies, np.float64),
        gradients=np.array(gradients, np.float32).reshape(shape),
        formation_energies=np.array(energies, np.float64) - baseline,
        atom_energies=atom_energies,
        force_field=force_field,
        dropped={reason: int(number) for reason, number in sorted(dropped.items()) if number},
    )


def empty_result(mol: Any, numbers: np.ndarray, reason: str, count: int) -> Conformations:
    """Return empty conformations for a failed molecule, with `count` dropped for `reason`."""
    nothing = np.zeros((0, len(numbers), 3), np.float32)
    return Conformations(
        mapped_smiles(mol),
        numbers,
        nothing,
        np.zeros(0),
        nothing,
        np.zeros(0),
        {},
        "",
        {reason: count},
    )


def stable_hash(seed: int, text: str) -> int:
    """Return an integer hash that, unlike hash(), is the same in all Python processes."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8], "little")


def mapped_smiles(mol: Any) -> str:
    """Return the SMILES with explicit hydrogens and map numbers from 1 in the order of atoms."""
    from rdkit import Chem

    mapped = Chem.Mol(mol)
    for atom in mapped.GetAtoms():
        atom.SetAtomMapNum(atom.GetIdx() + 1)
    return Chem.MolToSmiles(mapped)


def _geometries(mol, numbers, count, rng):
    """Return the name of the force field and up to `count` positions (Å), (n, 3)."""
    near = max(1, round(NEAR_MINIMUM_SHARE * count)) if count >= 4 else 0
    num_conformers = -(-count // sampling.FRAMES_PER_CONFORMER)
    ids = sampling.embed(mol, max(num_conformers, near), int(rng.integers(2**31 - 1)))
    surface = sampling.Surface(mol)
    minima = [surface.minimum(conf_id) for conf_id in ids]
    frames = list(sampling.thermal_frames(surface, minima, count - near, TEMPERATURES, rng))
    for index in range(near):
        try:
            frames.append(_near_minimum(mol, numbers, surface, minima[index % len(minima)], rng))
        except labels.NotConverged:
            continue
    return surface.name, frames


def _near_minimum(mol, numbers, surface, positions, rng):
    """Return positions (Å), (n, 3), slightly displaced from the next GFN2-xTB minimum.

    Molecular-mechanics minima are not minima of GFN2-xTB: bond lengths differ by some 0.01 Å and
    forces by some 0.5 eV/Å. A force field trained without smaller forces would relax molecules
    poorly.
    """
    steps, directions = relax(mol, numbers, surface, positions, NEAR_MINIMUM_STEPS)
    temperature = np.exp(rng.uniform(*np.log(NEAR_MINIMUM_TEMPERATURES)))
    noise = np.sqrt(sampling.BOLTZMANN * temperature) * rng.standard_normal(positions.size)
    return positions + (directions @ (steps + noise)).reshape(-1, 3)


def relax(
    mol: Any,
    numbers: np.ndarray,
    surface: sampling.Surface,
    positions: np.ndarray,
    max_evaluations: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Run L-BFGS toward the GFN2-xTB minimum, preconditioned by the molecular-mechanics Hessian.

    Args:
      mol: RDKit molecule of n atoms.
      numbers: Atomic numbers, (n,).
      surface: Molecular-mechanics surface of the molecule.
      positions: Initial positions (Å), (n, 3).
      max_evaluations: Maximum number of GFN2-xTB evaluations.

    Returns:
      Steps, (3n,), and directions from surface.soft_directions, (3n, 3n). The relaxed positions are
      positions + (directions @ steps).reshape(-1, 3) in Å.

    Raises:
      NotConverged: The SCF of an evaluation did not converge.
    """
    from scipy.optimize import minimize

    charge, unpaired = charge_and_unpaired(mol)
    directions = surface.soft_directions(positions)

    def energy_and_slope(steps):
        """Return the energy (eV) and its derivative with respect to the steps."""
        moved = positions + (directions @ steps).reshape(-1, 3)
        energy, gradient = labels.energy_and_gradient(numbers, moved / Bohr, charge, unpaired)
        # In eV, the gradient is of order one per unit step, as the minimizer expects.
        return energy * Hartree, directions.T @ gradient.ravel() * (Hartree / Bohr)

    best = minimize(
        energy_and_slope,
        np.zeros(positions.size),
        jac=True,
        method="L-BFGS-B",
        options={"maxfun": max_evaluations},
    )
    return best.x, directions


def _label(mol, numbers, frames, dropped):
    """Return positions (bohr, float32), energies and gradients of usable frames; count the rest."""
    charge, unpaired = charge_and_unpaired(mol)
    radii, bonded = labels.covalent_radii(numbers), labels.bond_matrix(mol)
    kept, energies, gradients = [], [], []
    for frame in frames:
        # Round first, so that the label is of exactly the geometry in the file.
        positions = np.asarray(frame / Bohr, np.float32)
        if not labels.is_intact(positions * Bohr, radii, bonded):
            dropped["connectivity"] += 1
            continue
        try:
            energy, gradient = labels.energy_and_gradient(numbers, positions, charge, unpaired)
        except labels.NotConverged:
            dropped["scf"] += 1
            continue
        if np.linalg.norm(gradient, axis=1).max() * Hartree / Bohr > MAX_FORCE:
            dropped["force"] += 1
            continue
        kept.append(positions)
        energies.append(energy)
        gradients.append(gradient)
    return kept, energies, gradients
