"""Candidates that need no force field: conformers and displaced conformers of each molecule.

given        geometries of the user
conformers   geometries of RDKit
modes        displacements along the normal modes of MMFF94 or UFF, at a random temperature
random       displacements of every atom by Gaussian noise
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlip_jax import workers
from mlip_jax.datasets.builtin import sampling
from mlip_jax.datasets.builtin.conformations import stable_hash
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.molecules.symmetry import molecule_of
from mlip_jax.label_budget.geometry import is_physical
from mlip_jax.label_budget.pool import PoolMolecule
from mlip_jax.structure import Structure, from_ase

GIVEN, CONFORMERS, MODES, RANDOM = "given", "conformers", "modes", "random"
_ATTEMPTS = 3  # displacements that are tried per candidate until one is physical


class Displacements(NamedTuple):
    """Options of the displaced conformers.

    Attributes:
      kinds: Kinds of candidates: "conformers", "modes", "random".
      per_molecule: Number of candidates per molecule.
      temperatures: Lowest and highest temperature of the normal modes (K).
      amplitude: Largest standard deviation of the random displacements (Å).
      seed: Seed.
    """

    kinds: tuple[str, ...]
    per_molecule: int
    temperatures: tuple[float, float]
    amplitude: float
    seed: int


def propose(
    molecules: Sequence[PoolMolecule], options: Displacements, num_processes: int | None
) -> Columns:
    """Return the candidates of molecules, in their order.

    The result depends only on the molecules and the options, not on the number of processes.

    Args:
      molecules: Molecules.
      options: Options of the displacements.
      num_processes: Number of worker processes; None for one per core.
    """
    jobs = [(molecule, options) for molecule in molecules]
    stream = workers.stream(_candidates, jobs, num_processes, on_death=_starting_geometries)
    return Columns.from_structures(s for of_molecule in stream for s in of_molecule)


def _candidates(job: tuple[PoolMolecule, Displacements]) -> list[Structure]:
    """Return the candidates of one molecule."""
    molecule, options = job
    rng = np.random.default_rng(stable_hash(options.seed, molecule.name))
    structures = _starting_geometries(job)[: options.per_molecule]
    kinds = [kind for kind in (MODES, RANDOM) if kind in options.kinds]
    surface = _surface(molecule) if MODES in kinds else None
    if surface is None and MODES in kinds:
        kinds = [kind for kind in kinds if kind != MODES] or [RANDOM]
    bases = [atoms.positions for atoms in molecule.geometries]
    directions = functools.cache(lambda k: surface.soft_directions(bases[k]))
    for number in range(options.per_molecule - len(structures)):
        if not kinds:
            break
        kind, base = kinds[number % len(kinds)], (number // len(kinds)) % len(bases)
        for _ in range(_ATTEMPTS):
            if kind == MODES:
                positions = _displace(bases[base], directions(base), options.temperatures, rng)
            else:
                width = options.amplitude * rng.uniform(0.2, 1.0)
                positions = bases[base] + width * rng.standard_normal(bases[base].shape)
            if is_physical(molecule.geometries[base], positions):
                structures.append(_structure(molecule, base, kind, positions))
                break
    return structures


def _starting_geometries(job: tuple[PoolMolecule, Displacements]) -> list[Structure]:
    """Return the geometries of a molecule as candidates."""
    molecule, options = job
    if molecule.embedded and CONFORMERS not in options.kinds:
        return []
    kind = CONFORMERS if molecule.embedded else GIVEN
    return [
        _structure(molecule, k, kind, atoms.positions)
        for k, atoms in enumerate(molecule.geometries)
    ]


def _displace(
    positions: np.ndarray,
    directions: np.ndarray,
    temperatures: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:
    """Return positions (Å), (n, 3), with harmonic noise at a temperature that is drawn."""
    temperature = np.exp(rng.uniform(*np.log(temperatures)))
    noise = np.sqrt(sampling.BOLTZMANN * temperature) * rng.standard_normal(positions.size)
    return positions + (directions @ noise).reshape(-1, 3)


def _surface(molecule: PoolMolecule) -> sampling.Surface | None:
    """Return the molecular-mechanics surface of a molecule; None if RDKit has no parameters."""
    from rdkit import Chem, rdBase
    from rdkit.Geometry import Point3D

    atoms = molecule.geometries[0]
    if not molecule.smiles or atoms.pbc.any():
        return None
    with rdBase.BlockLogs():
        try:
            mol = molecule_of(atoms.numbers, atoms.positions, molecule.smiles)
            if mol is None:
                return None
            mol.RemoveAllConformers()
            conformer = Chem.Conformer(len(atoms))
            for k, position in enumerate(atoms.positions.tolist()):
                conformer.SetAtomPosition(k, Point3D(*position))
            mol.AddConformer(conformer)
            Chem.SanitizeMol(mol)
            return sampling.Surface(mol)
        except (ValueError, RuntimeError):  # no parameters, or no valence model of RDKit
            return None


def _structure(
    molecule: PoolMolecule, geometry: int, kind: str, positions: np.ndarray
) -> Structure:
    """Return a candidate."""
    atoms = molecule.geometries[geometry].copy()
    atoms.positions = positions
    return from_ase(
        atoms,
        molecule=molecule.name,
        smiles=molecule.smiles,
        conformer=geometry,
        subset=kind,
        source=f"{molecule.name} {kind}",
    )
