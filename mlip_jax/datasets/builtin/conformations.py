"""All labelled conformations of one molecule: what a worker process does."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ase.units import Bohr, Hartree

from mlip_jax.datasets.builtin import labels, sampling
from mlip_jax.datasets.builtin.molecules import Molecule
from mlip_jax.datasets.molecules.embedding import charge_and_unpaired

TEMPERATURES = (150.0, 2000.0)  # K, thermal frames
NEAR_MINIMUM_SHARE = 0.1
NEAR_MINIMUM_TEMPERATURES = (1.0, 50.0)  # K, harmonic noise on relaxed geometries
NEAR_MINIMUM_STEPS = 12
MAX_FORCE = 25.0  # eV/Å, largest norm of the force on an atom


class Task(NamedTuple):
    """What to make: a molecule, how many conformations of it, and the seed of the whole data set."""

    molecule: Molecule
    count: int
    seed: int


class Conformations(NamedTuple):
    """Labelled conformations of a molecule: m conformations of n atoms, lengths in bohr, energies in hartree.

    m may be smaller than asked for, and is zero where nothing could be made; `dropped` counts the reasons.
    """

    smiles: str  # mapped, hydrogens explicit, in atom order
    atomic_numbers: np.ndarray  # (n,) int16
    conformations: np.ndarray  # (m, n, 3) float32
    energies: np.ndarray  # (m,) float64
    gradients: np.ndarray  # (m, n, 3) float32
    formation_energies: np.ndarray  # (m,) float64
    atom_energies: dict[str, float]  # isolated atoms, by symbol
    force_field: str
    dropped: dict[str, int]


def make_conformations(task: Task) -> Conformations:
    """Samples and labels the conformations of one molecule.

    A pure function of the task (for one version of RDKit, tblite and numpy): neither the order of the molecules nor
    the process that it runs in plays a part.

    Args:
      task: a :class:`Task`.

    Returns:
      :class:`Conformations`. A molecule that cannot be embedded or has no parameters comes back without
      conformations, with the reason in `dropped`.
    """
    from rdkit import Chem

    rng = np.random.default_rng(stable_hash(task.seed, task.molecule.smiles))
    mol = Chem.AddHs(Chem.MolFromSmiles(task.molecule.smiles))
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], np.int16)
    try:
        atom_energies = {atom.GetSymbol(): labels.isolated_atom_energy(atom.GetAtomicNum()) for atom in mol.GetAtoms()}
        force_field, frames = _geometries(mol, numbers, task.count, rng)
    except ValueError as error:
        return nothing_made(mol, numbers, f"molecule: {error}", task.count)
    dropped = Counter({"scf": task.count - len(frames)})  # relaxations that did not converge
    return labelled(mol, numbers, frames, force_field, atom_energies, dropped)


def labelled(mol: Any, numbers: np.ndarray, frames: Sequence[np.ndarray], force_field: str,
             atom_energies: dict[str, float], dropped: Counter[str]) -> Conformations:
    """The frames with their labels, but for those that are not fit.

    Args:
      mol: RDKit molecule of n atoms. numbers: (n,). frames: Positions (n, 3) in Å of each.
      force_field: That they come from. atom_energies: hartree, by symbol.
      dropped: Reasons counted so far.
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


def nothing_made(mol: Any, numbers: np.ndarray, reason: str, count: int) -> Conformations:
    """What comes back of a molecule of which `count` conformations were to be made, and none could be."""
    nothing = np.zeros((0, len(numbers), 3), np.float32)
    return Conformations(mapped_smiles(mol), numbers, nothing, np.zeros(0), nothing, np.zeros(0), {}, "",
                         {reason: count})


def stable_hash(seed: int, text: str) -> int:
    """An integer that does not change between Python processes, as hash() does."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8], "little")


def mapped_smiles(mol: Any) -> str:
    """SMILES with every atom, hydrogens too, numbered from 1 in the order of the arrays."""
    from rdkit import Chem

    mapped = Chem.Mol(mol)
    for atom in mapped.GetAtoms():
        atom.SetAtomMapNum(atom.GetIdx() + 1)
    return Chem.MolToSmiles(mapped)


def _geometries(mol, numbers, count, rng):
    """Name of the force field and a list of up to `count` positions (n, 3) in Å."""
    near = max(1, round(NEAR_MINIMUM_SHARE * count)) if count >= 4 else 0
    wanted = -(-count // sampling.FRAMES_PER_CONFORMER)
    ids = sampling.embed(mol, max(wanted, near), int(rng.integers(2**31 - 1)))
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
    """Positions (n, 3) in Å a little off the GFN2-xTB minimum next to the given ones.

    The molecular-mechanics minima are not minima of GFN2-xTB: bonds differ by some 0.01 Å, forces by some 0.5 eV/Å.
    A force field that has never seen smaller forces would relax molecules poorly.
    """
    steps, directions = relax(mol, numbers, surface, positions, NEAR_MINIMUM_STEPS)
    temperature = np.exp(rng.uniform(*np.log(NEAR_MINIMUM_TEMPERATURES)))
    noise = np.sqrt(sampling.BOLTZMANN * temperature) * rng.standard_normal(positions.size)
    return positions + (directions @ (steps + noise)).reshape(-1, 3)


def relax(mol: Any, numbers: np.ndarray, surface: sampling.Surface, positions: np.ndarray,
          max_evaluations: int) -> tuple[np.ndarray, np.ndarray]:
    """Some steps of L-BFGS towards the GFN2-xTB minimum, in coordinates in which the molecular mechanics is round.

    Args:
      mol: RDKit molecule. numbers: (n,). surface: Of the molecule. positions: (n, 3) in Å.
      max_evaluations: Of GFN2-xTB.

    Returns:
      Steps (3n,) and the directions of surface.soft_directions (3n, 3n): what is relaxed is
      positions + (directions @ steps).reshape(-1, 3), in Å.

    Raises:
      NotConverged: From labels.energy_and_gradient.
    """
    from scipy.optimize import minimize

    charge, unpaired = charge_and_unpaired(mol)
    directions = surface.soft_directions(positions)

    def energy_and_slope(steps):
        moved = positions + (directions @ steps).reshape(-1, 3)
        energy, gradient = labels.energy_and_gradient(numbers, moved / Bohr, charge, unpaired)
        # eV; of the order of one per unit step, as the minimiser expects
        return energy * Hartree, directions.T @ gradient.ravel() * (Hartree / Bohr)

    best = minimize(energy_and_slope, np.zeros(positions.size), jac=True, method="L-BFGS-B",
                    options={"maxfun": max_evaluations})
    return best.x, directions


def _label(mol, numbers, frames, dropped):
    """Positions in bohr as stored, energies and gradients of the frames that are fit; counts the others."""
    charge, unpaired = charge_and_unpaired(mol)
    radii, bonded = labels.covalent_radii(numbers), labels.bond_matrix(mol)
    kept, energies, gradients = [], [], []
    for frame in frames:
        # Rounded first: the label belongs to the geometry that the file holds, to the last bit.
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
