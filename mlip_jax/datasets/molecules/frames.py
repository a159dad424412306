"""Readers of files of molecules with positions: extended XYZ, ASE databases and formats, stores."""

from __future__ import annotations

import contextlib
import itertools
import math
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from mlip_jax import limits
from mlip_jax.datasets.charges import total_charge
from mlip_jax.datasets.formats.ase_database import AseDatabase, connect, is_sqlite
from mlip_jax.datasets.formats.ase_frames import remove_placeholder_cell
from mlip_jax.datasets.formats.xyz import parse_frame
from mlip_jax.datasets.isolation.other_files import read_frames
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.smiles.embedding import MoleculeRecord
from mlip_jax.datasets.store.store import Store
from mlip_jax.datasets.text_files import open_text, suffix_of
from mlip_jax.state_labels import find_charge, find_unpaired, unpaired_of_moments
from mlip_jax.structure import INITIAL_MOMENTS
from mlip_jax.wording import count_of

IndexFilter = Callable[[int], bool]


def read_store(path: Path, selected: IndexFilter, limit: int | None) -> Iterator[MoleculeRecord]:
    """Yield the wanted structures among the first `limit` of a store, in Å and e."""
    store = Store(path)
    numbers = filter(selected, range(len(store))[:limit])
    while block := list(itertools.islice(numbers, 256)):
        for number, s in zip(block, store.take(np.array(block))):
            atoms = Atoms(
                s.numbers, s.positions, cell=s.cell, pbc=False if s.pbc is None else s.pbc
            )
            atoms.info["charge"] = 0.0 if math.isnan(s.charge) else float(s.charge)
            if s.spin:
                atoms.info["num_unpaired_electrons"] = int(s.spin)
            yield MoleculeRecord(number, s.molecule, s.smiles, atoms, "", "as given")


def read_xyz(path: Path, selected: IndexFilter, limit: int | None) -> Iterator[MoleculeRecord]:
    """Yield the wanted frames of extended XYZ (Å). Corrupted frames become failed records."""
    for number, (line, text) in enumerate(itertools.islice(xyz_frames(path), limit)):
        if selected(number):
            yield _parse_frame(number, f"{path.name} line {line}", text)


