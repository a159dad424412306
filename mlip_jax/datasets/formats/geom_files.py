"""Sources of GEOM's molecules: one pickle, a folder of pickles, or a crude MessagePack file.

Each source yields (record, GeomRecord) for a range of records. readers/geom.py describes the
layout.
"""

from __future__ import annotations

import gzip
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlip_jax.datasets.formats import archives, safe_pickle
from mlip_jax.datasets.formats.elements import validate_numbers
from mlip_jax.datasets.isolation.molecules import read_binaries
from mlip_jax.datasets.reader import DatasetError

_HEAD = 1 << 16  # first bytes of a file, which contain the key "conformers" of the first molecule
MAX_MOLECULE = 1 << 26  # bytes in MessagePack; 7,000 conformers of 100 atoms take 25 MB
READ_ERRORS = (OSError, EOFError, tarfile.TarError, zlib.error)


class GeomRecord(NamedTuple):
    """Record as stored in a file.

    Attributes:
      content: Molecule as described in readers/geom.py; None if it is missing.
      smiles: SMILES under which the molecule is stored, or "".
      subset: Subset of the data set: "drugs", "qm9" or "".
      source: Name of the record, for messages.
      missing: Reason for missing content, or "".
    """

    content: object
    smiles: str
    subset: str
    source: str
    missing: str = ""  # why there is no content


class RDKitMolecule:
    """Replacement for rdkit.Chem.rdchem.Mol in a pickle. It keeps the bytes for RDKit's parser."""

    __slots__ = ("_binary", "_result")

    def __init__(self, binary):
        if not isinstance(binary, bytes):
            raise TypeError(f"an RDKit molecule of {type(binary).__name__}, expected bytes")
        self._binary, self._result = binary, None

    def __setstate__(self, _):
        """Ignore attributes that a program attached to the molecule."""

    def atoms(self, source: str) -> tuple[np.ndarray, np.ndarray, float]:
        """Return atomic numbers, positions (Å) and formal charge (e) of the molecule."""
        if self._result is None:
            parse_molecules([self])
        if isinstance(self._result, ValueError):
            raise DatasetError(
                f"{source}: RDKit cannot read the molecule ({self._result}). The file is "
                "corrupted, or a later version of RDKit wrote it."
            ) from self._result
        numbers, positions, charge = self._result
        self._result = None  # the arrays belong to the structure
        return validate_numbers(numbers, source), positions, charge


def parse_molecules(molecules: Sequence[RDKitMolecule]) -> None:
    """Parse several molecules at once, which is faster. Errors are raised by `RDKitMolecule.atoms`.

    Raises:
      ImportError: RDKit is missing.
    """
    try:
        results = read_binaries([molecule._binary for molecule in molecules])  # noqa: SLF001
    except ImportError as error:
        raise ImportError(
            "GEOM's pickles require the package rdkit: pip install 'mlip-flax[data]'"
        ) from error
    for molecule, result in zip(molecules, results):
        molecule._result = result  # noqa: SLF001


_ALLOWED = {**safe_pickle.NUMPY, ("rdkit.Chem.rdchem", "Mol"): RDKitMolecule}


def _load_pickle(path: Path, source: str):
    """Load a pickle with the restricted unpickler."""
    try:
        with open(path, "rb") as file:
            return safe_pickle.load(file, allowed=_ALLOWED, source=source)
    except OSError as error:
        raise DatasetError(f"{source}: the file cannot be read ({error})") from error


def kind_of(path: Path) -> str | None:
    """Return the kind of a path by its first bytes.

    The kinds are "folder", "pickle", "msgpack" and "tar"; None for anything else.
    """
    if path.is_dir():
        return "folder"
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    # Pickles of protocols 2 to 5 begin with 0x80 and the protocol.
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and b"conformers" in head:
        return "pickle"
    if head[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path) as file:
                first = archives.Members(file).next()
                return "tar" if first is not None and first.name.endswith(".msgpack") else None
        except READ_ERRORS:
            return None
    return "msgpack" if _is_map_of_strings(head) and b"conformers" in head else None


