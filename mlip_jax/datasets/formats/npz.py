"""Arrays of an .npz file in blocks of rows, to read files of any size with little memory.

An .npz file is a zip archive of .npy members. Uncompressed members (`numpy.savez`) are mapped into
memory. Compressed ones (`numpy.savez_compressed`) are loaded completely up to `LOAD` bytes and
streamed if they are larger. Arrays of Python objects are pickles and are rejected.
"""

from __future__ import annotations

import dataclasses
import math
import zipfile
from pathlib import Path
from typing import Self

import numpy as np
from numpy.lib import format as npy

from mlip_jax import limits
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.files import NUMPY_ERRORS

# Size in bytes up to which a compressed member is loaded completely, so that rows can be read in
# any order.
LOAD = 256 << 20
_LOCAL_HEADER = 30


@dataclasses.dataclass(frozen=True)
class Member:
    """Array in the file.

    Attributes:
      name: Name of the array.
      shape: Shape of the array.
      dtype: Type of the values.
      start: Offset of the values within the member (bytes).
      fortran: Whether the values are in column-major order.
      stored: Whether the member is uncompressed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int
    fortran: bool
    stored: bool

    @property
    def nbytes(self) -> int:
        """Size of the values (bytes)."""
        return math.prod(self.shape) * self.dtype.itemsize


class NpzFile:
    """.npz file, open for reading.

    Attributes:
      path: Path of the file.
      members: Arrays of the file by name.
    """

    def __init__(self, path: str | Path):
        """Open a file.

        Raises:
          DatasetError: The file is missing, truncated or not an .npz file.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise DatasetError(
                f"{self.path}: no such file. Give the path of an .npz file as config.data.path."
            )
        self._loaded: dict[str, np.ndarray] = {}
        self._streams: dict[str, tuple[object, int]] = {}
        self._archive = None
        try:
            self._archive = zipfile.ZipFile(self.path)
            self.members = {
                m.name: m for m in map(self._member, self._archive.infolist()) if m is not None
            }
        except NUMPY_ERRORS as error:
            self.close()
            raise DatasetError(
                f"{self.path}: cannot be opened as .npz ({self.path.stat().st_size} bytes; "
                f"{error}). It is truncated or not an .npz file; download it again or recreate it."
            ) from error

    def __contains__(self, name: str) -> bool:
        return name in self.members

    def streamed(self, name: str) -> bool:
        """Return whether rows can only be read in order without decompressing the member again."""
        member = self.members[name]
        return not member.stored and member.nbytes > LOAD

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return a copy of the rows [start, stop) of an array.

        Raises:
          DatasetError: The array contains Python objects, or its bytes are corrupted.
        """
        member = self.members[name]
        if member.dtype.hasobject:
            raise DatasetError(
                f"{self.path}: {name} is an array of Python objects. Pickled objects are not "
                "loaded, for safety. Save it as an array of numbers."
            )
        stop = min(stop, member.shape[0])
        size = max(stop - start, 0) * (member.nbytes // max(member.shape[0], 1))
        limits.check("array_bytes", size, f"{self.path}: {name}", DatasetError)
        try:
            if member.stored and member.nbytes:
                return np.array(self._map(member)[start:stop])
            if self.streamed(name):
                return self._stream(member, start, stop)
            if name not in self._loaded:
                self._loaded[name] = self._load(member)
            return self._loaded[name][start:stop].copy()
        except NUMPY_ERRORS as error:
            raise DatasetError(
                f"{self.path}: {name} cannot be read ({error}); the file is corrupted. Download it "
                "again or recreate it."
            ) from error

    def whole(self, name: str) -> np.ndarray:
        """Return a small array completely.

        Raises:
          DatasetError: The array contains Python objects, or its bytes are corrupted.
        """
        member = self.members[name]
        if member.shape:
            return self.rows(name, 0, member.shape[0])
        if member.dtype.hasobject:
            raise DatasetError(
                f"{self.path}: {name} is a Python object. Pickled objects are not loaded, for "
                "safety."
            )
        limits.check("array_bytes", member.nbytes, f"{self.path}: {name}", DatasetError)
        try:
            return self._load(member)
        except NUMPY_ERRORS as error:
            raise DatasetError(
                f"{self.path}: {name} cannot be read ({error}); the file is corrupted. Download it "
                "again or recreate it."
            ) from error

    def text(self, name: str) -> str:
        """Return a text, or "" if it is missing or not a single string."""
        if (
            name not in self
            or self.members[name].dtype.kind not in "SU"
            or self.members[name].shape not in ((), (1,))
        ):
            return ""
        value = self.whole(name).ravel()[0]
        return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

    def close(self) -> None:
        """Close the file and release loaded arrays."""
        self._loaded.clear()
        self._streams.clear()
        if self._archive is not None:
            self._archive.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _member(self, info: zipfile.ZipInfo) -> Member | None:
        """Return the header of an array, or None if the zip member is not an array."""
        if not info.filename.endswith(".npy"):
            return None
        with self._archive.open(info) as file:
            version = npy.read_magic(file)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(
                version
            )
            if read is None:
                raise ValueError(f"{info.filename} is in version {version} of the .npy format")
            shape, fortran, dtype = read(file)
            member = Member(
                info.filename.removesuffix(".npy"),
                shape,
                dtype,
                file.tell(),
                fortran,
                info.compress_type == zipfile.ZIP_STORED,
            )
        if not dtype.hasobject and member.start + member.nbytes != info.file_size:
            raise ValueError(
                f"{info.filename} has {info.file_size} bytes, expected "
                f"{member.start + member.nbytes}"
            )
        return member

    def _load(self, member: Member) -> np.ndarray:
        """Return an array that is decompressed completely."""
        with self._archive.open(f"{member.name}.npy") as file:
            return npy.read_array(file, allow_pickle=False)

    def _map(self, member: Member) -> np.ndarray:
        """Return an uncompressed array as a memory map."""
        if member.name not in self._loaded:
            begin = self._archive.getinfo(f"{member.name}.npy").header_offset
            with self.path.open("rb") as file:
                file.seek(begin)
                header = file.read(_LOCAL_HEADER)
            # Lengths of name and extra field can differ between local header and zip directory.
            begin += (
                _LOCAL_HEADER
                + int.from_bytes(header[26:28], "little")
                + int.from_bytes(header[28:30], "little")
            )
            self._loaded[member.name] = np.memmap(
                self.path,
                member.dtype,
                "r",
                begin + member.start,
                member.shape,
                "F" if member.fortran else "C",
            )
        return self._loaded[member.name]

    def _stream(self, member: Member, start: int, stop: int) -> np.ndarray:
        """Return rows of a compressed array. Earlier rows than the last ones restart the stream."""
        if member.fortran:
            raise ValueError("it is in column-major order and too large to load completely")
        # Bytes per row; rows are contiguous in row-major order.
        row = member.nbytes // max(member.shape[0], 1)
        file, at = self._streams.get(member.name, (None, 0))
        if file is None or at > start:
            file, at = self._archive.open(f"{member.name}.npy"), 0
            _read(file, member.start)
        for begin in range(at, start, 1024):  # skip rows with little memory
            _read(file, row * (min(begin + 1024, start) - begin))
        values = np.frombuffer(_read(file, row * (stop - start)), member.dtype)
        self._streams[member.name] = file, stop
        return values.reshape(stop - start, *member.shape[1:]).copy()


def _read(file, size: int) -> bytes:
    """Return exactly `size` bytes of a file. Raise EOFError at its end."""
    content = file.read(size)
    if len(content) != size:
        raise EOFError(f"{len(content)} bytes found, {size} expected")
    return content


def members(path: Path) -> dict[str, Member]:
    """Return the arrays of an .npz file by name, {} for other files. Reads little, never raises."""
    try:
        if not path.is_file() or not zipfile.is_zipfile(path):
            return {}
        with NpzFile(path) as file:
            return file.members
    except (DatasetError, OSError):
        return {}
