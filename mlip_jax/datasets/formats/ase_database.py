"""Reader of ASE databases in SQLite files (`*.db`), row by row and without writing.

Layout (ASE's database format 5 to 9; wiki.fysik.dtu.dk/ase/ase/db/db.html), table `systems`, one
row per structure:

    id               INTEGER, ascending, not necessarily without gaps
    numbers          int32 blob (n,)
    positions        float64 blob (n, 3)
    cell             float64 blob (3, 3);  pbc  INTEGER, bits 1, 2, 4 for the three vectors
    energy, free_energy, magmom                 REAL
    forces, stress, dipole, charges, magmoms    float64 blobs
    masses, momenta, initial_magmoms            float64 blobs
    charge           REAL, the sum of the initial charges
    key_value_pairs  TEXT, JSON
    data             BLOB (format 9): 8 bytes with the offset of a JSON text that refers to arrays
                     in the bytes before; TEXT, JSON (formats 5 to 8). SchNetPack's older files
                     store arrays as base64 text under `name` with `_shape_name` and `_dtype_name`
                     next to it

All numbers are little-endian. Table `information` contains the version of the format and the
metadata (JSON). ASE itself stores eV and Å, but `data` and `key_value_pairs` are in units chosen by
the author: nothing is converted here.

ase.db takes ten times as long for the same rows (13 s instead of 1.3 s for 50,000 molecules of
QM9), instantiates the objects that a file lists in its JSON, and returns the arrays of SchNetPack's
older files as text.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import math
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from mlip_jax import limits
from mlip_jax.datasets.isolation.files import check_sqlite
from mlip_jax.datasets.isolation.program import connect_sqlite, has_journal, tables_of
from mlip_jax.datasets.reader import DatasetError

_MAGIC = b"SQLite format 3\0"
_VERSIONS = range(5, 10)
_SCALARS = ("energy", "free_energy", "magmom")
_ARRAYS = {"forces": (-1, 3), "stress": (-1,), "dipole": (-1,), "charges": (-1,), "magmoms": (-1,)}
_ATOMS = {"masses": (-1,), "momenta": (-1, 3), "initial_magmoms": (-1,)}
_COLUMNS = (
    *("id", "numbers", "positions", "cell", "pbc", "natoms", "charge", "key_value_pairs", "data"),
    *_SCALARS,
    *_ARRAYS,
    *_ATOMS,
)


@dataclasses.dataclass(frozen=True, slots=True)
class AseRow:
    """Row as stored in the file, without conversion.

    Attributes:
      id: Row id in the file.
      numbers: Atomic numbers, int32, shape (n,).
      positions: Positions, float64, shape (n, 3).
      cell: Lattice vectors as rows, float64, shape (3, 3).
      pbc: Periodic directions, bool, shape (3,).
      charge: Column `charge` of the row: the sum of ASE's initial charges.
      results: Calculator results of the row ("energy", "forces", "dipole", ...).
      key_value_pairs: Numbers and texts by key.
      data: Numbers, texts, lists or NumPy arrays by key.
      atoms: Masses (amu), shape (n,), momenta in ASE's units, shape (n, 3), and collinear initial
        magnetic moments ("magmoms"), shape (n,), float64, if known.
    """

    id: int
    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    charge: float
    results: dict[str, Any]
    key_value_pairs: dict[str, Any]
    data: dict[str, Any]
    atoms: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class AseDatabase:
    """ASE database, open for reading.

    Attributes:
      path: Path of the file.
      version: Version of the file format.
      metadata: Metadata of the data set, as written by its author.
    """

    def __init__(self, path: str | Path):
        """Open a database.

        Raises:
          DatasetError: The file is missing, truncated or not an ASE database.
        """
        self.path = Path(path)
        _check_header(self.path)
        self._connection = connect(self.path)
        try:
            self.version, self.metadata = self._information()
            self._ids = self._row_ids()
        except (sqlite3.Error, ValueError, TypeError) as error:
            self.close()
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(
                f"{self.path}: cannot be read as an ASE database ({error}). Download it again or "
                "recreate it."
            ) from error

    def __len__(self) -> int:
        return len(self._ids)

    def rows(self, records: range) -> Iterator[AseRow]:
        """Yield the rows with these record numbers (the first is 0) in the order of their ids.

        Raises:
          DatasetError: A row is corrupted. The message contains its id.
        """
        if not len(records):
            return
        if records.start < 0 or records[-1] >= len(self) or records.step < 1:
            raise IndexError(f"{self.path}: {records} is not within the {len(self)} rows")
        remaining = iter(records)
        next_record, at = next(remaining), records.start
        try:
            cursor = self._connection.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM systems WHERE id BETWEEN ? AND ? ORDER BY id",
                (int(self._ids[records.start]), int(self._ids[records[-1]])),
            )
            for values in cursor:
                if at == next_record:
                    yield self._row(dict(zip(_COLUMNS, values)))
                    next_record = next(remaining, None)
                at += 1
        except sqlite3.Error as error:
            raise DatasetError(
                f"{self.path.name}: row {at} cannot be read ({error}); the file is corrupted. "
                "Download it again or recreate it."
            ) from error
        if next_record is not None:
            raise DatasetError(
                f"{self.path.name}: row {next_record} is missing; the file is corrupted or was "
                "changed while it was read"
            )

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _information(self) -> tuple[int, dict[str, Any]]:
        """Return the version of the format and the metadata."""
        tables = tables_of(self._connection)
        if not {"systems", "information"} <= tables:
            raise DatasetError(
                f"{self.path}: is an SQLite file without the tables of an ASE database; found "
                f"{sorted(tables) or 'no tables'}"
            )
        stored = dict(self._connection.execute("SELECT name, value FROM information"))
        version = int(stored.get("version", 0))
        if version not in _VERSIONS:
            raise DatasetError(
                f"{self.path}: is an ASE database of version {version}, expected {_VERSIONS.start} "
                f"to {_VERSIONS[-1]}. Convert it with `ase db old.db --insert-into new.db`."
            )
        # Files without metadata have no entry or an empty one.
        metadata = json.loads(stored.get("metadata") or "{}")
        return version, metadata if isinstance(metadata, dict) else {}

    def _row_ids(self) -> range | np.ndarray:
        """Return the ids of all rows in ascending order."""
        # These queries use an index, not the rows. Ids without gaps need no list.
        (count,) = self._connection.execute("SELECT COUNT(*) FROM systems").fetchone()
        if not count:
            return range(0)
        (first,) = self._connection.execute("SELECT MIN(id) FROM systems").fetchone()
        (last,) = self._connection.execute("SELECT MAX(id) FROM systems").fetchone()
        if last - first + 1 == count:
            return range(first, last + 1)
        ids = np.fromiter(
            (i for (i,) in self._connection.execute("SELECT id FROM systems")), np.int64, count
        )
        return np.sort(ids)

    def _row(self, values: dict[str, Any]) -> AseRow:
        """Convert the column values of a row. Raise DatasetError if they are corrupted."""
        source = f"{self.path.name}:{values['id']}"
        try:
            positions = np.frombuffer(values["positions"], "<f8").reshape(-1, 3).astype(np.float64)
            numbers = np.frombuffer(values["numbers"], "<i4").astype(np.int32)
            if not len(numbers) == len(positions) == values["natoms"]:
                raise ValueError(
                    f"{len(numbers)} numbers and {len(positions)} positions for {values['natoms']} "
                    "atoms"
                )
            results = {k: values[k] for k in _SCALARS if values[k] is not None}
            arrays = {
                k: np.frombuffer(values[k], "<f8").reshape(shape).astype(np.float64)
                for k, shape in (_ARRAYS | _ATOMS).items()
                if values[k] is not None
            }
            atoms = {k: arrays.pop(k) for k in _ATOMS if k in arrays}
            moments = atoms.pop("initial_magmoms", np.zeros(0))
            atoms |= {"magmoms": moments} if len(moments) == len(numbers) else {}
            results |= arrays
            return AseRow(
                id=values["id"],
                numbers=numbers,
                positions=positions,
                cell=np.frombuffer(values["cell"], "<f8").reshape(3, 3).astype(np.float64),
                pbc=(values["pbc"] or 0) & np.array([1, 2, 4]) > 0,
                charge=float(values["charge"] or 0.0),
                results=results,
                key_value_pairs=decode(values["key_value_pairs"]),
                data=decode(values["data"]),
                atoms=atoms,
            )
        except (
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            OverflowError,
            RecursionError,
        ) as error:
            raise DatasetError(
                f"{source}: the row is corrupted ({error}). Download the file again or recreate it."
            ) from error


def connect(path: Path) -> sqlite3.Connection:
    """Open a database of other people for reading.

    Raises:
      DatasetError: SQLite crashes on the file, or takes too long.
      sqlite3.Error: The file cannot be opened.
    """
    check_sqlite(path)
    return connect_sqlite(path, min(limits.limit("array_bytes"), 2**31 - 1))


def is_sqlite(path: Path) -> bool:
    """Return whether a file begins like an SQLite file, complete or not. Never raises."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def is_ase_database(path: Path) -> bool:
    """Return whether a file has the tables of an ASE database. Reads little and never raises."""
    if not is_sqlite(path):
        return False
    try:
        connection = connect(path)
        try:
            tables = tables_of(connection)
        finally:
            connection.close()
        return {"systems", "information"} <= tables
    except (OSError, sqlite3.Error, ValueError):
        return False