def _is_map_of_strings(head: bytes) -> bool:
    """Return whether MessagePack data begin with a non-empty map whose first key is a string."""
    if len(head) < 6:
        return False
    start = 1 if 0x81 <= head[0] <= 0x8F else {0xDE: 3, 0xDF: 5}.get(head[0])
    return start is not None and (0xA0 <= head[start] <= 0xBF or head[start] in (0xD9, 0xDA, 0xDB))


class Pickle:
    """Source with one pickle."""

    def __init__(self, path: Path, subset: str):
        self._path, self._subset = path, subset or _subset_of(path.parent.name)

    def __len__(self):
        return 1

    def files(self):
        """Return the files of the source."""
        return [self._path]

    def close(self):
        """Do nothing: no file stays open."""
        pass

    def read(self, records: range) -> Iterator[tuple[int, GeomRecord]]:
        """Yield (record, GeomRecord) for each record."""
        for record in records:
            yield (
                record,
                GeomRecord(
                    _load_pickle(self._path, self._path.name), "", self._subset, self._path.name
                ),
            )


class PickleFolder:
    """Source with several pickles, in the order of the summaries, otherwise of their names."""

    def __init__(self, path: Path, subset: str):
        self._path = path
        self._summaries = {
            p.stem.removeprefix("summary_"): p
            for p in sorted(path.glob("summary_*.json"))
            if p.is_file()
        }
        if self._summaries:
            known = self._summaries
            self._entries = [
                e
                for name, p in known.items()
                if subset in ("", name)
                for e in _read_summary(p, name)
            ]
        else:
            entries = [
                (str(p.relative_to(path)), "", _subset_of(p.parent.name))
                for p in sorted(pickles_in(path))
            ]
            known = {e[2] for e in entries}
            self._entries = [e for e in entries if subset in ("", e[2])]
        if subset and subset not in known:
            raise DatasetError(
                f"{path}: has no subset {subset!r}; found {sorted(filter(None, known)) or 'none'}"
            )
        if not self._entries:
            raise DatasetError(
                f"{path}: expected GEOM's rdkit_folder, with summary_drugs.json or "
                "summary_qm9.json, or a folder of its pickles; found neither"
            )
        self._subset = subset

    def __len__(self):
        return len(self._entries)

    def files(self):
        """Return the summaries and the pickles that exist."""
        summaries = [p for name, p in self._summaries.items() if self._subset in ("", name)]
        pickles = (self._path / e[0] for e in self._entries if e[0])
        return summaries + [p for p in pickles if p.is_file()]

    def close(self):
        """Do nothing: no file stays open."""
        pass

    def read(self, records: range) -> Iterator[tuple[int, GeomRecord]]:
        """Yield (record, GeomRecord) for each record."""
        for record in records:
            name, smiles, subset = self._entries[record]
            source = f"{self._path.name}:{name or smiles}"
            missing = (
                "no pickle in the summary"
                if not name
                else ""
                if (self._path / name).is_file()
                else "pickle is missing"
            )
            content = None if missing else _load_pickle(self._path / name, source)
            yield record, GeomRecord(content, smiles, subset, source, missing)


def pickles_in(folder: Path) -> Iterator[Path]:
    """Yield the pickles in a folder and in its immediate subfolders, without pipes and devices."""
    for pattern in ("*.pickle", "*/*.pickle"):
        yield from (p for p in folder.glob(pattern) if p.is_file())


def _subset_of(name: str) -> str:
    """Infer the subset from the name of a file or folder; "" if that is not possible."""
    return next((s for s in ("drugs", "qm9") if name.lower().startswith(s)), "")


def _read_summary(path: Path, subset: str) -> list[tuple[str, str, str]]:
    """Return (relative path of the pickle, SMILES, subset) of each molecule in a summary."""
    try:
        with open(path, encoding="utf-8") as file:
            summary = json.load(file)
        entries = [
            (molecule.get("pickle_path") or "", smiles, subset)
            for smiles, molecule in summary.items()
        ]
    except (ValueError, AttributeError, RecursionError, OSError) as error:
        raise DatasetError(
            f"{path}: not a summary of GEOM ({type(error).__name__}: {error}); expected "
            "{SMILES: {'pickle_path': ...}}. It is truncated or something else."
        ) from error
    for name, smiles, _ in entries:
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise DatasetError(f"{path}: {smiles}: pickle_path {name!r} is outside the folder")
    return entries


