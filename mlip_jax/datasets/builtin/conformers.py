"""Conformers of one molecule as GEOM has them: different minima and no vibrations, labelled by GFN2-xTB.

GEOM (Axelrod and Gómez-Bombarelli, Sci. Data 9, 185 (2022)) takes its conformers from CREST, at minima of GFN2-xTB.
Here RDKit's ETKDG draws them (Riniker and Landrum, J. Chem. Inf. Model. 55, 2562 (2015)), MMFF94 relaxes them, and
those that are the same up to the symmetry of the molecule are kept once. Some steps on the surface of GFN2-xTB itself
take out what the two disagree about, bond lengths most of all, and cost as many single points.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from mlip_jax.datasets.builtin import labels, sampling
from mlip_jax.datasets.builtin.conformations import (
    Conformations,
    labelled,
    nothing_made,
    relax,
    stable_hash,
)
from mlip_jax.datasets.builtin.molecules import Molecule

_MAX_ITERATIONS = 30  # of ETKDG for a conformer
_MAX_SYMMETRIES = 1_000  # of a molecule's heavy atoms that RDKit looks through


class ConformerOptions(NamedTuple):
    """How conformers are made.

    Attributes:
      num_conformers: Of a molecule, at most; those of the lowest energy by the force field.
      min_conformers: A molecule with fewer different ones is left out, before anything is labelled.
      candidates: ETKDG geometries for each conformer that is wanted.
      prune_rmsd: Å over the heavy atoms; conformers closer than that are the same.
      mmff_steps: Of the force field's minimisation, at most.
      gfn2_steps: Evaluations of GFN2-xTB to relax each conformer with; 0: single points only.
    """

    num_conformers: int = 20
    min_conformers: int = 1
    candidates: float = 2.0
    prune_rmsd: float = 0.25
    mmff_steps: int = 1000
    gfn2_steps: int = 0


class ConformerTask(NamedTuple):
    """A molecule, how many conformers of it at most, how to make them, and the seed of the whole data set."""

    molecule: Molecule
    count: int
    options: ConformerOptions
    seed: int


def make_conformers(task: ConformerTask) -> Conformations:
    """The labelled conformers of one molecule, by energy of the force field.

    A pure function of the task (for one version of RDKit, tblite and numpy), as `make_conformations` is.

    Returns:
      Conformations; none of a molecule that has no geometry or no parameters, or fewer conformers than
      options.min_conformers: the reason is in `dropped`.
    """
    from rdkit import Chem

    options, count = task.options, task.count
    mol = Chem.AddHs(Chem.MolFromSmiles(task.molecule.smiles))
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], np.int16)
    try:
        atom_energies = {atom.GetSymbol(): labels.isolated_atom_energy(atom.GetAtomicNum()) for atom in mol.GetAtoms()}
        surface, minima = _minima(mol, task)
    except ValueError as error:
        return nothing_made(mol, numbers, f"molecule: {error}", count)
    if len(minima) < options.min_conformers:
        return nothing_made(mol, numbers, "too few conformers", count)
    dropped = Counter({"fewer different conformers": count - len(minima)})
    frames = []
    for positions in minima:
        try:
            frames.append(_relaxed(mol, numbers, surface, positions, options.gfn2_steps))
        except labels.NotConverged:
            dropped["scf"] += 1
    return labelled(mol, numbers, frames, surface.name, atom_energies, dropped)


def _minima(mol: Any, task: ConformerTask) -> tuple[sampling.Surface, list[np.ndarray]]:
    """The force field and its different minima (n, 3) in Å, at most as many as wanted, by energy."""
    options = task.options
    wanted = max(round(options.candidates * task.count), 1)
    ids = sampling.embed(mol, wanted, stable_hash(task.seed, task.molecule.smiles) & 0x7FFFFFFF, _MAX_ITERATIONS)
    surface = sampling.Surface(mol)
    minima = [surface.minimum(conf_id, options.mmff_steps) for conf_id in ids]
    order = np.argsort([surface.energy(positions) for positions in minima], kind="stable")
    distances = _heavy_atom_rmsd(mol)
    kept: list[int] = []
    for candidate in order.tolist():
        if len(kept) < task.count and all(distances[candidate, k] > options.prune_rmsd for k in kept):
            kept.append(candidate)
    return surface, [minima[k] for k in kept]


def _heavy_atom_rmsd(mol: Any) -> np.ndarray:
    """Between all conformers of a molecule, the best over the symmetries of its heavy atoms, (m, m) Å."""
    from rdkit import Chem
    from rdkit.Chem import rdMolAlign

    heavy = Chem.RemoveHs(mol)
    m = heavy.GetNumConformers()
    distances = np.zeros((m, m))
    if m > 1:
        # aligns the conformers of `heavy`, which is a copy
        found = rdMolAlign.GetAllConformerBestRMS(heavy, numThreads=1, maxMatches=_MAX_SYMMETRIES)
        distances[np.tril_indices(m, -1)] = found  # (1, 0), (2, 0), (2, 1), ...
    return distances + distances.T


def _relaxed(mol, numbers, surface, positions, gfn2_steps) -> np.ndarray:
    if not gfn2_steps:
        return positions
    steps, directions = relax(mol, numbers, surface, positions, gfn2_steps)
    return positions + (directions @ steps).reshape(-1, 3)
