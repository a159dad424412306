"""Readers of files of molecules. Molecules are streamed one at a time, ready to be relaxed.

    .smi, .smiles, .ism      one SMILES per line and, after a space, an extension of CXSMILES and a
                             name, both optional; lines that begin with '#' are comments, and a
                             first line that begins with the word "smiles" is a header
    .csv, .tsv               table with a header, separated by commas, semicolons or tabs; columns
                             are found by name (see `CsvColumns`)
    .sdf, .sd, .mol          mol blocks V2000 and V3000 in Å; blocks without three-dimensional
                             positions are embedded
    .xyz, .extxyz            extended XYZ in Å; reads charge, spin (both under their usual names),
                             smiles and name of a frame, and move_mask
    .db                      ASE databases with the same keys
    others                   other formats that ASE reads
    a folder                 a store (store.py)

Text files can be compressed (.gz, .bz2, .xz). Names are read as one line without unprintable
characters. Only the molecules in process are held in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from mlip_jax import workers
from mlip_jax.config import ConfigError
from mlip_jax.datasets.molecules import frames
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.smiles import embedding
from mlip_jax.datasets.smiles import entries as molecule_entries
from mlip_jax.datasets.smiles.embedding import MoleculeRecord, UnusableMoleculeError
from mlip_jax.datasets.smiles.entries import CsvColumns
from mlip_jax.datasets.store.store import MANIFEST, is_store
from mlip_jax.datasets.text_files import suffix_of
from mlip_jax.foreign_text import one_line
from mlip_jax.structure import cell_problem

SUFFIXES = {
    ".smi": "smi",
    ".smiles": "smi",
    ".ism": "smi",
    ".csv": "csv",
    ".tsv": "csv",
    ".sdf": "sdf",
    ".sd": "sdf",
    ".mol": "sdf",
    ".xyz": "xyz",
    ".extxyz": "xyz",
}
_END = 2**20  # bytes at both ends of a file that its fingerprint depends on
_BY_NAME = CsvColumns()


def read_molecules(
    path: str | Path,
    *,
    num_conformers: int = 1,
    mmff: bool = False,
    seed: int = 0,
    columns: CsvColumns = _BY_NAME,
    limit: int | None = None,
    skip: Container[int] = (),
    share: tuple[int, int] = (0, 1),
    num_processes: int | None = None,
    embed: bool = True,
    ahead: int | None = None,
) -> Iterator[MoleculeRecord]:
    """Read the molecules of a file in order. Indices do not depend on `skip`, `share` or `limit`.

    A molecule that cannot be read results in a record with the reason. SMILES are embedded by
    ETKDGv3 in worker processes, a bounded number ahead and each with its own seed.

    Args:
      path: Path of a file or store, see above.
      num_conformers: Number of conformers per SMILES. Conformer c of molecule m has the index
        m * num_conformers + c.
      mmff: Whether to relax embedded conformers with MMFF94 if it has parameters.
      seed: Seed of the embedding.
      columns: Columns of a CSV file.
      limit: Number of molecules to read from the start of the file; None for all.
      skip: Indices to skip. They are not embedded.
      share: (i, n) reads only the molecules i, i + n, i + 2 n, ...
      num_processes: Number of worker processes for the embedding. None is one per core, and 1 runs
        in this process.
      embed: Whether to embed SMILES; see `EmbeddingOptions`.
      ahead: Number of SMILES that are embedded ahead of the caller. None: 8 per process.

    Raises:
      DatasetError: The file is missing, corrupted or of an unknown kind.
      ConfigError: A column is missing, or `num_conformers` is set for molecules with positions.
      ImportError: RDKit is needed and missing.
    """
    path, kind = Path(path), kind_of(path)
    numbers = range(share[0], sys.maxsize if limit is None else limit, share[1])

    def selected(number: int) -> bool:
        first = number * num_conformers
        return number in numbers and any(
            i not in skip for i in range(first, first + num_conformers)
        )

    if kind in molecule_entries.KINDS:
        require_rdkit()
        options = embedding.EmbeddingOptions(num_conformers, mmff, seed, embed)
        entries = itertools.islice(molecule_entries.read_entries(path, kind, columns), limit)
        jobs = ((entry, options) for entry in entries if selected(entry.number))
        records: Iterable[MoleculeRecord] = itertools.chain.from_iterable(
            workers.stream(
                embedding.embed_entry,
                jobs,
                num_processes,
                ahead=ahead,
                on_death=embedding.failed_records,
            )
        )
    else:
        if num_conformers != 1:
            raise ConfigError(
                f"{path}: its molecules have positions. num_conformers applies only to SMILES and "
                f"must be 1; received {num_conformers}"
            )
        records = frames.KINDS[kind](path, selected, limit)
    return (_validate(record, path) for record in records if record.index not in skip)


def from_smiles(smiles: str, *, mmff: bool = False, seed: int = 0) -> Atoms:
    """Return atoms with hydrogens and embedded positions (ETKDGv3) for a SMILES.

    A file with this SMILES results in the same positions.

    >>> from_smiles("CCO").get_chemical_formula()
    'C2H6O'

    Args:
      smiles: SMILES of the molecule.
      mmff: Whether to relax the positions with MMFF94 if it has parameters.
      seed: Seed of the embedding.

    Raises:
      UnusableMoleculeError: The SMILES cannot be read or embedded.
      ImportError: RDKit is missing.
    """
    require_rdkit()
    (record,) = embedding.embed_entry(
        (embedding.Entry(0, smiles, "", smiles), embedding.EmbeddingOptions(1, mmff, seed))
    )
    if record.atoms is None:
        raise UnusableMoleculeError(record.failure)
    return record.atoms


def count_molecules(path: str | Path, columns: CsvColumns = _BY_NAME) -> int:
    """Count the molecules of a file, including unusable ones.

    Raises:
      DatasetError, ConfigError: As in `read_molecules`.
    """
    path, kind = Path(path), kind_of(path)
    if kind in molecule_entries.KINDS:
        return sum(1 for _ in molecule_entries.read_entries(path, kind, columns))
    return frames.count_frames(path, kind)


def fingerprint(path: str | Path) -> dict[str, Any]:
    """Return the identity of a file, {"bytes": ..., "digest": ...}. The digest is of both ends.

    Raises:
      DatasetError: The file does not exist.
    """
    path = Path(path)
    path = path / MANIFEST if kind_of(path) == "store" else path
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(_END))
        file.seek(max(size - _END, 0))
        digest.update(file.read(_END))
    return {"bytes": size, "digest": digest.hexdigest()[:16]}


def kind_of(path: str | Path) -> str:
    """Return the kind of a file, a key of entries.KINDS or frames.KINDS, from its name or content.

    Raises:
      DatasetError: The file does not exist, or is a folder that is not a store.
    """
    path = Path(path)
    if path.is_dir():
        if not is_store(path):
            raise DatasetError(
                f"{path}: is a folder but not a store (no {MANIFEST}); expected a file of molecules"
            )
        return "store"
    if not path.is_file():
        raise DatasetError(
            f"{path}: no such file; expected a file of molecules: .smi, .csv, .sdf, .xyz, .db, a "
            "store, or another format of ASE"
        )
    return SUFFIXES.get(suffix_of(path)) or frames.kind_by_content(path)


def require_rdkit() -> None:
    """Raise ImportError if RDKit is missing."""
    try:
        import rdkit  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "SMILES and mol blocks require RDKit: pip install 'mlip-flax[data]'"
        ) from error


def _validate(record: MoleculeRecord, path: Path) -> MoleculeRecord:
    """Return the record, or a failed record if its atoms, positions, cell or charge are invalid."""
    record = dataclasses.replace(record, name=one_line(record.name), smiles=one_line(record.smiles))
    atoms = record.atoms
    if atoms is None:
        return record
    bad = np.flatnonzero(~np.isfinite(atoms.positions).all(1))
    charge = atoms.info.get("charge", 0.0)
    if not len(atoms):
        problem = "it has no atoms"
    elif len(bad):
        problem = (
            f"{len(bad)} of {len(atoms)} atoms have NaN or infinite coordinates, the first of them "
            f"atom {bad[0]}"
        )
    elif problem := cell_problem(atoms.cell.array, atoms.pbc):
        pass
    elif not np.isfinite(charge):
        problem = f"the charge is {charge}"
    else:
        return record
    failure = f"{path.name} structure {record.index}: {problem}"
    return MoleculeRecord(record.index, record.name, record.smiles, None, failure)
