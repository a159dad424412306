"""Frames of files that ASE supports, without looking up or converting labels.

Extended XYZ, databases and trajectories can be read from any frame. Other formats must be read from
the first frame on (`sequential`).
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from mlip_jax import limits
from mlip_jax.config import ConfigError, unknown_name
from mlip_jax.datasets import options
from mlip_jax.datasets.formats.ase_database import AseDatabase, is_sqlite
from mlip_jax.datasets.formats.xyz import is_xyz, label_names, parse_frame
from mlip_jax.datasets.isolation.other_files import read_frames
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.text_files import (
    BOM,
    READ_ERRORS,
    bounded_lines,
    is_compressed,
    open_bytes,
    suffix_of,
)
from mlip_jax.structure import INITIAL_MOMENTS

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
      comment_energy: Energy (hartree) that a program wrote without a name, or None; see xyz.py.
      moments: ASE's initial magnetic moments, (n,) or (n, 3), or None.
    """

    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    charge: float
    labels: dict[str, Any]
    arrays: dict[str, Any]
    results: dict[str, Any]
    comment_energy: float | None = None
    moments: np.ndarray | None = None

    def has(self, key: str) -> bool:
        """Return whether the frame has a label."""
        return any(key in part for part in (self.labels, self.arrays, self.results))


class FileFrames(abc.ABC):
    """Frames of a file.

    Attributes:
      sequential: Whether reading a frame requires reading all frames before it.
      first: First frame with a label by its name, None if there is no such index.
    """

    sequential = False
    first: dict[str, int] | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of frames."""

    @abc.abstractmethod
    def read(self, records: range) -> Iterator[Frame]:
        """Yield frames by number, in ascending order."""

    def first_with(self, key: str) -> Frame | None:
        """Return the first frame that has a label, or None. Reads the file up to this frame."""
        return next((frame for frame in self.read(range(len(self))) if frame.has(key)), None)

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
        and (suffix_of(path) in (".xyz", ".extxyz") or is_xyz(path))
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


def _from_atoms(atoms: Atoms, comment_energy: float | None = None) -> Frame:
    """Convert ASE's Atoms to a frame."""
    arrays = {k: v for k, v in atoms.arrays.items() if k not in ("numbers", "positions")}
    return Frame(
        numbers=np.asarray(atoms.numbers, np.int32),
        positions=np.array(atoms.positions, np.float64),
        cell=np.array(atoms.cell.array, np.float64),
        pbc=np.array(atoms.pbc, bool),
        charge=float(atoms.get_initial_charges().sum()),
        labels=dict(atoms.info),
        arrays=arrays,
        results=dict(getattr(atoms.calc, "results", {})),
        comment_energy=comment_energy,
        moments=atoms.arrays.get(INITIAL_MOMENTS),
    )


class _XyzFrames(FileFrames):
    """XYZ and extended XYZ with an index of its frames. The file may be compressed."""

    def __init__(self, path: Path, format: str):
        self._path, self._format = path, format
        self.sequential = is_compressed(path)
        self.first = {}
        self._file = open_bytes(path)
        try:
            self._offsets = self._index()
        except READ_ERRORS as error:
            self._file.close()
            raise DatasetError(
                f"{path}: cannot be read to its end ({error}); it is corrupted or truncated"
            ) from error
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def close(self) -> None:
        self._file.close()

    def read(self, records: range) -> Iterator[Frame]:
        for record in records:
            start, end = (int(self._offsets[record + i]) for i in (0, 1))
            self._file.seek(start)
            try:
                text = self._file.read(end - start).decode()
                frame = _from_atoms(*parse_frame(text, self._format))
            except Exception as error:  # ASE's parser raises errors of any type
                raise DatasetError(
                    f"{self._path.name}:{record}: the frame cannot be read "
                    f"({type(error).__name__}: {error}); it is corrupted or not extended XYZ"
                ) from error
            yield frame

    def first_with(self, key: str) -> Frame | None:
        if key not in self.first:
            return super().first_with(key)
        return next(self.read(range(self.first[key], self.first[key] + 1)))

    def _index(self) -> np.ndarray:
        """Return the offset of each frame and of the end of the file, shape (frames + 1,)."""
        file, offsets, line_number = self._file, [], 0
        lines = bounded_lines(file, self._path)
        while True:
            offset = file.tell()
            line = file.readline(1000)
            line_number += 1
            if not line.strip():
                if not line:
                    return np.array([*offsets, offset], np.int64)
                continue
            try:
                atoms = int(line.removeprefix(BOM))
                if atoms < 0:
                    raise ValueError(f"{atoms} atoms")
            except ValueError as error:
                raise DatasetError(
                    f"{self._path}: line {line_number}: expected the number of atoms of frame "
                    f"{len(offsets)}, found {line[:40]!r}. The file is corrupted or not an XYZ "
                    "file."
                ) from error
            limits.check(
                "structure_atoms", atoms, f"{self._path}: line {line_number}", DatasetError
            )
            comment = next(lines, b"")
            for name in label_names(comment):
                self.first.setdefault(name, len(offsets))
            # Skip the atoms of the frame.
            length = bool(comment) + sum(1 for _ in itertools.islice(lines, atoms))
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
                moments=row.atoms.get("magmoms"),
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
            if self._format == "proteindatabank":
                remove_placeholder_cell(atoms)
            yield _from_atoms(atoms)

    def _atoms(self) -> Iterator[Atoms]:
        """Yield ASE's Atoms from the first frame on."""
        try:
            yield from read_frames(self._path, self._format)
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


def remove_placeholder_cell(atoms: Atoms) -> None:
    """Remove the cell of 1 Å × 1 Å × 1 Å by which PDB files state that there is no crystal."""
    if np.array_equal(atoms.cell.array, np.eye(3)):
        atoms.cell, atoms.pbc = None, False
