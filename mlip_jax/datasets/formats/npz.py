"""Arrays of an .npz file by blocks of rows, so that a file of any size is read with little memory.

An .npz file is a zip archive of .npy members. Members stored as they are (`numpy.savez`) are mapped into memory;
compressed ones (`numpy.savez_compressed`) are loaded whole up to `LOAD` bytes and streamed beyond.
Arrays of Python objects are pickles and are refused.
"""

from __future__ import annotations

import dataclasses
import math
import zipfile
import zlib
from pathlib import Path
from typing import Self

import numpy as np
from numpy.lib import format as npy

from mlip_jax.datasets.reader import DatasetError

LOAD = 256 << 20  # bytes: compressed members up to here are loaded whole, so that rows can be read in any order
_LOCAL_HEADER = 30
_DAMAGE = (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class Member:
    """An array in the file: its shape, type, and where its values begin within the member (bytes)."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int
    fortran: bool
    stored: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class NpzFile:
    """An .npz file, open for reading.

    Attributes:
      path: The file. members: Its arrays by name.
    """

    def __init__(self, path: str | Path):
        """Raises:
          DatasetError: The file is missing, truncated or not an .npz file.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise DatasetError(f"{self.path}: no such file. Give the path of an .npz file as config.data.path.")
        self._loaded: dict[str, np.ndarray] = {}
        self._streams: dict[str, tuple[object, int]] = {}
        self._archive = None
        try:
            self._archive = zipfile.ZipFile(self.path)
            self.members = {m.name: m for m in map(self._member, self._archive.infolist()) if m is not None}
        except _DAMAGE as error:
            self.close()
            raise DatasetError(f"{self.path}: cannot be opened as .npz ({self.path.stat().st_size} bytes; {error}). It "
                               "is truncated or not an .npz file; download or make it again.") from error

    def __contains__(self, name: str) -> bool:
        return name in self.members

    def streamed(self, name: str) -> bool:
        """Whether rows can only be read one after the other without reading the member again."""
        member = self.members[name]
        return not member.stored and member.nbytes > LOAD

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of an array, a copy.

        Raises:
          DatasetError: The array holds Python objects, or its bytes are damaged.
        """
        member = self.members[name]
        if member.dtype.hasobject:
            raise DatasetError(f"{self.path}: {name} is an array of Python objects, which only unpickling could read; "
                               "that is not done. Save it again as an array of numbers.")
        stop = min(stop, member.shape[0])
        try:
            if member.stored and member.nbytes:
                return np.array(self._map(member)[start:stop])
            if self.streamed(name):
                return self._stream(member, start, stop)
            if name not in self._loaded:
                self._loaded[name] = self._load(member)
            return self._loaded[name][start:stop].copy()
        except _DAMAGE as error:
            raise DatasetError(f"{self.path}: {name} cannot be read ({error}); the file is damaged. Download or make "
                               "it again.") from error

    def whole(self, name: str) -> np.ndarray:
        """A small array.

        Raises:
          DatasetError: The array holds Python objects, or its bytes are damaged.
        """
        member = self.members[name]
        if member.shape:
            return self.rows(name, 0, member.shape[0])
        if member.dtype.hasobject:
            raise DatasetError(f"{self.path}: {name} is a Python object, which only unpickling could read; "
                               "that is not done.")
        try:
            return self._load(member)
        except _DAMAGE as error:
            raise DatasetError(f"{self.path}: {name} cannot be read ({error}); the file is damaged. Download or make "
                               "it again.") from error

    def text(self, name: str) -> str:
        """A text, empty where there is none or where it is a Python object."""
        if name not in self or self.members[name].dtype.kind not in "SU" or self.members[name].shape not in ((), (1,)):
            return ""
        value = self.whole(name).ravel()[0]
        return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

    def close(self) -> None:
        """Let go of the file."""
        self._loaded.clear()
        self._streams.clear()
        if self._archive is not None:
            self._archive.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _member(self, info: zipfile.ZipInfo) -> Member | None:
        if not info.filename.endswith(".npy"):
            return None
        with self._archive.open(info) as file:
            version = npy.read_magic(file)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
            if read is None:
                raise ValueError(f"{info.filename} is in version {version} of the .npy format")
            shape, fortran, dtype = read(file)
            member = Member(info.filename.removesuffix(".npy"), shape, dtype, file.tell(), fortran,
                            info.compress_type == zipfile.ZIP_STORED)
        if not dtype.hasobject and member.start + member.nbytes != info.file_size:
            raise ValueError(f"{info.filename} has {info.file_size} bytes, expected {member.start + member.nbytes}")
        return member

    def _load(self, member: Member) -> np.ndarray:
        with self._archive.open(f"{member.name}.npy") as file:
            return npy.read_array(file, allow_pickle=False)

    def _map(self, member: Member) -> np.ndarray:
        if member.name not in self._loaded:
            begin = self._archive.getinfo(f"{member.name}.npy").header_offset
            with self.path.open("rb") as file:
                file.seek(begin)
                header = file.read(_LOCAL_HEADER)
            # Name and extra field of the local header can differ in length from those of the zip directory.
            begin += _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            self._loaded[member.name] = np.memmap(
                self.path, member.dtype, "r", begin + member.start, member.shape, "F" if member.fortran else "C")
        return self._loaded[member.name]

    def _stream(self, member: Member, start: int, stop: int) -> np.ndarray:
        if member.fortran:
            raise ValueError("it is stored by columns and too large to be loaded whole")
        row = member.nbytes // member.shape[0]
        file, at = self._streams.get(member.name, (None, 0))
        if file is None or at > start:
            file, at = self._archive.open(f"{member.name}.npy"), 0
            _read(file, member.start)
        for begin in range(at, start, 1024):
            _read(file, row * (min(begin + 1024, start) - begin))
        values = np.frombuffer(_read(file, row * (stop - start)), member.dtype)
        self._streams[member.name] = file, stop
        return values.reshape(stop - start, *member.shape[1:]).copy()


def _read(file, size: int) -> bytes:
    content = file.read(size)
    if len(content) != size:
        raise EOFError(f"{len(content)} bytes found, {size} expected")
    return content


def members(path: Path) -> dict[str, Member]:
    """The arrays of an .npz file by name, nothing where it is none. Reads little, never raises."""
    try:
        if not path.is_file() or not zipfile.is_zipfile(path):
            return {}
        with NpzFile(path) as file:
            return file.members
    except (DatasetError, OSError):
        return {}