def decode(stored: str | bytes | None) -> dict[str, Any]:
    """Return the mapping in a `data` or `key_value_pairs` column.

    Raises:
      ValueError, TypeError, KeyError: The content is corrupted or not a mapping.
    """
    if stored is None or stored in ("", b""):
        return {}
    if isinstance(stored, bytes):
        start = int.from_bytes(stored[:8], "little")
        if not 8 <= start < len(stored):
            raise ValueError(f"its data say that they end at byte {start} of {len(stored)}")
        value = _plain(json.loads(stored[start:]), stored[:start])
    else:
        value = _plain(json.loads(stored), None)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TypeError(f"expected a mapping in its data, found {type(value).__name__}")
    return _schnetpack_arrays(value)


def _plain(value: Any, binary: bytes | None) -> Any:
    """Return a JSON value with its arrays inserted.

    Other ASE objects remain mappings: no class is looked up by its name.
    """
    if isinstance(value, list):
        return [_plain(v, binary) for v in value]
    if not isinstance(value, dict):
        return value
    if "__complex__" in value:
        return complex(*value["__complex__"])
    if "__ndarray__" not in value:
        return {k: _plain(v, binary) for k, v in value.items()}
    # `content` is a list of values, or the offset of the values in `binary`.
    shape, name, content = value["__ndarray__"]
    dtype = _numeric(name)
    if binary is None:
        return np.array(content, dtype).reshape(shape)
    size = dtype.itemsize * math.prod(shape)
    if content < 8 or content + size > len(binary):
        raise ValueError(
            f"an array of {size} bytes at {content} is outside its {len(binary)} bytes of data"
        )
    return (
        np.frombuffer(binary[content : content + size], dtype)
        .reshape(shape)
        .astype(dtype.newbyteorder("="))
    )


