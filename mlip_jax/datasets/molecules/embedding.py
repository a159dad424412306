"""Molecules as people write them (SMILES, mol blocks) to atoms with three-dimensional positions, by RDKit."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import NamedTuple

import numpy as np
from ase import Atoms

# Seconds for the conformers of one molecule, in each of two attempts: large cages and long chains could take days.
_TIMEOUT = 300
_GAP = 3.0  # Å between the parts of a salt or a solvate, which ETKDG puts on top of each other


@dataclasses.dataclass(frozen=True)
class MoleculeRecord:
    """One molecule to work on, or why there is none.

    Attributes:
      index: Of the molecule in its file, from 0, times the conformers of each, plus that of the conformer.
      name: As the file says; "" where it says none. smiles: "" where it is not known.
      atoms: Positions in Å; info["charge"] is the total charge in e, info["num_unpaired_electrons"] is there where it
        is not 0. None where the molecule could not be made.
      failure: Why not, with file and line or number; "" for sound ones.
      geometry: Where the positions come from: "as given", "hydrogens added", "embedded", "embedded, MMFF94".
      bonds: RDKit's binary form of the molecule, its atoms in the order of `atoms`; None where bonds are not known.
    """

    index: int
    name: str
    smiles: str
    atoms: Atoms | None
    failure: str = ""
    geometry: str = ""
    bonds: bytes | None = None


class Entry(NamedTuple):
    """What a file says of a molecule: a SMILES or a mol block, the other is ""; `where` names file and line."""

    number: int
    where: str
    name: str
    smiles: str
    mol_block: str = ""


class EmbeddingOptions(NamedTuple):
    """Of `make`: conformers of each molecule, whether MMFF94 relaxes them first, and the seed."""

    num_conformers: int = 1
    mmff: bool = False
    seed: int = 0


class UnusableMoleculeError(ValueError):
    """A molecule that cannot be read or has no geometry."""


def make(job: tuple[Entry, EmbeddingOptions]) -> list[MoleculeRecord]:
    """The conformers of a molecule, always as many as asked for: those that could not be made say why.

    A pure function of the job (for one version of RDKit): positions depend on the SMILES and the seed, not on the
    place in the file. A mol block with three-dimensional positions keeps them, and gets hydrogens where it lacks some.
    """
    from rdkit import rdBase

    entry, options = job
    first = entry.number * options.num_conformers
    smiles, conformers = entry.smiles, []
    with rdBase.BlockLogs():
        try:
            molecule = _from_block(entry.mol_block) if entry.mol_block else _from_smiles(entry.smiles)
            smiles = smiles or _smiles_of(molecule)
            molecule, geometry = _with_positions(molecule, smiles, options)
            conformers = _conformers(molecule)
            failure = f"RDKit made {len(conformers)} of {options.num_conformers} conformers"
        except (ValueError, RuntimeError) as error:  # RDKit's own errors are of these kinds
            failure = " ".join(str(error).split())
    records = [MoleculeRecord(first + i, entry.name, smiles, atoms, "", geometry, bonds)
               for i, (atoms, bonds) in enumerate(conformers)]
    return records + [MoleculeRecord(first + i, entry.name, smiles, None, f"{entry.where}: {failure}")
                      for i in range(len(records), options.num_conformers)]


def _from_smiles(smiles: str):
    from rdkit import Chem

    if not smiles:
        raise UnusableMoleculeError("there is no SMILES")
    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None:
        raise UnusableMoleculeError(f"RDKit cannot read the SMILES {_short(smiles)}"
                                    + _problems(Chem.MolFromSmiles(smiles, sanitize=False)))
    return molecule


def _from_block(block: str):
    from rdkit import Chem

    molecule = Chem.MolFromMolBlock(block, removeHs=False)
    if molecule is None:
        raise UnusableMoleculeError("RDKit cannot read the mol block"
                                    + _problems(Chem.MolFromMolBlock(block, sanitize=False, removeHs=False)))
    return molecule


def _problems(molecule) -> str:
    """What is wrong with the chemistry of a molecule whose text can be read."""
    from rdkit import Chem

    found = [] if molecule is None else Chem.DetectChemistryProblems(molecule)
    return f" ({found[0].Message()})" if found else ""


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:79] + "…")


def _smiles_of(molecule) -> str:
    """Canonical; hydrogens are implicit."""
    from rdkit import Chem

    return Chem.MolToSmiles(Chem.RemoveHs(molecule))


def _with_positions(molecule, smiles: str, options: EmbeddingOptions):
    """(molecule with all hydrogens and conformers, where the positions come from)."""
    from rdkit import Chem

    if not molecule.GetNumAtoms():
        raise UnusableMoleculeError("the molecule has no atoms")
    given = molecule.GetNumConformers() and molecule.GetConformer().Is3D()
    complete = Chem.AddHs(molecule, addCoords=bool(given))
    if given:
        if options.num_conformers != 1:
            raise UnusableMoleculeError("it has three-dimensional positions; num_conformers is for molecules that are "
                                        "to be embedded")
        same = complete.GetNumAtoms() == molecule.GetNumAtoms()
        return complete, "as given" if same else "hydrogens added"
    complete.RemoveAllConformers()
    _embed(complete, options.num_conformers, stable_seed(options.seed, smiles))
    optimized = options.mmff and _optimize(complete)
    return complete, "embedded, MMFF94" if optimized else "embedded"


def stable_seed(seed: int, smiles: str) -> int:
    """A seed for RDKit that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{smiles}".encode()).digest()[:4], "little") & 0x7FFFFFFF


