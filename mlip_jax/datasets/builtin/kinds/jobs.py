"""Molecules and pairs of molecules to generate for each kind of geometries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlip_jax.config import unknown_name
from mlip_jax.datasets.builtin.kinds.stretches import MAX_ATOMS as MAX_SMALL
from mlip_jax.datasets.builtin.kinds.torsions import turnable_bonds
from mlip_jax.datasets.builtin.molecules import Molecule

CONFORMATIONS = "conformations"
KINDS = (CONFORMATIONS, "torsions", "dimers", "stretches")
MAX_PARTNER = 20  # maximum number of atoms of the second molecule of a dimer
MAX_DIMER = 46  # maximum number of atoms of a dimer


class Job(NamedTuple):
    """A molecule, or a pair of molecules separated by a dot in the SMILES, and a kind."""

    molecule: Molecule
    kind: str


class _Size(NamedTuple):
    """Properties of a molecule that decide which kinds it has."""

    atoms: int
    fragments: int
    turns: bool


def jobs(molecules: Sequence[Molecule], kinds: Sequence[str], seed: int) -> list[Job]:
    """Return the jobs of the kinds in order. Molecules without a geometry of a kind are skipped.

    "conformations" takes all molecules, "torsions" those with an acyclic single bond, "stretches"
    those with 2 to 12 atoms. "dimers" pairs each molecule with a random one of the list that has at
    most 20 atoms, also with its own kind.

    Args:
      molecules: Molecules with valid SMILES.
      kinds: Kinds, a selection of KINDS.
      seed: Seed of the choice of partners.

    Raises:
      ValueError: A kind is unknown or given twice, or no molecule has a geometry of a kind.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(unknown_name("data.kinds", kind, KINDS))
    if not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(f"data.kinds: expected different kinds, received {tuple(kinds)}")
    if tuple(kinds) == (CONFORMATIONS,):
        return [Job(molecule, CONFORMATIONS) for molecule in molecules]
    sizes = [_size(molecule.smiles) for molecule in molecules]
    found = []
    for kind in kinds:
        chosen = _select(molecules, sizes, kind, seed)
        if not chosen:
            raise ValueError(f"data.kinds: no molecule of the list has a geometry of {kind!r}")
        found += [Job(molecule, kind) for molecule in chosen]
    return found


def _select(
    molecules: Sequence[Molecule], sizes: Sequence[_Size], kind: str, seed: int
) -> list[Molecule]:
    """Return the molecules or pairs of a kind; names contain the kind and remain unique."""
    if kind == CONFORMATIONS:
        return list(molecules)
    if kind == "dimers":
        return _pairs(molecules, sizes, np.random.default_rng(seed))
    return [
        molecule._replace(name=f"{molecule.name} {kind}", subset=kind.capitalize())
        for molecule, size in zip(molecules, sizes, strict=True)
        if (
            size.turns
            if kind == "torsions"
            else size.fragments == 1 and 2 <= size.atoms <= MAX_SMALL
        )
    ]


def _pairs(
    molecules: Sequence[Molecule], sizes: Sequence[_Size], rng: np.random.Generator
) -> list[Molecule]:
    """Return each molecule with a random small one."""
    single = [i for i, size in enumerate(sizes) if size.fragments == 1]
    partners = [i for i in single if sizes[i].atoms <= MAX_PARTNER]
    pairs = []
    for i in single:
        fitting = [j for j in partners if sizes[i].atoms + sizes[j].atoms <= MAX_DIMER]
        if fitting:
            first, second = molecules[i], molecules[fitting[rng.integers(len(fitting))]]
            pairs.append(
                Molecule(
                    f"{first.name} + {second.name} dimers",
                    f"{first.smiles}.{second.smiles}",
                    "Dimers",
                )
            )
    return pairs


def _size(smiles: str) -> _Size:
    """Return the size of a molecule; one without atoms if the SMILES is invalid."""
    from rdkit import Chem

    mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        return _Size(0, 0, False)
    mol = Chem.AddHs(mol)
    fragments = len(Chem.GetMolFrags(mol))
    return _Size(mol.GetNumAtoms(), fragments, fragments == 1 and bool(turnable_bonds(mol)))
