"""Symmetries of molecules: permutations of equivalent atoms, as in RDKit's GetBestRMS.

By default only heavy atoms are permuted. Molecules with few heavy atoms, such as methanol, have no
shape without their hydrogens, so these can be included.

Atoms are equivalent if their elements and all bonds are equal; stereochemistry is ignored. Terminal
atoms that share a charge or a proton (the oxygens of a carboxylate, a carboxylic acid or a nitro
group) are also equivalent. `best_rms` calls GetBestRMS itself, as a reference for tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mlip_jax import workers
from mlip_jax.datasets.molecules.connectivity import from_geometry, from_smiles

MAX_SYMMETRIES = 2_000
# The SMARTS pattern of RDKit's symmetrizeTerminalAtoms.
_TERMINAL = "[O,N;D1;$([O,N;D1]-[*]=[O,N;D1]),$([O,N;D1]=[*]-[O,N;D1])]~[*]"


class Symmetries(NamedTuple):
    """Symmetries of the heavy atoms of a molecule, or of all its atoms.

    Attributes:
      atoms: Indices of these atoms, ascending, (n,) int64.
      permutations: Permutations, (Q, n) int64; the first one is the identity.
        positions[atoms][permutations[q]] is the same molecule as positions[atoms].
      complete: Whether these are all symmetries of the molecule. If not, a minimum RMSD over them
        is an upper bound.
    """

    atoms: np.ndarray
    permutations: np.ndarray
    complete: bool


def symmetries(
    mol: Any, max_symmetries: int = MAX_SYMMETRIES, hydrogens: bool = False
) -> Symmetries:
    """Find the symmetries of an RDKit molecule.

    Args:
      mol: RDKit molecule with explicit hydrogens.
      max_symmetries: Maximum number of symmetries, including the identity.
      hydrogens: Whether to include the hydrogens.

    Raises:
      ValueError: `max_symmetries` is below 1.
    """
    from rdkit import Chem

    if max_symmetries < 1:
        raise ValueError(
            f"at least one symmetry, the identity, is required; received {max_symmetries}"
        )
    atoms = np.array(
        [atom.GetIdx() for atom in mol.GetAtoms() if hydrogens or atom.GetAtomicNum() > 1], np.int64
    )
    n = len(atoms)
    if n == 0:
        return Symmetries(atoms, np.zeros((1, 0), np.int64), True)
    # Match the atoms to themselves. One more match than allowed shows incompleteness.
    bare = mol if hydrogens else Chem.RemoveAllHs(mol, sanitize=False)
    matches = bare.GetSubstructMatches(
        _equate_terminal_atoms(bare),
        uniquify=False,
        useChirality=False,
        maxMatches=max_symmetries + 1,
    )
    orders = [list(order) for order in matches if list(order) != list(range(n))]
    return Symmetries(
        atoms,
        np.array([list(range(n)), *orders[: max_symmetries - 1]], np.int64),
        len(orders) < max_symmetries,
    )


def _equate_terminal_atoms(mol: Any) -> Any:
    """Return a query in which terminal atoms that share a charge or a proton are equivalent."""
    from rdkit import Chem

    query, either = Chem.RWMol(mol), Chem.MolFromSmarts("*-,=*").GetBondWithIdx(0)
    for atom, neighbor in mol.GetSubstructMatches(Chem.MolFromSmarts(_TERMINAL)):
        query.GetAtomWithIdx(atom).SetFormalCharge(0)
        query.ReplaceBond(query.GetBondBetweenAtoms(atom, neighbor).GetIdx(), either)
    return query.GetMol()


def molecule_of(numbers: np.ndarray, positions: np.ndarray, smiles: str = "") -> Any | None:
    """Return the RDKit molecule of a structure, with explicit hydrogens.

    Atoms are in the order of the structure. Bond orders are those of the SMILES, whose atoms can
    have any order: they are matched by connectivity. Without a SMILES, or if it is of another
    molecule than the geometry, all bonds are single. The molecule can then have more `symmetries`,
    those of the skeleton of its heavy atoms.

    Args:
      numbers: Atomic numbers, (n,).
      positions: Positions (Å), (n, 3).
      smiles: SMILES of the molecule, or "".

    Returns:
      The molecule, or None if RDKit cannot determine the connectivity of the geometry.
    """
    from rdkit import Chem

    from_positions, from_text = from_geometry(numbers, positions), from_smiles(smiles)
    if from_positions is None or from_text is None:
        return from_positions
    from_text = Chem.AddHs(from_text)
    if (
        from_text.GetNumAtoms() != from_positions.GetNumAtoms()
        or from_text.GetNumBonds() != from_positions.GetNumBonds()
    ):
        return from_positions
    match = from_positions.GetSubstructMatch(
        _bare(from_text)
    )  # atoms of the structure in the SMILES's order
    if not match:
        return from_positions
    return Chem.RenumberAtoms(from_text, np.argsort(match).tolist())


def _bare(mol: Any) -> Any:
    """Return a copy with only elements and single bonds, like molecules from geometries."""
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
    """A molecule for `symmetries_of`.

    Attributes:
      numbers: Atomic numbers, (n,).
      positions: Positions (Å), (n, 3).
      smiles: SMILES of the molecule, or "".
      hydrogens: Whether to include the symmetries of the hydrogens.
    """

    numbers: np.ndarray
    positions: np.ndarray
    smiles: str = ""
    hydrogens: bool = False


def symmetries_of(
    entries: Iterable[SymmetryQuery],
    max_symmetries: int = MAX_SYMMETRIES,
    num_processes: int | None = None,
) -> Iterator[Symmetries | None]:
    """Find the symmetries of each molecule in worker processes, in order.

    The result is None for molecules whose connectivity RDKit cannot determine.
    """
    return workers.stream(
        _find_symmetries, ((entry, max_symmetries) for entry in entries), num_processes
    )


def _find_symmetries(job: tuple[SymmetryQuery, int]) -> Symmetries | None:
    """Find the symmetries of one molecule in a worker process."""
    entry, max_symmetries = job
    mol = molecule_of(entry.numbers, entry.positions, entry.smiles)
    return None if mol is None else symmetries(mol, max_symmetries, entry.hydrogens)


def best_rms(mol: Any, test: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Compute RDKit's GetBestRMS of each test to each training conformer (Å), (T, R).

    The RMSD is over the heavy atoms. RDKit tries up to a million symmetries, one pair after
    another. This is the reference for rmsd.cross_rmsd.

    Args:
      mol: RDKit molecule of n atoms with explicit hydrogens.
      test: Positions of the test conformers (Å), (T, n, 3).
      train: Positions of the training conformers (Å), (R, n, 3).
    """
    from rdkit import Chem
    from rdkit.Chem import rdMolAlign

    molecule = Chem.Mol(mol)
    molecule.RemoveAllConformers()
    for positions in (*test, *train):
        conformer = Chem.Conformer(mol.GetNumAtoms())
        conformer.SetPositions(np.asarray(positions, np.float64))
        molecule.AddConformer(conformer, assignId=True)
    molecule = Chem.RemoveAllHs(molecule)
    rmsds = [
        rdMolAlign.GetBestRMS(molecule, molecule, prbId=t, refId=len(test) + r)
        for t in range(len(test))
        for r in range(len(train))
    ]
    return np.reshape(rmsds, (len(test), len(train)))