def _embed(molecule, num_conformers: int, seed: int) -> None:
    from rdkit import Chem
    from rdkit.Chem import rdDistGeom

    options = rdDistGeom.ETKDGv3()
    options.randomSeed, options.numThreads, options.timeout = seed, 1, _TIMEOUT
    found = rdDistGeom.EmbedMultipleConfs(molecule, num_conformers, options)
    if not len(found):
        options.useRandomCoords = True
        found = rdDistGeom.EmbedMultipleConfs(molecule, num_conformers, options)
    if not len(found):
        raise UnusableMoleculeError("RDKit finds no three-dimensional geometry (ETKDGv3)")
    fragments = Chem.GetMolFrags(molecule)
    for conformer in molecule.GetConformers() if len(fragments) > 1 else ():
        conformer.SetPositions(_side_by_side(conformer.GetPositions(), fragments))


def _side_by_side(positions: np.ndarray, fragments) -> np.ndarray:
    """Positions (n, 3) in Å with the fragments in a row along x, and a gap between them."""
    positions, edge = positions.copy(), 0.0
    for atoms in map(list, fragments):
        positions[atoms] -= positions[atoms].mean(0)
        positions[atoms, 0] += edge - positions[atoms, 0].min()
        edge = positions[atoms, 0].max() + _GAP
    return positions


def _optimize(molecule) -> bool:
    """Relax all conformers with MMFF94; whether it has parameters for the molecule."""
    from rdkit.Chem import rdForceFieldHelpers as helpers

    if not helpers.MMFFHasAllMoleculeParams(molecule):
        return False
    helpers.MMFFOptimizeMoleculeConfs(molecule, numThreads=1, maxIters=1000)
    return True


def charge_and_unpaired(molecule) -> tuple[int, int]:
    """Return the formal charge (e) and the number of unpaired electrons of an RDKit molecule."""
    from rdkit import Chem

    return Chem.GetFormalCharge(molecule), sum(atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms())


def _conformers(molecule) -> list[tuple[Atoms, bytes]]:
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    charge, unpaired = charge_and_unpaired(molecule)
    info = {"charge": float(charge)}
    info |= {"num_unpaired_electrons": unpaired} if unpaired else {}
    positions = [conformer.GetPositions() for conformer in molecule.GetConformers()]
    molecule.RemoveAllConformers()
    bonds = molecule.ToBinary()
    return [(Atoms(numbers, each, info=dict(info)), bonds) for each in positions]


def gave_up(job: tuple[Entry, EmbeddingOptions]) -> list[MoleculeRecord]:
    """The records of a molecule that ended the process that was at it."""
    entry, options = job
    failure = f"{entry.where}: RDKit ended the process that embedded it (out of memory?)"
    return [MoleculeRecord(entry.number * options.num_conformers + c, entry.name, entry.smiles, None, failure)
            for c in range(options.num_conformers)]