class MessagePackStream:
    """Source with a crude MessagePack file, plain or the first member of a tar.gz.

    Only one molecule is in memory at a time.
    """

    def __init__(self, path: Path, kind: str, subset: str):
        self._path, self._kind, self._subset = path, kind, subset or _subset_of(path.name)
        self._length: int | None = None
        self._position, self._items = 0, None

    def __len__(self):
        if self._length is None:
            self._length = sum(1 for _ in self._open(skip=lambda _: True))
        return self._length

    def files(self):
        """Return the files of the source."""
        return [self._path]

    def close(self):
        """Close the stream. The next read starts from the beginning."""
        if self._items is not None:
            self._items.close()
            self._items = None

    def read(self, records: range) -> Iterator[tuple[int, GeomRecord]]:
        """Yield (record, GeomRecord) for each record. The stream continues from the last record."""
        if not records:
            return
        # A stream cannot go backward: start again.
        if self._items is None or self._position > records.start:
            self.close()
            self._requested, self._position = records, 0
            self._items = self._open(skip=lambda record: record < self._requested.start)
        self._requested = records
        while self._position < records.stop:
            item = next(self._items, None)
            if item is None:
                self.close()
                raise DatasetError(
                    f"{self._path}: record {records.stop - 1} is missing or corrupted; the "
                    f"readable part ends after {self._position} records"
                )
            record, self._position = self._position, self._position + 1
            if record in records:
                yield (
                    record,
                    GeomRecord(item[1], item[0], self._subset, f"{self._path.name}:{item[0]}"),
                )

    def _open(self, skip) -> Iterator[tuple[str, object]]:
        """Yield (SMILES, molecule) of all records; molecule is None if `skip(record)` is true."""
        if self._kind == "msgpack":
            with open(self._path, "rb") as file:
                yield from _unpack(file, self._path.stat().st_size, self._path, skip)
            return
        try:
            with gzip.open(self._path) as file:
                archive = archives.Members(file)
                member = archive.next()
                if member is None or not member.isfile():
                    raise tarfile.ReadError("its first member is not a file")
                yield from _unpack(archive.content(member), member.size, self._path, skip)
        except READ_ERRORS as error:
            raise DatasetError(
                f"{self._path}: cannot be read to its end ({error}). It is truncated or corrupted; "
                "download it again."
            ) from error


class _LimitedValue:
    """File that limits the bytes per value.

    A value of many small objects takes about 60 times as much memory as bytes in the file.
    """

    def __init__(self, file):
        self._file, self.left = file, MAX_MOLECULE

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes. Raise ValueError if the limit was exceeded before."""
        if self.left < 0:
            raise ValueError(f"more than {MAX_MOLECULE} bytes, more than any molecule")
        data = self._file.read(size)
        self.left -= len(data)
        return data


def _unpack(file, size: int, path: Path, skip) -> Iterator[tuple[str, object]]:
    """Yield (SMILES, molecule) of a MessagePack stream of `size` bytes."""
    import msgpack

    # msgpack trusts the lengths in a corrupted file and allocates memory for them, up to these
    # limits.
    file = _LimitedValue(file)
    unpacker = msgpack.Unpacker(
        file,
        raw=False,
        read_size=1 << 20,
        max_buffer_size=1 << 28,
        max_array_len=1 << 20,
        max_map_len=1 << 20,
    )
    record, last = 0, "the beginning"
    try:
        while unpacker.tell() < size:
            for _ in range(unpacker.read_map_header()):
                smiles = unpacker.unpack()
                if not isinstance(smiles, str):
                    raise DatasetError(
                        f"{path.name}: molecule {record} has the key "
                        f"{safe_pickle.short_repr(smiles)}, expected a SMILES"
                    )
                # The limit applies per molecule.
                last, file.left = smiles, MAX_MOLECULE
                if skip(record):
                    file.left = size
                    unpacker.skip()
                    molecule = None
                else:
                    molecule = unpacker.unpack()
                record += 1
                yield smiles, molecule
    except msgpack.OutOfData as error:
        raise DatasetError(
            f"{path}: truncated after molecule {record} ({last}): {size} bytes. Download it again."
        ) from error
    except (msgpack.UnpackException, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"{path}: molecule {record} (after {last}) is corrupted ({type(error).__name__}: "
            f"{error}). Download it again."
        ) from error