def xyz_frames(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the first line number and the text of each frame.

    If a frame does not begin with a number of atoms, only its first line is returned, and the rest
    of the file is skipped.

    Raises:
      DatasetError: A line or a frame exceeds its limit.
    """
    with open_text(path) as file:
        lines = enumerate(file, start=1)
        for line, head in lines:
            if not head.strip():
                continue
            if not _is_count(head):
                yield line, head
                return
            limits.check("structure_atoms", int(head), f"{path} line {line}", DatasetError)
            rest = itertools.islice(lines, int(head) + 1)
            yield line, head + "".join(text for _, text in rest)


def _is_count(line: str) -> bool:
    """Return whether a line is a number of atoms."""
    return line.strip().isdecimal() and len(line.strip()) < 20


def _parse_frame(number: int, where: str, text: str) -> MoleculeRecord:
    """Parse a frame of extended XYZ. An invalid frame becomes a failed record."""
    head, *rest = text.splitlines()
    problem = None
    if not _is_count(head):
        problem = (
            f"expected a number of atoms, found {head[:40]!r}; the rest of the file is skipped"
        )
    elif len(rest) < int(head) + 1:
        problem = f"the frame states {int(head)} atoms, but the file is truncated"
    else:
        try:
            atoms = parse_frame(text).atoms
            return _record(number, atoms, atoms.info, atoms.get_initial_charges().sum())
        except Exception as error:  # ASE's parser raises exceptions of any type
            problem = f"the frame cannot be read ({type(error).__name__}: {error})"
    return MoleculeRecord(number, "", "", None, f"{where}: {problem}")


def read_database(path: Path, selected: IndexFilter, limit: int | None) -> Iterator[MoleculeRecord]:
    """Yield the wanted rows of an ASE database (Å). Corrupted rows become failed records."""
    _reject_constraints(path)
    with AseDatabase(path) as database:
        for number in filter(selected, range(len(database))[:limit]):
            try:
                (row,) = database.rows(range(number, number + 1))
            except DatasetError as error:
                yield MoleculeRecord(number, "", "", None, str(error))
                continue
            try:
                atoms = Atoms(row.numbers, row.positions, cell=row.cell, pbc=row.pbc, **row.atoms)
                yield _record(number, atoms, row.data | row.key_value_pairs, row.charge)
            except ValueError as error:
                yield MoleculeRecord(number, "", "", None, f"{path.name}:{row.id}: {error}")


def _reject_constraints(path: Path) -> None:
    """Raise DatasetError if a database has constraints, which would silently be ignored."""
    try:
        with contextlib.closing(connect(path)) as connection:
            row = connection.execute(
                "SELECT id FROM systems WHERE constraints IS NOT NULL AND constraints "
                "NOT IN ('', '[]') LIMIT 1"
            ).fetchone()
    except sqlite3.Error:  # AseDatabase then raises a better message
        return
    if row:
        raise DatasetError(
            f"{path}: row {row[0]} has constraints, which are not read from databases. Convert it "
            "to extended XYZ, which stores fixed atoms as move_mask: ase convert FILE.db "
            "FILE.extxyz"
        )


def read_ase(path: Path, selected: IndexFilter, limit: int | None) -> Iterator[MoleculeRecord]:
    """Yield the wanted structures of a file in a format that `ase.io` reads."""
    for number, atoms in enumerate(itertools.islice(ase_frames(path), limit)):
        if selected(number):
            try:
                yield _record(number, atoms, atoms.info, atoms.get_initial_charges().sum())
            except ValueError as error:
                yield MoleculeRecord(number, "", "", None, f"{path.name}:{number}: {error}")


def ase_frames(path: Path) -> Iterator[Atoms]:
    """Yield all structures of a file with `ase.io`.

    Raises:
      DatasetError: ASE does not know the format or fails at a structure, which makes the later
        structures inaccessible.
    """
    count = 0
    try:
        for atoms in read_frames(path):
            count += 1
            if suffix_of(path) in (".pdb", ".ent"):
                remove_placeholder_cell(atoms)
            yield atoms
    except Exception as error:
        raise DatasetError(
            f"{path}: ASE failed after {count_of(count, 'structure')} "
            f"({type(error).__name__}: {error}). The file is corrupted, or ASE does not recognize its "
            "format by its name"
        ) from error


def count_frames(path: Path, kind: str) -> int:
    """Count the structures of a file whose kind is a key of KINDS."""
    if kind == "store":
        return len(Store(path))
    if kind == "db":
        with AseDatabase(path) as database:
            return len(database)
    return sum(1 for _ in (xyz_frames if kind == "xyz" else ase_frames)(path))


def _record(number: int, atoms: Atoms, labels: Any, initial_charge: float) -> MoleculeRecord:
    """Return the record of a structure, with charge and unpaired electrons from its labels.

    Without labels of the unpaired electrons, they are those of the initial magnetic moments.

    Raises:
      ElectronicStateError: The labels are invalid or contradict each other.
    """
    smiles, name = (_text(labels.get(key)) for key in ("smiles", "name"))
    info = {"charge": total_charge(find_charge(labels), smiles, float(initial_charge))}
    unpaired = find_unpaired(labels, atoms.numbers, info["charge"])
    if unpaired is None:
        moments = atoms.arrays.get(INITIAL_MOMENTS)
        unpaired = unpaired_of_moments(moments, atoms.numbers, info["charge"], atoms.pbc)
    info |= {"num_unpaired_electrons": int(unpaired)} if unpaired else {}
    clean = without_labels(atoms)
    clean.info = info
    return MoleculeRecord(number, name, smiles, clean, "", "as given")


def without_labels(atoms: Atoms) -> Atoms:
    """Return a copy without results, which belong to the present positions.

    Masses, momenta, constraints, and arrays of integers or words such as tags and names of residues
    are kept.
    """
    copy = atoms.copy()  # without the calculator
    copy.info = {}
    for name, values in atoms.arrays.items():
        result = values.dtype.kind == "f" and name not in ("positions", "masses", "momenta")
        # A text of no or several words would shift the columns of files of extended XYZ.
        text = values.dtype.kind in "SUO" and any(len(str(v).split()) != 1 for v in values.flat)
        if result or text:
            del copy.arrays[name]
    return copy


def _text(value: Any) -> str:
    """Return a label as text, "" if it is missing or not a text or number."""
    return "" if value is None or isinstance(value, bool | dict | list | np.ndarray) else str(value)


KINDS = {"store": read_store, "xyz": read_xyz, "db": read_database, "ase": read_ase}


def kind_by_content(path: Path) -> str:
    """Return "db" for SQLite files, or "ase" for all other files."""
    return "db" if is_sqlite(path) else "ase"