def _schnetpack_arrays(value: dict[str, Any]) -> dict[str, Any]:
    """Decode the arrays that older versions of SchNetPack store as base64 text."""
    encoded = [
        k
        for k in value
        if isinstance(value[k], str) and f"_shape_{k}" in value and f"_dtype_{k}" in value
    ]
    if not encoded:
        return value
    helpers = {f"_{field}_{k}" for k in encoded for field in ("shape", "dtype")}
    decoded = {k: v for k, v in value.items() if k not in helpers}
    for k in encoded:
        dtype = _numeric(value[f"_dtype_{k}"])
        try:
            content = base64.b64decode(value[k], validate=True)
        except binascii.Error as error:
            raise ValueError(f"{k!r} is not base64 text: {error}") from error
        decoded[k] = (
            np.frombuffer(content, dtype)
            .reshape(value[f"_shape_{k}"])
            .astype(dtype.newbyteorder("="))
        )
    return decoded


def _numeric(name: str) -> np.dtype:
    """Return the little-endian dtype of a name. Raise TypeError if it is not numeric."""
    dtype = np.dtype(name).newbyteorder("<")
    if dtype.kind not in "biufc":
        raise TypeError(f"an array of {name!r} is not an array of numbers")
    return dtype


def _check_header(path: Path) -> None:
    """Raise DatasetError if a file is missing, not SQLite or truncated."""
    if not path.is_file():
        raise DatasetError(
            f"{path}: no such file. Give the path of an ASE database as config.data.path."
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(100)
    if not head.startswith(_MAGIC) or len(head) < 100:
        raise DatasetError(
            f"{path}: is not an SQLite file ({size} bytes, begins with {head[:16]!r}). It is "
            "truncated or of another format; download it again or recreate it."
        )
    page = int.from_bytes(head[16:18], "big")
    expected = (65536 if page == 1 else page) * int.from_bytes(head[28:32], "big")
    # The page count is valid if the two change counters agree. Old SQLite versions do not update
    # it.
    if head[24:28] == head[92:96] and size < expected and not has_journal(path):
        raise DatasetError(
            f"{path}: is truncated: {size} bytes of {expected}. Download or copy it again."
        )
