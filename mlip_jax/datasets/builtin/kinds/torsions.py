"""Geometries of a molecule with bonds turned to any angle, also those of amides.

Thermal conformations seldom reach a barrier. Here, one to three acyclic single bonds get random
torsion angles, and molecular mechanics relaxes the rest of the molecule.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlip_jax.datasets.builtin import sampling

MAX_TURNED = 3  # maximum number of bonds that are turned in a geometry
RELAX_STEPS = 100  # steps of the relaxation with the angles held
STIFFNESS = 200.0  # force constant that holds the angles, kcal/mol/rad^2
NOISE_STEPS = 20  # steps of Langevin dynamics after it, too few to turn back
TEMPERATURES = (5.0, 600.0)  # range of its temperature (K)

# Neither end is terminal or part of a triple bond. "-" does not match aromatic bonds.
_TURNABLE = "[!D1;!$(*#*);!$(*(=*)=*)]-;!@[!D1;!$(*#*);!$(*(=*)=*)]"
_SULFONYL = "[S,P;!D1;!D2;!D3]-;!@[!D1;!$(*#*)]"


def turnable_bonds(mol: Any) -> list[tuple[int, int]]:
    """Return the atoms of the acyclic single bonds that can be turned, with explicit hydrogens."""
    from rdkit import Chem

    found = {
        tuple(sorted(match))
        for smarts in (_TURNABLE, _SULFONYL)
        for match in mol.GetSubstructMatches(Chem.MolFromSmarts(smarts))
    }
    return sorted(found)


def turned_frames(
    mol: Any, numbers: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[str, list[np.ndarray]]:
    """Return the name of the force field and `count` positions (Å), (n, 3).

    Args:
      mol: RDKit molecule with explicit hydrogens.
      numbers: Atomic numbers, (n,).
      count: Number of geometries.
      rng: NumPy random generator.

    Raises:
      ValueError: No bond can be turned, no geometry exists, or parameters are missing.
    """
    bonds = turnable_bonds(mol)
    if not bonds:
        raise ValueError("no bond can be turned")
    num_conformers = -(-count // sampling.FRAMES_PER_CONFORMER)
    ids = sampling.embed(mol, num_conformers, int(rng.integers(2**31 - 1)))
    surface = sampling.Surface(mol)
    starts = [mol.GetConformer(conf_id).GetPositions() for conf_id in ids]
    frames = []
    for index in range(count):
        k = index % len(ids)
        torsions = _turn(mol, ids[k], starts[k], bonds, rng)
        positions = surface.minimum(ids[k], RELAX_STEPS, torsions, STIFFNESS)
        temperature = np.exp(rng.uniform(*np.log(TEMPERATURES)))
        frames.append(
            sampling.langevin(surface, positions, temperature, 1, rng, steps=NOISE_STEPS)[0]
        )
    return surface.name, frames


def _turn(mol, conf_id, start, bonds, rng) -> list[tuple[tuple[int, int, int, int], float]]:
    """Turn random bonds of a conformer from `start`; return the torsions and their angles."""
    from rdkit.Chem.rdMolTransforms import SetDihedralDeg

    conformer = mol.GetConformer(conf_id)
    for atom, position in enumerate(start):
        conformer.SetAtomPosition(atom, position)
    # Conjugated bonds, such as those of amides, have the highest barriers: half of the choices.
    conjugated = [b for b in bonds if mol.GetBondBetweenAtoms(*b).GetIsConjugated()]
    chosen: list[tuple[int, int]] = []
    for _ in range(int(rng.integers(1, min(MAX_TURNED, len(bonds)) + 1))):
        among = conjugated if conjugated and rng.random() < 0.5 else bonds
        bond = among[rng.integers(len(among))]
        if bond not in chosen:
            chosen.append(bond)
    torsions = []
    for j, k in chosen:
        ends = (_neighbor(mol, j, k, rng), j, k, _neighbor(mol, k, j, rng))
        angle = float(rng.uniform(-180.0, 180.0))
        SetDihedralDeg(conformer, *ends, angle)
        torsions.append((ends, angle))
    return torsions


def _neighbor(mol, atom, other, rng) -> int:
    """Return a random neighbor of an atom that is not `other`, a heavy one if there is any."""
    neighbors = [n for n in mol.GetAtomWithIdx(atom).GetNeighbors() if n.GetIdx() != other]
    heavy = [n.GetIdx() for n in neighbors if n.GetAtomicNum() > 1]
    among = heavy or [n.GetIdx() for n in neighbors]
    return among[rng.integers(len(among))]
