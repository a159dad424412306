"""Symmetries of molecules: the orders of the heavy atoms in which a molecule is the same, as RDKit's GetBestRMS has
them, and that function itself as a reference.

Atoms are the same where the element and all bonds are; stereochemistry plays no part. Terminal atoms that share a
charge or a proton (the oxygens of a carboxylate, a carboxylic acid or a nitro group) are the same, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mlip_jax import workers
from mlip_jax.datasets.molecules.connectivity import from_geometry, from_smiles

MAX_SYMMETRIES = 2_000
# As in RDKit's symmetrizeTerminalAtoms.
_TERMINAL = "[O,N;D1;$([O,N;D1]-[*]=[O,N;D1]),$([O,N;D1]=[*]-[O,N;D1])]~[*]"


class Symmetries(NamedTuple):
    """Of the heavy atoms of a molecule.

    Attributes:
      heavy: Places of the heavy atoms among all, (n,) int64, ascending.
      permutations: (Q, n) int64: positions[heavy][permutations[q]] is the same molecule as positions[heavy]; the first
        is the identity.
      complete: All there are; False where there are more than were asked for. A least RMSD over some of them is an
        upper bound of that over all.
    """

    heavy: np.ndarray
    permutations: np.ndarray
    complete: bool


def symmetries(mol: Any, most: int = MAX_SYMMETRIES) -> Symmetries:
    """Of an RDKit molecule with explicit hydrogens, at most so many.

    Raises:
      ValueError: `most` is below 1.
    """
    from rdkit import Chem

    if most < 1:
        raise ValueError(f"at least one symmetry, the identity, must be looked for; received {most}")
    heavy = np.array([atom.GetIdx() for atom in mol.GetAtoms() if atom.GetAtomicNum() > 1], np.int64)
    n = len(heavy)
    if n == 0:
        return Symmetries(heavy, np.zeros((1, 0), np.int64), True)
    bare = Chem.RemoveAllHs(mol, sanitize=False)
    found = bare.GetSubstructMatches(_symmetrized(bare), uniquify=False, useChirality=False, maxMatches=most + 1)
    orders = [list(order) for order in found if list(order) != list(range(n))]
    return Symmetries(heavy, np.array([list(range(n)), *orders[:most - 1]], np.int64), len(orders) < most)


def _symmetrized(mol: Any) -> Any:
    """A query that takes terminal atoms which share a charge or a proton for one another."""
    from rdkit import Chem

    query, either = Chem.RWMol(mol), Chem.MolFromSmarts("*-,=*").GetBondWithIdx(0)
    for atom, neighbor in mol.GetSubstructMatches(Chem.MolFromSmarts(_TERMINAL)):
        query.GetAtomWithIdx(atom).SetFormalCharge(0)
        query.ReplaceBond(query.GetBondBetweenAtoms(atom, neighbor).GetIdx(), either)
    return query.GetMol()


def molecule_of(numbers: np.ndarray, positions: np.ndarray, smiles: str = "") -> Any | None:
    """The RDKit molecule of a structure, with its atoms in the structure's order and explicit hydrogens.

    Bond orders are those of the SMILES, whose atoms may come in any order: they are found by which atoms are close.
    Without a SMILES, or where it is of another molecule than the geometry, all bonds are single: `symmetries` are then
    those of the skeleton of heavy atoms, of which there may be more.

    Args:
      numbers: (n,). positions: (n, 3) Å.

    Returns:
      None where RDKit can make nothing of the geometry.
    """
    from rdkit import Chem

    found, known = from_geometry(numbers, positions), from_smiles(smiles)
    if found is None or known is None:
        return found
    known = Chem.AddHs(known)
    if known.GetNumAtoms() != found.GetNumAtoms() or known.GetNumBonds() != found.GetNumBonds():
        return found
    places = found.GetSubstructMatch(_bare(known))  # of each atom of the SMILES among those of the structure
    if not places:
        return found
    return Chem.RenumberAtoms(known, np.argsort(places).tolist())


def _bare(mol: Any) -> Any:
    """Elements and single bonds alone, as molecules of geometries have them."""
    from rdkit import Chem

    bare = Chem.RWMol()
    for atom in mol.GetAtoms():
        new = Chem.Atom(atom.GetAtomicNum())
        new.SetNoImplicit(True)
        bare.AddAtom(new)
    for bond in mol.GetBonds():
        bare.AddBond(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), Chem.BondType.SINGLE)
    return bare.GetMol()


class SymmetryQuery(NamedTuple):
    """A molecule whose symmetries are asked for: atomic numbers (n,), positions (n, 3) in Å and SMILES or ""."""

    numbers: np.ndarray
    positions: np.ndarray
    smiles: str = ""


def symmetries_of(entries: Iterable[SymmetryQuery], most: int = MAX_SYMMETRIES, num_processes: int | None = None
                  ) -> Iterator[Symmetries | None]:
    """Symmetries of each molecule, in order, found in worker processes; None where RDKit can make nothing of it."""
    return workers.stream(_of_entry, ((entry, most) for entry in entries), num_processes)


def _of_entry(job: tuple[SymmetryQuery, int]) -> Symmetries | None:
    entry, most = job
    mol = molecule_of(*entry)
    return None if mol is None else symmetries(mol, most)


def best_rms(mol: Any, test: np.ndarray, train: np.ndarray) -> np.ndarray:
    """RDKit's GetBestRMS of each test conformer to each training conformer over the heavy atoms, (T, R) Å.

    It looks through up to a million symmetries of one pair after another: the reference for rmsd.cross_rmsd.

    Args:
      mol: RDKit molecule of n atoms, hydrogens explicit. test: (T, n, 3) Å. train: (R, n, 3) Å.
    """
    from rdkit import Chem
    from rdkit.Chem import rdMolAlign

    made = Chem.Mol(mol)
    made.RemoveAllConformers()
    for positions in (*test, *train):
        conformer = Chem.Conformer(mol.GetNumAtoms())
        conformer.SetPositions(np.asarray(positions, np.float64))
        made.AddConformer(conformer, assignId=True)
    made = Chem.RemoveAllHs(made)
    found = [rdMolAlign.GetBestRMS(made, made, prbId=t, refId=len(test) + r)
             for t in range(len(test)) for r in range(len(train))]
    return np.reshape(found, (len(test), len(train)))
