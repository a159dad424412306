"""Molecules as arguments of Python functions: ASE's Atoms, SMILES, files, or a list of them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ase import Atoms

from mlip_jax.datasets.molecules.files import SUFFIXES, kind_of, read_molecules, require_rdkit
from mlip_jax.datasets.smiles import embedding
from mlip_jax.datasets.smiles.embedding import (
    EmbeddingOptions,
    MoleculeRecord,
    UnusableMoleculeError,
)
from mlip_jax.datasets.text_files import suffix_of

_EXPECTED = "expected ASE's Atoms, a SMILES, the path of a file of molecules, or a list of these"
_WITHOUT_POSITIONS = ("smi", "csv")  # kinds of files whose molecules are embedded


def molecule_records(
    molecules: Any, *, num_conformers: int = 1, seed: int = 0, embed: bool = True
) -> list[list[MoleculeRecord]]:
    """Return the geometries of each molecule of an argument of a function.

    A SMILES has `num_conformers` embedded geometries. A structure of a file or an Atoms object is
    one geometry of a molecule of its own; in a list, a list of Atoms is one molecule with several
    geometries. A molecule of a list or of a file that cannot be read has a record with the reason.

    >>> [[record]] = molecule_records("CCO")
    >>> record.atoms.get_chemical_formula()
    'C2H6O'

    Args:
      molecules: Atoms, a SMILES, the path of a file that `read_molecules` reads, or a list of them.
      num_conformers: Number of geometries that are embedded per SMILES.
      seed: Seed of the embedding.
      embed: Whether to embed SMILES; see `EmbeddingOptions`.

    Raises:
      ValueError: Unsupported argument, or a text that is not a file or a SMILES.
      DatasetError: A file is missing, corrupted or of an unknown kind.
      ImportError: RDKit is needed and missing.
    """
    options = EmbeddingOptions(num_conformers, False, seed, embed)
    if isinstance(molecules, str) and not _is_file(molecules):
        records = _embed(molecules, options)
        if records[0].atoms is None:
            raise UnusableMoleculeError(
                f"not a file, and not a SMILES that can be embedded: {records[0].failure}"
            )
        return [records]
    if isinstance(molecules, Atoms | str | Path):
        molecules = [molecules]
    if not isinstance(molecules, Iterable):
        raise ValueError(f"molecules: received {molecules!r}; {_EXPECTED}")
    groups: list[list[MoleculeRecord]] = []
    for item in molecules:
        if isinstance(item, Atoms):
            groups.append([_record(item)])
        elif isinstance(item, Path) or (isinstance(item, str) and _is_file(item)):
            groups += _read(Path(item), options)
        elif isinstance(item, str):
            groups.append(_embed(item, options))
        elif isinstance(item, list | tuple) and all(isinstance(atoms, Atoms) for atoms in item):
            groups.append([_record(atoms) for atoms in item])
        else:
            raise ValueError(f"molecules: received {item!r} in a list; {_EXPECTED}")
    return groups


def molecule_list(molecules: Any, *, seed: int = 0) -> list[Atoms]:
    """Return all geometries of an argument of a function; see `molecule_records`.

    Raises:
      ValueError: As for `molecule_records`; or a molecule cannot be read.
    """
    records = itertools.chain.from_iterable(molecule_records(molecules, seed=seed))
    return [usable_atoms(record) for record in records]


def usable_atoms(record: MoleculeRecord) -> Atoms:
    """Return the atoms of a record.

    Raises:
      UnusableMoleculeError: There are none; the message is the reason.
    """
    if record.atoms is None:
        raise UnusableMoleculeError(record.failure)
    return record.atoms


def _is_file(text: str) -> bool:
    """Return whether a text is the path of a file or folder, or has the suffix of a molecule file."""
    return os.path.exists(text) or suffix_of(Path(text)) in SUFFIXES


def _record(atoms: Atoms) -> MoleculeRecord:
    return MoleculeRecord(0, "", str(atoms.info.get("smiles", "")), atoms)


def _embed(smiles: str, options: EmbeddingOptions) -> list[MoleculeRecord]:
    require_rdkit()
    entry = embedding.Entry(0, repr(smiles), "", smiles)
    return list(embedding.embed_entry((entry, options)))


def _read(path: Path, options: EmbeddingOptions) -> list[list[MoleculeRecord]]:
    count = options.num_conformers if kind_of(path) in _WITHOUT_POSITIONS else 1
    records = read_molecules(
        path, num_conformers=count, seed=options.seed, num_processes=1, embed=options.embed
    )
    by_molecule = itertools.groupby(records, key=lambda record: record.index // count)
    groups = [list(group) for _, group in by_molecule]
    if not groups:
        raise ValueError(f"{path}: contains no molecules")
    return groups
