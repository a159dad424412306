"""Frames of files that ASE supports, without looking up or converting labels.

Extended XYZ, databases and trajectories can be read from any frame. Other formats must be read from
the first frame on (`sequential`).
"""

from __future__ import annotations

import abc
import dataclasses
import io
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from mlip_jax.config import ConfigError, unknown_name
from mlip_jax.datasets import options
from mlip_jax.datasets.formats.ase_database import AseDatabase, is_sqlite
from mlip_jax.datasets.reader import DatasetError

log = logging.getLogger(__name__)

_TRAJECTORY_MAGIC = b"- of UlmASE-Trajectory"
_PICKLES = {"bundletrajectory"}


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    """Content of one frame, without conversion.

    Attributes:
      numbers: Atomic numbers, int32, shape (n,).
      positions: Positions in the unit of the file, shape (n, 3).
      cell: Lattice vectors as rows in the unit of the file, shape (3, 3).
      pbc: Periodic directions, bool, shape (3,).
      charge: Sum of ASE's initial charges.
      labels: Labels of the structure by name.
      arrays: Labels of the atoms by name.
      results: Calculator results by name.
    """

    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    charge: float
    labels: dict[str, Any]
    arrays: dict[str, Any]
    results: dict[str, Any]


class FileFrames(abc.ABC):
    """Frames of a file.

    Attributes:
      sequential: Whether reading a frame requires reading all frames before it.
    """

    sequential = False

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of frames."""

    @abc.abstractmethod
    def read(self, records: range) -> Iterator[Frame]:
        """Yield frames by number, in ascending order."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close the file."""


def open_frames(path: Path, format: str) -> FileFrames:
    """Open the frames of a file.

    Args:
      path: Path of the file.
      format: ASE's name of the file format; "" detects it.

    Raises:
      ConfigError: ASE does not have this format.
      DatasetError: The path is not a file, or the file cannot be read.
    """
    from ase.io.formats import ioformats

    if not path.is_file():
        raise DatasetError(f"{path}: expected a file, found a folder")
    if format and format not in ioformats:
        raise ConfigError(unknown_name("ASE format", format, list(ioformats)))
    if format == "db" or not format and is_sqlite(path):
        return _DatabaseFrames(path)
    if format == "traj" or not format and is_trajectory(path):
        return _TrajectoryFrames(path)
    if (
        format in ("xyz", "extxyz")
        or not format
        and (path.suffix in (".xyz", ".extxyz") or is_xyz(path))
    ):
        return _XyzFrames(path, format or "extxyz")
    return _StreamedFrames(path, format)


def has_labels(frames: FileFrames, count: int = 10) -> bool:
    """Return whether one of the first frames has a label that looks like an energy or forces."""
    words = ("energ", "force", "grad")
    return any(
        word in name.lower()
        for frame in frames.read(range(min(count, len(frames))))
        for part in (frame.labels, frame.arrays, frame.results)
        for name in part
        for word in words
    )


class MemoryFrames(FileFrames):
    """Frames from ASE's Atoms in memory.

    Results of a calculator count only if they belong to the present positions. Several structures
    may share a calculator, which has the results of the last one.
    """

    def __init__(self, atoms: Sequence[Atoms]):
        self._atoms = atoms

    def __len__(self) -> int:
        return len(self._atoms)

    def close(self) -> None:
        pass

    def read(self, records: range) -> Iterator[Frame]:
        for record in records:
            atoms = self._atoms[record]
            frame = _from_atoms(atoms)
            outdated = atoms.calc is not None and bool(atoms.calc.check_state(atoms))
            yield dataclasses.replace(frame, results={}) if outdated else frame


def _from_atoms(atoms: Atoms) -> Frame:
    """Convert ASE's Atoms to a frame."""
    results = getattr(atoms.calc, "results", {}) if atoms.calc is not None else {}
    arrays = {k: v for k, v in atoms.arrays.items() if k not in ("numbers", "positions")}
    return Frame(
        numbers=np.asarray(atoms.numbers, np.int32),
        positions=np.array(atoms.positions, np.float64),
        cell=np.array(atoms.cell.array, np.float64),
        pbc=np.array(atoms.pbc, bool),
        charge=float(atoms.get_initial_charges().sum()),
        labels=dict(atoms.info),
        arrays=arrays,
        results=dict(results),
    )


class _XyzFrames(FileFrames):
    """Extended XYZ with an index of its frames."""

    def __init__(self, path: Path, format: str):
        self._path, self._format = path, format
        self._file = path.open("rb")
        try:
            self._offsets = self._index()
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def close(self) -> None:
        self._file.close()

    def read(self, records: range) -> Iterator[Frame]:
        from ase.io import read

        for record in records:
            start, end = (int(self._offsets[record + i]) for i in (0, 1))
            self._file.seek(start)
            try:
                text = io.StringIO(self._file.read(end - start).decode())
                frame = _from_atoms(read(text, format=self._format))
            except Exception as error:  # ASE's parser raises errors of any type
                raise DatasetError(
                    f"{self._path.name}:{record}: the frame cannot be read "
                    f"({type(error).__name__}: {error}); it is corrupted or not extended XYZ"
                ) from error
            yield frame

    def _index(self) -> np.ndarray:
        """Return the offset of each frame and of the end of the file, shape (frames + 1,)."""
        file, offsets, line_number = self._file, [], 0
        while True:
            offset = file.tell()
            line = file.readline(1000)
            line_number += 1
            if not line.strip():
                if not line:
                    return np.array([*offsets, offset], np.int64)
                continue
            try:
                atoms = int(line)
                if atoms < 0:
                    raise ValueError(f"{atoms} atoms")
            except ValueError as error:
                raise DatasetError(
                    f"{self._path}: line {line_number}: expected the number of atoms of frame "
                    f"{len(offsets)}, found {line[:40]!r}. The file is corrupted or not an XYZ "
                    "file."
                ) from error
            # Skip the comment and the atoms of the frame.
            length = sum(1 for _ in itertools.islice(file, atoms + 1))
            if length < atoms + 1:
                raise DatasetError(
                    f"{self._path}: frame {len(offsets)} (line {line_number}) states {atoms} "
                    f"atoms, but the file ends after {max(length - 1, 0)}. It is truncated; "
                    "download it again or recreate it."
                )
            offsets.append(offset)
            line_number += length


