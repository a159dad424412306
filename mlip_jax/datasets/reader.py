"""Base class of readers of data files. Each module in `readers/` has a `Reader` of one format."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from mlip_jax.structure import Structure
from mlip_jax.wording import count_of


class DatasetError(ValueError):
    """A data file is missing, corrupted or not in the expected format."""


@dataclasses.dataclass
class ReadReport:
    """Counts of the records and structures that a reader has read and skipped.

    Attributes:
      records: Number of records read.
      structures: Number of structures read.
      skipped: Number of skipped records or conformations by reason.
      identities: (reason, name) of each skipped record or conformation.
      unread: Number of records by label that they contain and the reader does not read.
      remarks: Number of structures by remark on how they were interpreted.
    """

    records: int = 0
    structures: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    identities: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    unread: dict[str, int] = dataclasses.field(default_factory=dict)
    remarks: dict[str, int] = dataclasses.field(default_factory=dict)

    def skip(self, reason: str, source: str) -> None:
        """Count one skipped record or conformation, identified by `source`."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.identities.append((reason, source))

    def add_unread(self, labels: Iterable[str]) -> None:
        """Count labels of one record that are not read."""
        for label in labels:
            self.unread[label] = self.unread.get(label, 0) + 1

    def remark(self, text: str) -> None:
        """Count one structure to which a remark applies."""
        self.remarks[text] = self.remarks.get(text, 0) + 1

    def add(self, other: ReadReport) -> None:
        """Add the counts of another report, for instance of another range of records."""
        self.records += other.records
        self.structures += other.structures
        for reason, count in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
        self.identities += other.identities
        for label, count in other.unread.items():
            self.unread[label] = self.unread.get(label, 0) + count
        for text, count in other.remarks.items():
            self.remarks[text] = self.remarks.get(text, 0) + count

    def notes(self, reader: Reader) -> list[str]:
        """Return remarks for the user, with the labels that `reader` did not read."""
        notes = [
            f"{text} ({count_of(count, 'structure')})"
            for text, count in sorted(self.remarks.items())
        ]
        if self.unread:
            labels = ", ".join(f"{label} ({count})" for label, count in sorted(self.unread.items()))
            notes.append(
                f"{reader.path.name} contains labels that are not read (number of records): "
                f"{labels}. {reader.UNREAD_REMEDY}"
            )
        return notes


