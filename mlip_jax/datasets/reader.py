"""What a reader of data files is. One file format is one file in `readers/`, with a class `Reader`."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import h5py
import numpy as np

from mlip_jax.structure import Structure


class DatasetError(ValueError):
    """A data file is missing, damaged, or not what it should be."""


@dataclasses.dataclass
class ReadReport:
    """What a reader met: counts of records and structures read, and what it left out.

    Attributes:
      records, structures: Read.
      skipped: Count by reason.
      identities: (reason, record) of all that was skipped.
    """

    records: int = 0
    structures: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    identities: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def skip(self, reason: str, source: str) -> None:
        """Count one record or conformation that is left out; `source` names it."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.identities.append((reason, source))

    def add(self, other: ReadReport) -> None:
        """Count what another part of the file gave."""
        self.records += other.records
        self.structures += other.structures
        for reason, count in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
        self.identities += other.identities


class Reader(abc.ABC):
    """A data file, open for reading: `len(reader)` records, each of one or more structures.

    A record is what the file has as a unit: an HDF5 group, a trajectory, a row. Records are numbered from 0 in the
    order of the file, so that parts of a file can be read by several processes and again.

    Attributes:
      LEVEL_OF_THEORY: Of the labels, where the file itself does not say.
      UNITS: What the file holds, for people: {"positions": "bohr", "forces": "hartree/bohr, gradient", ...}.
      GENERAL: Reads files of many kinds; a reader for the special format comes first when a format is recognised.
      path: As it was given. level_of_theory: Of this file.
      atom_energies: Energies of isolated atoms in eV by symbol where the data set states them, else None.
      notes: What a user of these data must know.
      sequential: Reading a record means reading all before it; several processes gain nothing then.
    """

    LEVEL_OF_THEORY: str = "unknown"
    UNITS: Mapping[str, str] = {}
    GENERAL: bool = False
    sequential: bool = False

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.level_of_theory = self.LEVEL_OF_THEORY
        self.atom_energies: Mapping[str, float] | None = None
        self.notes: list[str] = []
        if not self.path.exists():
            raise DatasetError(f"{self.path}: no such file or folder. Give the path of the data as config.data.path.")

    @classmethod
    @abc.abstractmethod
    def matches(cls, path: Path) -> bool:
        """Whether an existing file or folder looks like this format. Reads little, never raises."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of records."""

    @abc.abstractmethod
    def read(self, records: range, report: ReadReport) -> Iterator[Structure]:
        """The structures of `records` (ascending), one by one, in eV, Å and eV/Å.

        What cannot be used is counted in `report`. Labels that a record lacks are NaN.

        Raises:
          DatasetError: A record is damaged or in another layout or unit; it is named.
        """

    @property
    def format(self) -> str:
        """Name of the reader."""
        return type(self).__module__.rsplit(".", 1)[-1]

    def files(self) -> list[Path]:
        """All files that belong to the data set: their checksums go into the manifest of a store."""
        return [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.is_file())

    def official_split(self) -> dict[str, np.ndarray] | None:
        """Record numbers of "train", "valid" and "test" where the data set comes with a split."""
        return None

    def close(self) -> None:  # noqa: B027 (most have nothing to let go of)
        """Let go of the file."""

    def __iter__(self) -> Iterator[Structure]:
        return self.read(range(len(self)), ReadReport())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class MultiFileReader(Reader):
    """Files of one format, one after the other, as one. What only one of them says (a split) is not passed on."""

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
        energies = [r.atom_energies for r in readers]
        if any(e != energies[0] for e in energies):
            raise DatasetError(f"{', '.join(str(r.path) for r in readers)}: the files state different energies of "
                               "isolated atoms; they do not belong together")

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
        """Names of structures of files that have one name: with the folder before them."""
        if not self._same_names:
            return {}
        folder = reader.path.parent.name
        named_by_place = s.molecule == s.source or s.molecule.startswith(f"{reader.path.name}:")
        return {"source": f"{folder}/{s.source}"} | ({"molecule": f"{folder}/{s.molecule}"} if named_by_place else {})

    def files(self) -> list[Path]:
        return [f for r in self._readers for f in r.files()]

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


def open_hdf5(path: Path) -> h5py.File:
    """h5py.File for reading, with errors that say what is wrong with the file."""
    if not path.exists():
        raise DatasetError(f"{path}: no such file. Give the path of an HDF5 file as config.data.path.")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(f"{path}: cannot be opened as HDF5 ({path.stat().st_size} bytes; {error}). It is "
                           "truncated or not an HDF5 file; download or make it again.") from error


def symbols_to_numbers(symbols: Iterable[str], source: str) -> np.ndarray:
    """Atomic numbers of symbols in any case ("CL" is chlorine), int32.

    Raises:
      DatasetError: Something is no element's symbol.
    """
    from ase.data import atomic_numbers
    try:
        return np.array([atomic_numbers[s.capitalize()] for s in symbols], np.int32)
    except (KeyError, AttributeError) as error:
        raise DatasetError(f"{source}: {error} is not the symbol of an element") from error
