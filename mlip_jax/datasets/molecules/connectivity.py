"""RDKit molecules from SMILES or geometries, and an identifier that both sources agree on."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mlip_jax import workers
from mlip_jax.datasets.isolation.molecules import is_safe_smiles

_CHUNK = 500  # molecules per job of a worker process
_LONG = 5_000  # minimum number of molecules for several processes and a progress bar


class IdentityQuery(NamedTuple):
    """A molecule to describe, by its SMILES or its geometry.

    Attributes:
      smiles: SMILES, or "" to use the geometry.
      numbers: Atomic numbers, (n,), or None.
      positions: Positions (Å), (n, 3), or None.
    """

    smiles: str
    numbers: np.ndarray | None = None
    positions: np.ndarray | None = None


class Description(NamedTuple):
    """Description of a molecule.

    Attributes:
      skeleton: Canonical text of the connectivity, see `skeleton`.
      elements: Atomic numbers of its elements, ascending.
      fingerprint: Morgan fingerprint in RDKit's binary form, b"" if not requested.
    """

    skeleton: str
    elements: tuple[int, ...]
    fingerprint: bytes = b""


def describe(
    entries: Iterable[IdentityQuery],
    count: int,
    *,
    fingerprints: bool = False,
    num_processes: int | None = None,
    label: str = "molecules",
    progress: bool = True,
) -> list[Description | None]:
    """Describe each molecule. The result is None for molecules that RDKit cannot read.

    Args:
      entries: Molecules. A SMILES takes precedence over a geometry.
      count: Number of entries.
      fingerprints: Whether to compute Morgan fingerprints. Then pass either SMILES or geometries
        for all entries: molecules from geometries lack bond orders, so their fingerprints differ.
      num_processes: Number of worker processes. The default is one per available core for many
        molecules and one for few.
      label: Label of the progress bar.
      progress: Whether to show a progress bar for many molecules.

    Raises:
      ImportError: RDKit is missing.
    """
    _require_rdkit()
    entries = iter(entries)
    chunks = [(chunk, fingerprints) for chunk in iter(lambda: list(islice(entries, _CHUNK)), [])]
    if num_processes is None:
        num_processes = workers.available_cores() if count >= _LONG else 1
    bar = Progress(
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not progress or count < _LONG,
    )
    with bar:
        task = bar.add_task("", total=count)
        parts: list[list[Description | None]] = [[] for _ in chunks]
        for index, part in workers.run(_describe_chunk, chunks, num_processes):
            parts[index] = part
            bar.advance(task, len(part))
        return [description for part in parts for description in part]


def from_smiles(smiles: str) -> Any | None:
    """Return an RDKit molecule without explicit hydrogens, or None if the SMILES is invalid."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        try:
            mol = Chem.MolFromSmiles(smiles) if smiles and is_safe_smiles(smiles) else None
            return mol if mol is not None and mol.GetNumAtoms() else None
        except (ValueError, RuntimeError):  # RDKit's violated invariants are RuntimeErrors
            return None


def from_geometry(numbers: np.ndarray, positions: np.ndarray) -> Any | None:
    """Return an RDKit molecule with single bonds between close atoms, or None if RDKit fails.

    All hydrogens are explicit.

    Args:
      numbers: Atomic numbers, (n,).
      positions: Positions (Å), (n, 3).
    """
    from rdkit import Chem, rdBase
    from rdkit.Chem import rdDetermineBonds

    mol, conformer = Chem.RWMol(), Chem.Conformer(len(numbers))
    for index, (number, position) in enumerate(zip(numbers, positions)):
        mol.AddAtom(_bare_atom(number))
        conformer.SetAtomPosition(index, [float(x) for x in position])
    mol.AddConformer(conformer)
    with rdBase.BlockLogs():
        try:
            rdDetermineBonds.DetermineConnectivity(mol)
            mol.UpdatePropertyCache(strict=False)
            Chem.FastFindRings(mol)
        except (ValueError, RuntimeError):
            return None
    return mol.GetMol()


def skeleton(mol: Any) -> str:
    """Return a canonical text of the elements and connectivity, including hydrogens.

    The skeleton ignores bond orders, charges, isotopes and stereochemistry. Stereoisomers,
    resonance forms and charge-separated forms share a skeleton. Tautomers do not, because a
    hydrogen moves.

    >>> skeleton(from_smiles("C[N+](=O)[O-]")) == skeleton(from_smiles("CN(=O)=O"))
    True
    >>> skeleton(from_smiles("C[C@H](O)F")) == skeleton(from_smiles("C[C@@H](O)F"))
    True
    """
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        # Rebuild the molecule from elements and single bonds only.
        full, bare = Chem.AddHs(mol), Chem.RWMol()
        for atom in full.GetAtoms():
            bare.AddAtom(_bare_atom(atom.GetAtomicNum()))
        for bond in full.GetBonds():
            bare.AddBond(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), Chem.BondType.SINGLE)
        return Chem.MolToSmiles(bare)


def _describe_chunk(chunk: tuple[list[IdentityQuery], bool]) -> list[Description | None]:
    """Describe the molecules of one job of a worker process."""
    entries, fingerprints = chunk
    return [_describe(entry, fingerprints) for entry in entries]


def _describe(entry: IdentityQuery, fingerprint: bool) -> Description | None:
    """Describe one molecule, or return None if RDKit cannot read it."""
    from mlip_jax.datasets.molecules.fingerprints import morgan_fingerprint

    if entry.smiles:
        mol = from_smiles(entry.smiles)
    else:
        mol = None if entry.numbers is None else from_geometry(entry.numbers, entry.positions)
    if mol is None:
        return None
    elements = {atom.GetAtomicNum() for atom in mol.GetAtoms()}
    # Implicit hydrogens are not atoms of the molecule.
    elements |= {1} if any(atom.GetTotalNumHs() for atom in mol.GetAtoms()) else set()
    return Description(
        skeleton(mol),
        tuple(sorted(elements)),
        morgan_fingerprint(mol).ToBinary() if fingerprint else b"",
    )


def _bare_atom(number: int) -> Any:
    """Return an RDKit atom without implicit hydrogens."""
    from rdkit import Chem

    atom = Chem.Atom(int(number))
    atom.SetNoImplicit(True)
    return atom


def _require_rdkit() -> None:
    """Raise ImportError if RDKit is missing."""
    try:
        import rdkit  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "RDKit is required to identify molecules: pip install 'mlip-flax[data]'"
        ) from error