class _DatabaseFrames(FileFrames):
    """ASE database. Key-value pairs, data and calculator results serve as labels."""

    def __init__(self, path: Path):
        self._database = AseDatabase(path)

    def __len__(self) -> int:
        return len(self._database)

    def close(self) -> None:
        self._database.close()

    def read(self, records: range) -> Iterator[Frame]:
        for row in self._database.rows(records):
            yield Frame(
                numbers=row.numbers,
                positions=row.positions,
                cell=row.cell,
                pbc=row.pbc,
                charge=row.charge,
                labels=row.key_value_pairs,
                arrays=row.data,
                results=row.results,
            )


class _TrajectoryFrames(FileFrames):
    """ASE trajectory."""

    def __init__(self, path: Path):
        from ase.io.trajectory import TrajectoryReader

        self._path = path
        try:
            self._reader = TrajectoryReader(path)
        except Exception as error:
            raise DatasetError(
                f"{path}: cannot be opened as an ASE trajectory ({type(error).__name__}: {error}); "
                "it is truncated or of another format"
            ) from error

    def __len__(self) -> int:
        return len(self._reader)

    def close(self) -> None:
        self._reader.close()

    def read(self, records: range) -> Iterator[Frame]:
        for record in records:
            try:
                frame = _from_atoms(self._reader[record])
            except Exception as error:
                raise DatasetError(
                    f"{self._path.name}:{record}: the frame cannot be read "
                    f"({type(error).__name__}: {error}); the file is corrupted"
                ) from error
            yield frame


class _StreamedFrames(FileFrames):
    """File of any other format of `ase.io`, read from start to end."""

    sequential = True

    def __init__(self, path: Path, format: str):
        self._path, self._format = path, self._known_format(path, format)
        self._iterator, self._position = None, 0
        self._length = sum(1 for _ in self._atoms())

    def __len__(self) -> int:
        return self._length

    def close(self) -> None:
        self._iterator = None

    def read(self, records: range) -> Iterator[Frame]:
        for record in records:
            if self._iterator is None or record < self._position:
                self._iterator, self._position = self._atoms(), 0
            atoms = next(itertools.islice(self._iterator, record - self._position, None), None)
            if atoms is None:
                raise DatasetError(
                    f"{self._path}: ends before frame {record} of {self._length}: the file has "
                    "changed since it was opened"
                )
            self._position = record + 1
            yield _from_atoms(atoms)

    def _atoms(self) -> Iterator[Atoms]:
        """Yield ASE's Atoms from the first frame on."""
        from ase.io import iread

        try:
            yield from iread(self._path, index=":", format=self._format)
        except Exception as error:
            raise DatasetError(
                f"{self._path}: cannot be read as {self._format!r} ({type(error).__name__}: "
                f"{error}). The file is corrupted or has another format. Set the format, "
                f"{options.as_flag('format', 'NAME')}."
            ) from error

    @staticmethod
    def _known_format(path: Path, format: str) -> str:
        """Return ASE's name of the format. Raise DatasetError for unknown formats and pickles."""
        from ase.io.formats import filetype

        try:
            format = format or filetype(str(path), guess=False)
        except Exception as error:
            raise DatasetError(
                f"{path}: ASE does not recognize the format ({error}). Set it, "
                f"{options.as_flag('format', 'NAME')}."
            ) from error
        if format in _PICKLES:
            raise DatasetError(
                f"{path}: ASE's {format!r} contains Python pickles, which can run arbitrary code. "
                "It is not read. Convert it to extended XYZ."
            )
        return format


def is_trajectory(path: Path) -> bool:
    """Return whether a file begins like an ASE trajectory."""
    with path.open("rb") as file:
        return file.read(len(_TRAJECTORY_MAGIC)) == _TRAJECTORY_MAGIC


def is_xyz(path: Path) -> bool:
    """Return whether a file begins like XYZ.

    It must have a number of atoms, a comment, and one line per atom with a symbol and at least
    three numbers.
    """
    with path.open("rb") as file:
        first = file.readline(50)
        if not first.strip().isdigit() or not 0 < int(first) < 10_000_000:
            return False
        file.readline()
        for _ in range(min(int(first), 20)):
            cells = file.readline(10_000).split()
            if len(cells) < 4:
                return False
        return sum(_is_number(c) for c in cells) >= 3


def _is_number(text: bytes) -> bool:
    """Return whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