class Reader(abc.ABC):
    """An open data file with `len(reader)` records, each of one or more structures.

    A record is a unit of the file: an HDF5 group, a trajectory, a row. Records are numbered from 0
    in the order of the file, so that several processes can read different ranges of it.

    Attributes:
      LEVEL_OF_THEORY: Level of theory of the labels, unless the file states another one.
      UNITS: Units in the file, for display: {"positions": "bohr", "forces": "hartree/bohr,
        gradient", ...}.
      GENERAL: Whether the reader accepts many kinds of files. When the format is detected, readers
        of specific formats are tried first.
      FROM_FILE: Whether the path of the reader must exist.
      UNREAD_REMEDY: How to read labels that the reader does not read, for messages.
      PROBLEM_OPTIONS: Option that corrects a problem of the data checks, by Problem.what.
      RENAMED_OPTIONS: Options of earlier versions: {old name: new name}. `open_data` accepts both.
      path: Path of the file or folder.
      level_of_theory: Level of theory of the labels in this file.
      atom_energies: Energies of isolated atoms (eV) by symbol, or None if the data set has none.
      notes: Remarks that a user of the data has to know.
      sequential: Whether reading a record requires reading all records before it. Several
        processes then give no speedup.
    """

    LEVEL_OF_THEORY: str = "unknown"
    UNITS: Mapping[str, str] = {}
    GENERAL: bool = False
    FROM_FILE: bool = True
    RENAMED_OPTIONS: Mapping[str, str] = {}
    UNREAD_REMEDY: str = (
        "To train on one of them, write it to extended XYZ and read that with reader 'ase'."
    )
    PROBLEM_OPTIONS: Mapping[str, str] = {}
    sequential: bool = False

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.level_of_theory = self.LEVEL_OF_THEORY
        self.atom_energies: Mapping[str, float] | None = None
        self.notes: list[str] = []
        if self.FROM_FILE and not self.path.exists():
            raise DatasetError(
                f"{self.path}: no such file or folder. Give the path of the data as "
                "config.data.path."
            )
        check_regular(self.path)

    @classmethod
    @abc.abstractmethod
    def matches(cls, path: Path) -> bool:
        """Return whether an existing file or folder looks like this format.

        Reads only a small part of the file and never raises.
        """

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of records."""

    @abc.abstractmethod
    def read(self, records: range, report: ReadReport) -> Iterator[Structure]:
        """Yield the structures of `records` (ascending) in eV, Å and eV/Å.

        Unusable records and structures are skipped and counted in `report`. Missing labels are NaN.

        Raises:
          DatasetError: A record is corrupted or in an unexpected layout or unit. The message
            identifies the record.
        """

    @property
    def format(self) -> str:
        """Name of the reader."""
        return type(self).__module__.rsplit(".", 1)[-1]

    def files(self) -> list[Path]:
        """Return all files of the data set. Their checksums go into the manifest of a store."""
        return (
            [self.path]
            if self.path.is_file()
            else sorted(p for p in self.path.rglob("*") if p.is_file())
        )

    def official_split(self) -> dict[str, np.ndarray] | None:
        """Return the record numbers of "train", "valid" and "test", or None without a split."""
        return None

    def close(self) -> None:  # noqa: B027 (most readers have nothing to close)
        """Close the file."""

    def __iter__(self) -> Iterator[Structure]:
        return self.read(range(len(self)), ReadReport())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class MultiFileReader(Reader):
    """Several files of one format, concatenated. Official splits of single files are ignored."""

    def __init__(self, readers: Sequence[Reader]):
        super().__init__(readers[0].path)
        self.path = Path(", ".join(str(r.path) for r in readers))
        self._readers = list(readers)
        self._ends = np.cumsum([len(r) for r in readers])
        self._same_names = len({r.path.name for r in readers}) < len(readers)
        self.level_of_theory = " / ".join(sorted({r.level_of_theory for r in readers}))
        self.atom_energies = readers[0].atom_energies
        self.notes = list(dict.fromkeys(note for r in readers for note in r.notes))
        self.sequential = any(r.sequential for r in readers)
        self.LEVEL_OF_THEORY, self.UNITS = readers[0].LEVEL_OF_THEORY, readers[0].UNITS
        self.UNREAD_REMEDY = readers[0].UNREAD_REMEDY
        self.PROBLEM_OPTIONS = readers[0].PROBLEM_OPTIONS
        energies = [r.atom_energies for r in readers]
        if any(e != energies[0] for e in energies):
            raise DatasetError(
                f"{', '.join(str(r.path) for r in readers)}: the files state different energies of "
                "isolated atoms; they are not one data set"
            )

    @classmethod
    def matches(cls, path: Path) -> bool:
        return False

    @property
    def format(self) -> str:
        return self._readers[0].format

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, records: range, report: ReadReport) -> Iterator[Structure]:
        for reader, end in zip(self._readers, self._ends.tolist()):
            first = end - len(reader)
            part = range(max(records.start - first, 0), min(records.stop - first, len(reader)))
            if len(part):
                for s in reader.read(part, report):
                    yield dataclasses.replace(s, record=s.record + first, **self._apart(s, reader))

    def _apart(self, s: Structure, reader: Reader) -> dict[str, str]:
        """Return names prefixed with the folder, if several files have the same name."""
        if not self._same_names:
            return {}
        folder = reader.path.parent.name
        named_by_place = s.molecule == s.source or s.molecule.startswith(f"{reader.path.name}:")
        return {"source": f"{folder}/{s.source}"} | (
            {"molecule": f"{folder}/{s.molecule}"} if named_by_place else {}
        )

    def files(self) -> list[Path]:
        return [f for r in self._readers for f in r.files()]

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


def check_regular(path: Path) -> None:
    """Raise DatasetError if an existing path is a pipe or a device, whose opening may never end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise DatasetError(f"{path}: expected a file or a folder, found a pipe or a device")


def symbols_to_numbers(symbols: Iterable[str], source: str) -> np.ndarray:
    """Return the atomic numbers of element symbols in any case ("CL" is chlorine), int32.

    Raises:
      DatasetError: A string is not the symbol of an element.
    """
    from ase.data import atomic_numbers

    symbols = list(symbols)
    try:
        return np.array(list(map(atomic_numbers.__getitem__, symbols)), np.int32)  # the usual case
    except (KeyError, TypeError):
        pass
    try:
        return np.array([atomic_numbers[s.capitalize()] for s in symbols], np.int32)
    except (KeyError, AttributeError) as error:
        raise DatasetError(f"{source}: {error} is not the symbol of an element") from error
