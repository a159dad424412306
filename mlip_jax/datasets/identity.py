"""Identity of molecules: names from SMILES, integer codes, and hashes equal on every machine."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re

import numpy as np

from mlip_jax import limits
from mlip_jax.datasets.isolation import molecules
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.structure import hill_formula

_ATOM_MAP = re.compile(r":\d+(?=\])")
CANONICAL = "canonical SMILES without stereochemistry and isotopes"
AS_WRITTEN = "SMILES as written in the file"


@functools.cache  # a search of the file system, which would take as long as a short SMILES
def method() -> str:
    """Return how `molecule_identity` identifies molecules: CANONICAL, AS_WRITTEN without RDKit."""
    return CANONICAL if importlib.util.find_spec("rdkit") else AS_WRITTEN


@functools.lru_cache(maxsize=1 << 14)
def molecule_identity(smiles: str) -> str:
    """Return the identity of the molecule of a SMILES, the same for all readers.

    It is the canonical SMILES without stereochemistry, isotopes, atom maps and explicit hydrogens.
    Enantiomers, which have equal energies, and other stereoisomers share an identity. Tautomers and
    protonation states have different ones. Without RDKit, or if it cannot read the SMILES, the
    identity is the SMILES without atom maps.

    >>> molecule_identity("[H]O[C@@H](F)C"), molecule_identity("")
    ('CC(O)F', '')
    """
    as_written = _ATOM_MAP.sub("", smiles)
    limits.check("smiles_characters", len(smiles), "SMILES", DatasetError)
    if not smiles or method() == AS_WRITTEN:
        return as_written
    identity = molecules.identify_smiles(as_written)
    return as_written if identity is None else identity


def readable_name(molecule: str) -> str:
    """Return a readable name of a molecule.

    A SMILES with atom maps becomes the canonical SMILES without them and without explicit
    hydrogens. Other names are returned unchanged.

    >>> readable_name("[C:1]([O:2][H:3])([H:4])([H:5])[H:6]"), readable_name("aspirin")
    ('CO', 'aspirin')
    """
    as_written = _ATOM_MAP.sub("", molecule)
    if as_written == molecule or method() == AS_WRITTEN or not molecules.is_safe_smiles(as_written):
        return as_written
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        parsed = Chem.MolFromSmiles(as_written)
    return as_written if parsed is None else Chem.MolToSmiles(parsed)


def display_name(name: str, smiles: str, numbers: np.ndarray | None, fallback: str) -> str:
    """Return the name of a molecule or crystal in logs, tables and reports.

    >>> display_name("", "", np.array([11, 17]), "structure 3")
    'ClNa'

    Args:
      name: Name in its file, or "".
      smiles: SMILES, or "".
      numbers: Atomic numbers, or None.
      fallback: Name if all of these are unknown, such as the place in the file.
    """
    formula = "" if numbers is None else hill_formula(numbers)
    return name or readable_name(smiles) or formula or fallback


def group(labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the rank of each label among the sorted distinct labels, and the number of these.

    The ranks, (S,) int32 or int64, equal the inverse of np.unique. This function takes a third of
    its memory and is much faster if equal labels are adjacent, as for conformers of a molecule.
    """
    labels = np.asarray(labels)
    if not len(labels):
        return np.zeros(0, np.int32), 0
    dtype = index_type(len(labels))
    # Sort only the first label of each run of equal labels, and repeat the ranks at the end.
    starts = np.flatnonzero(np.concatenate([[True], labels[1:] != labels[:-1]]))
    heads = labels if len(starts) == len(labels) else labels[starts]
    order = np.argsort(heads)
    ordered = heads[order]
    rank = np.cumsum(np.concatenate([[False], ordered[1:] != ordered[:-1]]), dtype=dtype)
    del ordered
    number = np.empty(len(heads), dtype)
    number[order] = rank
    del order
    if len(starts) < len(labels):
        number = np.repeat(number, np.diff(starts, append=len(labels)))
    return number, int(rank[-1]) + 1


def stable_ids(molecule: np.ndarray) -> np.ndarray:
    """Return a reproducible number for each molecule, (S,) uint64.

    The numbers do not depend on the machine or the process. Strings are hashed (blake2b of
    their UTF-8 bytes) and integers are mixed, so the numbers are independent of the order and the
    similarity of the labels.

    Raises:
      ValueError: The labels are not strings or integers.
    """
    molecule = np.asarray(molecule)
    if molecule.dtype.kind in "iu":
        return splitmix64(
            molecule.astype(np.int64 if molecule.dtype.kind == "i" else np.uint64).view(np.uint64)
        )
    names = molecule.tolist()
    distinct = set(names)
    if not all(isinstance(name, str | bytes) for name in distinct):
        raise ValueError(f"molecules must be strings or integers; received {molecule.dtype}")
    number = {
        name: int.from_bytes(
            hashlib.blake2b(
                name if isinstance(name, bytes) else name.encode(), digest_size=8
            ).digest(),
            "little",
        )
        for name in distinct
    }
    return np.array([number[name] for name in names], np.uint64)


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Apply the mixing function of SplitMix64 (Steele, Lea, Flood 2014), a bijection of uint64."""
    z = np.asarray(values, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def index_type(count: int) -> type[np.signedinteger]:
    """Return the smallest of int32 and int64 that can index `count` items."""
    return np.int32 if count < 2**31 else np.int64
