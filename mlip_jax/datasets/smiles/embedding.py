"""Embedding of SMILES and mol blocks by RDKit: atoms with three-dimensional positions."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import NamedTuple

import numpy as np
from ase import Atoms

from mlip_jax import limits, workers
from mlip_jax.datasets.identity import display_name
from mlip_jax.datasets.isolation.molecules import embed, is_safe_mol_block, is_safe_smiles
from mlip_jax.datasets.isolation.process import ParserDeathError

# Time limit (s) for embedding one molecule, for each of two attempts. Without it, large cages and
# long chains could take days.
_TIMEOUT = 300
_EMBEDDING = 2 * _TIMEOUT + 300.0  # limit (s) of a worker process for all steps
_SPACING = 1.1  # distance (Å) between atoms on a line, as of a bond to hydrogen
_WIDTH = 0.1  # width of that line (Å)
_CRASH = "RDKit crashed on it, hung, or needed too much memory"


@dataclasses.dataclass(frozen=True)
class MoleculeRecord:
    """A molecule of a file, or the reason why it is unusable.

    Attributes:
      index: Index of the molecule in its file, from 0, times the number of conformers per molecule,
        plus the index of the conformer.
      name: Name in the file, "" if missing.
      smiles: SMILES, "" if unknown.
      atoms: Atoms with positions (Å) and the total charge (e) in info["charge"]. If the molecule
        has unpaired electrons, info["num_unpaired_electrons"] is their number. None if the molecule
        is unusable.
      failure: Reason why the molecule is unusable, with file and line or number; "" otherwise.
      geometry: Origin of the positions: "as given", "hydrogens added", "embedded", "embedded,
        MMFF94", "not embedded".
      bonds: Molecule in RDKit's binary form with the atoms in the order of `atoms`; None if the
        bonds are unknown.
    """

    index: int
    name: str
    smiles: str
    atoms: Atoms | None
    failure: str = ""
    geometry: str = ""
    bonds: bytes | None = None

    @property
    def display_name(self) -> str:
        """Name in logs and reports: the name in the file, the SMILES or the formula."""
        numbers = None if self.atoms is None else self.atoms.numbers
        return display_name(self.name, self.smiles, numbers, f"molecule {self.index}")

    @property
    def table_name(self) -> str:
        """Name in tables that also contain the SMILES: the name in the file, or the formula."""
        return self.name or ("" if self.smiles or self.atoms is None else self.display_name)


class Entry(NamedTuple):
    """Description of a molecule in a file, by a SMILES or a mol block.

    Attributes:
      number: Index of the molecule in the file, from 0.
      where: File and line, for messages.
      name: Name of the molecule, "" if missing.
      smiles: SMILES, "" if the file has a mol block.
      mol_block: Mol block, "" if the file has a SMILES.
    """

    number: int
    where: str
    name: str
    smiles: str
    mol_block: str = ""


class EmbeddingOptions(NamedTuple):
    """Options of `embed_entry`.

    Attributes:
      num_conformers: Number of conformers per molecule.
      mmff: Whether to relax embedded conformers with MMFF94.
      seed: Seed of the embedding.
      embed: Whether to embed the molecule. If not, the atoms are on a line, for models that do not
        read positions.
    """

    num_conformers: int = 1
    mmff: bool = False
    seed: int = 0
    embed: bool = True


class UnusableMoleculeError(ValueError):
    """A molecule cannot be read or embedded."""


def embed_entry(job: tuple[Entry, EmbeddingOptions]) -> list[MoleculeRecord]:
    """Embed a molecule and return one record per requested conformer.

    Records of conformers that could not be embedded have a `failure`. Positions depend on the
    SMILES and the seed, not on the location in the file, and are reproducible with the same version
    of RDKit. A mol block with three-dimensional positions keeps them, and missing hydrogens are
    added.
    """
    from rdkit import rdBase

    entry, options = job
    first = entry.number * options.num_conformers
    smiles, conformers = entry.smiles, []
    with rdBase.BlockLogs():
        try:
            molecule = (
                _from_block(entry.mol_block) if entry.mol_block else _from_smiles(entry.smiles)
            )
            smiles = smiles or _smiles_of(molecule)
            with workers.time_limit(_EMBEDDING):
                molecule, geometry = _with_positions(molecule, smiles, options)
                conformers = _conformers(molecule)
            failure = f"RDKit created {len(conformers)} of {options.num_conformers} conformers"
        except (ValueError, RuntimeError) as error:  # RDKit raises both
            failure = " ".join(str(error).split())
    records = [
        MoleculeRecord(first + i, entry.name, smiles, atoms, "", geometry, bonds)
        for i, (atoms, bonds) in enumerate(conformers)
    ]
    # An argument of a function has no place in a file other than its SMILES.
    is_stated = entry.where in (smiles, repr(smiles)) and _short(smiles) in failure
    where = "" if is_stated else f"{entry.where}: "
    return records + [
        MoleculeRecord(first + i, entry.name, smiles, None, where + failure)
        for i in range(len(records), options.num_conformers)
    ]


def _from_smiles(smiles: str):
    """Return the RDKit molecule of a SMILES. Raise UnusableMoleculeError if it is invalid."""
    from rdkit import Chem

    if not smiles:
        raise UnusableMoleculeError("no SMILES")
    limits.check("smiles_characters", len(smiles), "SMILES", UnusableMoleculeError)
    if not is_safe_smiles(smiles):
        raise UnusableMoleculeError(f"RDKit crashes on the SMILES {_short(smiles)}, or hangs")
    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None:
        raise UnusableMoleculeError(
            f"RDKit cannot read the SMILES {_short(smiles)}"
            + _problems(Chem.MolFromSmiles(smiles, sanitize=False))
        )
    return molecule


def _from_block(block: str):
    """Return the RDKit molecule of a mol block. Raise UnusableMoleculeError if it is invalid."""
    from rdkit import Chem

    if not is_safe_mol_block(block):
        raise UnusableMoleculeError("RDKit crashes on the mol block, or hangs")
    molecule = Chem.MolFromMolBlock(block, removeHs=False)
    if molecule is None:
        raise UnusableMoleculeError(
            "RDKit cannot read the mol block"
            + _problems(Chem.MolFromMolBlock(block, sanitize=False, removeHs=False))
        )
    # RDKit takes planar molecules for drawings, even if the header states three dimensions.
    if molecule.GetNumConformers() and _is_tagged_3d(block):
        molecule.GetConformer().Set3D(True)
    return molecule


def _is_tagged_3d(block: str) -> bool:
    """Return whether the second line of a mol block states three-dimensional positions.

    The code is in columns 21 and 22; some programs write it as a word elsewhere.
    """
    header = (block.split("\n", 2) + [""])[1]
    return header[20:22] == "3D" or "3D" in header.split()


def _problems(molecule) -> str:
    """Return the first chemistry problem of an unsanitized molecule in parentheses, "" if none."""
    from rdkit import Chem

    problems = [] if molecule is None else Chem.DetectChemistryProblems(molecule)
    return f" ({problems[0].Message()})" if problems else ""


def _short(text: str) -> str:
    """Format a text for messages, cut at 80 characters."""
    return repr(text if len(text) <= 80 else text[:79] + "…")


def _smiles_of(molecule) -> str:
    """Return the canonical SMILES with implicit hydrogens."""
    from rdkit import Chem

    return Chem.MolToSmiles(Chem.RemoveHs(molecule))


def _with_positions(molecule, smiles: str, options: EmbeddingOptions):
    """Return the molecule with all hydrogens and conformers, and the origin of its positions."""
    from rdkit import Chem

    if not molecule.GetNumAtoms():
        raise UnusableMoleculeError("the molecule has no atoms")
    given = molecule.GetNumConformers() and molecule.GetConformer().Is3D()
    # Hydrogens get positions only if the other atoms have some.
    complete = Chem.AddHs(molecule, addCoords=bool(given))
    if given:
        if options.num_conformers != 1:
            raise UnusableMoleculeError(
                "it has three-dimensional positions; num_conformers applies only to embedded "
                "molecules"
            )
        same = complete.GetNumAtoms() == molecule.GetNumAtoms()
        return complete, "as given" if same else "hydrogens added"
    complete.RemoveAllConformers()
    if not options.embed:
        line = np.zeros((complete.GetNumAtoms(), 3))
        line[:, 0] = _SPACING * np.arange(len(line))
        # isomers have different positions, so that the data checks do not take them for copies
        rng = np.random.default_rng(stable_seed(options.seed, smiles))
        line[:, 1:] = rng.uniform(0.0, _WIDTH, (len(line), 2))
        conformer = Chem.Conformer(len(line))
        conformer.SetPositions(line)
        complete.AddConformer(conformer)
        return complete, "not embedded"
    relaxed = _embed_conformers(complete, options, stable_seed(options.seed, smiles))
    return complete, "embedded, MMFF94" if relaxed else "embedded"


def stable_seed(seed: int, smiles: str) -> int:
    """Return a seed for RDKit from a seed and a SMILES, the same in every process and machine."""
    return (
        int.from_bytes(hashlib.sha256(f"{seed}:{smiles}".encode()).digest()[:4], "little")
        & 0x7FFFFFFF
    )


def _embed_conformers(molecule, options: EmbeddingOptions, seed: int) -> bool:
    """Add conformers by ETKDGv3. Return whether they were relaxed."""
    from rdkit import Chem

    try:
        positions, relaxed = embed(
            molecule.ToBinary(),
            options.num_conformers,
            seed,
            mmff=options.mmff,
            timeout=_TIMEOUT,
            seconds=_EMBEDDING,
        )
    except ParserDeathError as error:
        raise UnusableMoleculeError(_CRASH) from error
    if not positions:
        raise UnusableMoleculeError("RDKit found no three-dimensional geometry (ETKDGv3)")
    for each in positions:
        conformer = Chem.Conformer(len(each))
        conformer.SetPositions(each)
        molecule.AddConformer(conformer, assignId=True)
    return relaxed


def charge_and_unpaired(molecule) -> tuple[int, int]:
    """Return the formal charge (e) and the number of unpaired electrons of an RDKit molecule."""
    from rdkit import Chem

    return Chem.GetFormalCharge(molecule), sum(
        atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms()
    )


def _conformers(molecule) -> list[tuple[Atoms, bytes]]:
    """Return the atoms of each conformer, and the molecule without conformers in binary form."""
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    masses = [atom.GetMass() if atom.GetIsotope() else None for atom in molecule.GetAtoms()]
    charge, unpaired = charge_and_unpaired(molecule)
    info = {"charge": float(charge)}
    info |= {"num_unpaired_electrons": unpaired} if unpaired else {}
    positions = [conformer.GetPositions() for conformer in molecule.GetConformers()]
    molecule.RemoveAllConformers()
    bonds = molecule.ToBinary()
    conformers = [Atoms(numbers, each, info=dict(info)) for each in positions]
    for atoms in conformers if any(masses) else ():
        atoms.set_masses(masses)  # None is the natural mass of the element
    return [(atoms, bonds) for atoms in conformers]


def failed_records(job: tuple[Entry, EmbeddingOptions]) -> list[MoleculeRecord]:
    """Return the records of a molecule whose worker process died while embedding it."""
    entry, options = job
    failure = f"{entry.where}: {_CRASH}"
    return [
        MoleculeRecord(
            entry.number * options.num_conformers + c, entry.name, entry.smiles, None, failure
        )
        for c in range(options.num_conformers)
    ]
