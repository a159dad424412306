"""Molecular graphs of SMILES: heavy atoms and bonds, with the features of the Open Graph Benchmark.

The features are indices into tables of trainable vectors. Hydrogens are features of the atom that
they are bound to, except in molecules without other atoms.

    >>> graph = bond_graph("CO")
    >>> graph.atoms[:, 0].tolist(), graph.senders.tolist(), graph.receivers.tolist()
    ([5, 7], [1, 0], [0, 1])
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from mlip_jax.datasets.isolation.molecules import is_safe_smiles

# Numbers of values of the features of atoms: element (atomic number - 1), chirality, number of
# neighbors, charge, hydrogens, unpaired electrons, hybridization, aromatic, in a ring.
ATOM_SIZES = (119, 5, 12, 12, 10, 6, 6, 2, 2)
# The same of bonds: order, stereochemistry, conjugated.
BOND_SIZES = (5, 6, 2)
_CHIRALITY = ("CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW", "CHI_OTHER")
_HYBRIDIZATION = ("SP", "SP2", "SP3", "SP3D", "SP3D2")
_ORDER = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")
_STEREO = ("STEREONONE", "STEREOZ", "STEREOE", "STEREOCIS", "STEREOTRANS", "STEREOANY")
# Graphs that stay in memory, about 1 kB each. Parsing a SMILES again takes about 0.2 ms.
_CACHED = 1 << 17


class BondGraph(NamedTuple):
    """Molecular graph. Each bond is two edges; edges are sorted by receiver.

    Attributes:
      atoms: Features of the atoms, shape (n, 9), uint8.
      senders: Sending atoms of the edges, shape (e,), int32.
      receivers: Receiving atoms of the edges, shape (e,), int32.
      bonds: Features of the edges, shape (e, 3), uint8.
    """

    atoms: np.ndarray
    senders: np.ndarray
    receivers: np.ndarray
    bonds: np.ndarray


@functools.lru_cache(maxsize=_CACHED)
def bond_graph(smiles: str) -> BondGraph | None:
    """Return the molecular graph of a SMILES, or None if it is empty or RDKit cannot read it.

    Raises:
      ImportError: RDKit is missing.
    """
    from rdkit import Chem, rdBase

    if not smiles or not is_safe_smiles(smiles):
        return None
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    if molecule is None or not molecule.GetNumAtoms():
        return None
    atoms = np.array([_atom_features(atom) for atom in molecule.GetAtoms()], np.uint8)
    edges = []
    for bond in molecule.GetBonds():
        features = _bond_features(bond)
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        edges += [(j, i, *features), (i, j, *features)]
    table = np.array(sorted(edges), np.int32).reshape(-1, 2 + len(BOND_SIZES))
    return BondGraph(
        atoms,
        np.ascontiguousarray(table[:, 1]),
        np.ascontiguousarray(table[:, 0]),
        table[:, 2:].astype(np.uint8),
    )


def has_order_of(graph: BondGraph, binary: bytes | None) -> bool:
    """Return whether a molecule in RDKit's binary form begins with the atoms of a graph, in order."""
    from rdkit import Chem

    if binary is None:
        return False
    molecule, num = Chem.Mol(binary), len(graph.atoms)
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()][:num]
    pairs = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds()]
    pairs = {frozenset(pair) for pair in pairs if max(pair) < num}
    expected = {frozenset(pair) for pair in zip(graph.senders.tolist(), graph.receivers.tolist())}
    return numbers == (graph.atoms[:, 0].astype(int) + 1).tolist() and pairs == expected


def _atom_features(atom) -> tuple[int, ...]:
    """Return the features of an atom of RDKit; the last value of most of them means "other"."""
    number = atom.GetAtomicNum()
    return (
        number - 1 if 1 <= number <= 118 else 118,
        _position(str(atom.GetChiralTag()), _CHIRALITY),
        min(atom.GetTotalDegree(), 11),
        atom.GetFormalCharge() + 5 if -5 <= atom.GetFormalCharge() <= 5 else 11,
        min(atom.GetTotalNumHs(), 9),
        min(atom.GetNumRadicalElectrons(), 5),
        _position(str(atom.GetHybridization()), _HYBRIDIZATION),
        int(atom.GetIsAromatic()),
        int(atom.IsInRing()),
    )


def _bond_features(bond) -> tuple[int, ...]:
    """Return the features of a bond of RDKit."""
    return (
        _position(str(bond.GetBondType()), _ORDER),
        min(_position(str(bond.GetStereo()), _STEREO), len(_STEREO) - 1),
        int(bond.GetIsConjugated()),
    )


def _position(name: str, names: tuple[str, ...]) -> int:
    """Return the position of a name, or the number of names for others."""
    return names.index(name) if name in names else len(names)
