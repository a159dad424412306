"""Conformers of one molecule as in GEOM: distinct minima without vibrations, labeled by GFN2-xTB.

GEOM (Axelrod and Gómez-Bombarelli, Sci. Data 9, 185 (2022)) has conformers from CREST at minima of
GFN2-xTB. Here the conformers are built in four steps:

1. RDKit's ETKDG draws geometries (Riniker and Landrum, J. Chem. Inf. Model. 55, 2562 (2015)).
2. MMFF94 relaxes them.
3. Duplicates, up to the symmetry of the molecule, are removed.
4. Optionally, a few steps of relaxation with GFN2-xTB reduce the differences between both methods,
   most of all in bond lengths. Each evaluation costs as much as a single point.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from mlip_jax.datasets.builtin import labels, sampling
from mlip_jax.datasets.builtin.conformations import (
    Conformations,
    empty_result,
    label_frames,
    relax,
    stable_hash,
)
from mlip_jax.datasets.builtin.molecules import Molecule

_MAX_ITERATIONS = 30  # maximum number of ETKDG iterations per conformer
_MAX_SYMMETRIES = 1_000  # maximum number of symmetries of the heavy atoms that RDKit tries


class ConformerOptions(NamedTuple):
    """Options for building conformers.

    Attributes:
      num_conformers: Maximum number of conformers per molecule. Those with the lowest MMFF94 (or
        UFF) energies are kept.
      min_conformers: Minimum number of distinct conformers. Molecules with fewer are skipped before
        labeling.
      candidates: Number of ETKDG geometries per requested conformer.
      prune_rmsd: Heavy-atom RMSD (Å) up to which two conformers count as duplicates.
      mmff_steps: Maximum number of steps of the MMFF94 (or UFF) minimization.
      gfn2_steps: Maximum number of GFN2-xTB evaluations for the relaxation of each conformer; 0 for
        single points only.
    """

    num_conformers: int = 20
    min_conformers: int = 1
    candidates: float = 2.0
    prune_rmsd: float = 0.25
    mmff_steps: int = 1000
    gfn2_steps: int = 0


class ConformerTask(NamedTuple):
    """Job of `make_conformers`.

    Attributes:
      molecule: Molecule.
      count: Maximum number of conformers.
      options: Options for building conformers.
      seed: Seed of the whole data set.
    """

    molecule: Molecule
    count: int
    options: ConformerOptions
    seed: int


def make_conformers(task: ConformerTask) -> Conformations:
    """Build the labeled conformers of one molecule, in order of their MMFF94 or UFF energies.

    The result depends only on the task and the versions of RDKit, tblite and NumPy, as in
    `make_conformations`.

    Returns:
      Conformations. They are empty, with a reason in `dropped`, if the molecule cannot be embedded,
      lacks parameters or has fewer conformers than options.min_conformers.
    """
    from rdkit import Chem

    options, count = task.options, task.count
    mol = Chem.AddHs(Chem.MolFromSmiles(task.molecule.smiles))
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], np.int16)
    try:
        atom_energies = {
            atom.GetSymbol(): labels.isolated_atom_energy(atom.GetAtomicNum())
            for atom in mol.GetAtoms()
        }
        surface, minima = _minima(mol, task)
    except ValueError as error:
        return empty_result(mol, numbers, f"molecule: {error}", count)
    if len(minima) < options.min_conformers:
        return empty_result(mol, numbers, "too few conformers", count)
    dropped = Counter({"fewer different conformers": count - len(minima)})
    frames = []
    for positions in minima:
        try:
            frames.append(_relax(mol, numbers, surface, positions, options.gfn2_steps))
        except labels.NotConverged:
            dropped["scf"] += 1
    return label_frames(mol, numbers, frames, surface.name, atom_energies, dropped)


def _minima(mol: Any, task: ConformerTask) -> tuple[sampling.Surface, list[np.ndarray]]:
    """Return the surface and at most `task.count` of its distinct minima (Å), (n, 3), by energy."""
    options = task.options
    num_geometries = max(round(options.candidates * task.count), 1)
    ids = sampling.embed(
        mol,
        num_geometries,
        stable_hash(task.seed, task.molecule.smiles) & 0x7FFFFFFF,
        _MAX_ITERATIONS,
    )
    surface = sampling.Surface(mol)
    minima = [surface.minimum(conf_id, options.mmff_steps) for conf_id in ids]
    # Keep the lowest minima that differ from all lower ones.
    order = np.argsort([surface.energy(positions) for positions in minima], kind="stable")
    distances = _heavy_atom_rmsd(mol)
    kept: list[int] = []
    for candidate in order.tolist():
        if len(kept) < task.count and all(
            distances[candidate, k] > options.prune_rmsd for k in kept
        ):
            kept.append(candidate)
    return surface, [minima[k] for k in kept]


def _heavy_atom_rmsd(mol: Any) -> np.ndarray:
    """Return the heavy-atom RMSDs between all m conformers of a molecule (Å), (m, m).

    Each RMSD is the minimum over the symmetries of the heavy atoms.
    """
    from rdkit import Chem
    from rdkit.Chem import rdMolAlign

    heavy = Chem.RemoveHs(mol)
    m = heavy.GetNumConformers()
    distances = np.zeros((m, m))
    if m > 1:
        # RDKit aligns the conformers in place, which is safe because `heavy` is a copy.
        rmsds = rdMolAlign.GetAllConformerBestRMS(heavy, numThreads=1, maxMatches=_MAX_SYMMETRIES)
        distances[np.tril_indices(m, -1)] = rmsds  # (1, 0), (2, 0), (2, 1), ...
    return distances + distances.T


def _relax(mol, numbers, surface, positions, gfn2_steps) -> np.ndarray:
    """Relax positions (Å), (n, 3), by a few GFN2-xTB evaluations; unchanged if the number is 0."""
    if not gfn2_steps:
        return positions
    steps, directions = relax(mol, numbers, surface, positions, gfn2_steps)
    return positions + (directions @ steps).reshape(-1, 3)
