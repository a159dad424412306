"""Files of molecules as users have them, streamed one molecule at a time, each ready to be relaxed.

    .smi, .smiles, .ism      a SMILES and, after a blank, a name on each line; '#' begins a comment line, and a first
                             line that begins with the word "smiles" is a header
    .csv, .tsv               with a header; the columns of SMILES and names are found by name (see `CsvColumns`)
    .sdf, .sd, .mol          mol blocks V2000 and V3000 in Å; those without three-dimensional positions are embedded
    .xyz, .extxyz            extended XYZ in Å; the keys charge, smiles and name of a frame are used, and move_mask
    .db                      ASE databases; the same keys
    others                   whatever ASE reads
    a folder                 a store (store.py)

Text may be compressed (.gz, .bz2, .xz). Nothing is held but what is being worked on.
"""

from __future__ import annotations

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
from mlip_jax.datasets.molecules import embedding, frames
from mlip_jax.datasets.molecules import entries as molecule_entries
from mlip_jax.datasets.molecules.embedding import MoleculeRecord, UnusableMoleculeError
from mlip_jax.datasets.molecules.entries import COMPRESSED, CsvColumns
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.store.store import MANIFEST, is_store

_SUFFIXES = {".smi": "smi", ".smiles": "smi", ".ism": "smi", ".csv": "csv", ".tsv": "csv", ".sdf": "sdf", ".sd": "sdf",
             ".mol": "sdf", ".xyz": "xyz", ".extxyz": "xyz"}
_END = 2**20  # bytes of both ends that tell a file from others
_BY_NAME = CsvColumns()


def read_molecules(path: str | Path, *, num_conformers: int = 1, mmff: bool = False, seed: int = 0,
                   columns: CsvColumns = _BY_NAME, limit: int | None = None, skip: Container[int] = (),
                   share: tuple[int, int] = (0, 1), num_processes: int | None = None) -> Iterator[MoleculeRecord]:
    """The molecules of a file in its order, with indices that do not depend on `skip`, `share` or `limit`.

    A molecule that cannot be read comes as a record with the reason. SMILES are embedded by ETKDGv3 in worker processes
    a bounded way ahead, each with a seed of its own.

    Args:
      path: File or store, see above.
      num_conformers: Of each SMILES; conformer c of molecule m has the index m * num_conformers + c.
      mmff: Relax embedded conformers with MMFF94 where it has parameters.
      seed: Of the embedding.
      columns: Of a CSV file.
      limit: Molecules from the start of the file to look at; None for all.
      skip: Indices that are not wanted; they are not embedded either.
      share: (i, n): only the molecules i, i + n, i + 2 n, ...
      num_processes: That embed; None for one per core, 1 for this one alone.

    Raises:
      DatasetError: The file is missing, damaged as a whole, or of no known kind.
      ConfigError: It has no such column; conformers of molecules that have positions.
      ImportError: RDKit is needed and missing.
    """
    path, kind = Path(path), kind_of(path)
    numbers = range(share[0], sys.maxsize if limit is None else limit, share[1])

    def wanted(number: int) -> bool:
        first = number * num_conformers
        return number in numbers and any(i not in skip for i in range(first, first + num_conformers))

    if kind in molecule_entries.KINDS:
        _require_rdkit()
        options = embedding.EmbeddingOptions(num_conformers, mmff, seed)
        entries = itertools.islice(molecule_entries.read_entries(path, kind, columns), limit)
        jobs = ((entry, options) for entry in entries if wanted(entry.number))
        made: Iterable[MoleculeRecord] = itertools.chain.from_iterable(
            workers.stream(embedding.make, jobs, num_processes, on_death=embedding.gave_up))
    else:
        if num_conformers != 1:
            raise ConfigError(f"{path}: its molecules have positions; num_conformers is for SMILES and must be 1, "
                              f"received {num_conformers}")
        made = frames.KINDS[kind](path, wanted, limit)
    return (_checked(record, path) for record in made if record.index not in skip)


def from_smiles(smiles: str, *, mmff: bool = False, seed: int = 0) -> Atoms:
    """Atoms of a SMILES with hydrogens and positions (ETKDGv3), the same that a file with this SMILES gives.

    >>> from_smiles("CCO").get_chemical_formula()
    'C2H6O'

    Args:
      mmff: Relax with MMFF94 where it has parameters. seed: Of the embedding.

    Raises:
      UnusableMoleculeError: The SMILES cannot be read, or there is no geometry.
      ImportError: RDKit is missing.
    """
    _require_rdkit()
    record, = embedding.make((embedding.Entry(0, smiles, "", smiles), embedding.EmbeddingOptions(1, mmff, seed)))
    if record.atoms is None:
        raise UnusableMoleculeError(record.failure)
    return record.atoms


def count_molecules(path: str | Path, columns: CsvColumns = _BY_NAME) -> int:
    """How many molecules a file has, sound or not.

    Raises:
      DatasetError, ConfigError: As of `read_molecules`.
    """
    path, kind = Path(path), kind_of(path)
    if kind in molecule_entries.KINDS:
        return sum(1 for _ in molecule_entries.read_entries(path, kind, columns))
    return frames.count_frames(path, kind)


def fingerprint(path: str | Path) -> dict[str, Any]:
    """What tells a file of molecules from another: {"bytes": ..., "digest": ...}, the latter of both of its ends.

    Raises:
      DatasetError: There is no such file.
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
    """One of entries.KINDS or frames.KINDS, by the name of the file or what it is.

    Raises:
      DatasetError: There is no such file, or it is a folder and no store.
    """
    path = Path(path)
    if path.is_dir():
        if not is_store(path):
            raise DatasetError(f"{path}: is a folder but no store (no {MANIFEST}); expected a file of molecules")
        return "store"
    if not path.is_file():
        raise DatasetError(f"{path}: no such file; expected one of molecules: .smi, .csv, .sdf, .xyz, .db, a store, or "
                           "another that ASE reads")
    suffixes = [s.lower() for s in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = _SUFFIXES.get(suffixes[-1]) if suffixes else None
    return kind or frames.kind_by_content(path)


def _require_rdkit() -> None:
    try:
        import rdkit  # noqa: F401
    except ImportError as error:
        raise ImportError("SMILES and mol blocks need RDKit: pip install 'mlip-flax[data]'") from error


def _checked(record: MoleculeRecord, path: Path) -> MoleculeRecord:
    """The record, a failure where there is nothing to relax."""
    atoms = record.atoms
    if atoms is None:
        return record
    bad = np.flatnonzero(~np.isfinite(atoms.positions).all(1))
    charge = atoms.info.get("charge", 0.0)
    if not len(atoms):
        what = "there are no atoms"
    elif len(bad):
        what = f"{len(bad)} of {len(atoms)} atoms have NaN or infinite coordinates, the first of them atom {bad[0]}"
    elif not np.isfinite(atoms.cell.array).all():
        what = "the cell is not finite"
    elif not np.isfinite(charge):
        what = f"the charge is {charge}"
    else:
        return record
    failure = f"{path.name} structure {record.index}: {what}"
    return MoleculeRecord(record.index, record.name, record.smiles, None, failure)
