"""Reader of HDF5 files, restricted to data within the file itself.

An HDF5 file can refer to other files: by external links, by data sets in external storage, and by
virtual data sets. A malicious file could thus copy private files of the user into a store that is
later shared. Such references are rejected, and so are soft links, which may lead to them.

`Hdf5Group` and `Hdf5Array` use h5py's low-level interface, which takes half the time of the
high-level one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np

from mlip_jax import limits
from mlip_jax.datasets.isolation.files import check_hdf5
from mlip_jax.datasets.isolation.program import MANY_CHUNKS
from mlip_jax.datasets.reader import DatasetError, check_regular

# Exceptions of h5py and NumPy when they read corrupted records.
HDF5_ERRORS = (
    OSError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
    IndexError,
    MemoryError,
    AttributeError,
    OverflowError,
)
_HARD, _VIRTUAL, _CONTIGUOUS = h5py.h5l.TYPE_HARD, h5py.h5d.VIRTUAL, h5py.h5d.CONTIGUOUS

_TEXT = h5py.string_dtype()
_MANY_VALUES = 100_000  # larger arrays are checked for chunks without values


class Hdf5Array:
    """Array in an HDF5 file.

    Attributes:
      id: Low-level identifier of h5py.
      shape: Shape of the array.
    """

    def __init__(self, id: h5py.h5d.DatasetID, source: str):
        self.id, self.shape, self._source = id, id.shape, source
        if id.get_offset() is None and _is_elsewhere(id):  # the offset of contiguous data is known
            raise _reference(source, "the data of another file")
        if self.shape is None:
            raise DatasetError(f"{source}: an array without a shape; the file is corrupted")
        self._check_size(8)  # most readers convert to float64

    def _check_size(self, itemsize: int) -> None:
        """Raise DatasetError if the array would need too much memory."""
        limits.check("array_bytes", math.prod(self.shape) * itemsize, self._source, DatasetError)

    def _check_chunks(self) -> None:
        """Raise DatasetError if the array has many chunks without stored values.

        A small file can state millions of chunks, and HDF5 then looks for each of them.
        """
        properties = self.id.get_create_plist()
        if properties.get_layout() == h5py.h5d.CHUNKED:
            chunks = math.prod(-(-n // c) for n, c in zip(self.shape, properties.get_chunk()))
            if chunks > max(self.id.get_storage_size(), MANY_CHUNKS):
                raise DatasetError(
                    f"{self._source}: an array of {chunks:,} chunks with "
                    f"{self.id.get_storage_size():,} bytes of values; the file is corrupted"
                )

    @property
    def dtype(self) -> np.dtype:
        """Data type of the array."""
        return self.id.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def read(self, dtype: Any = None) -> np.ndarray:
        """Return the values, converted by HDF5 to `dtype` unless it is None."""
        if dtype is None:
            dtype = self.dtype
            self._check_size(dtype.itemsize)
        if math.prod(self.shape) > _MANY_VALUES:
            self._check_chunks()
        values = np.empty(self.shape, dtype)
        if values.size:
            self.id.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
        return values

    def attribute(self, name: str) -> str:
        """Return an attribute that is one text, or "" if it is missing."""
        return _attribute(self.id, name)


class Hdf5Group(Mapping):
    """Group of an HDF5 file: its members by name.

    Attributes:
      id: Low-level identifier of h5py.
      source: Name for error messages.
    """

    def __init__(self, id: h5py.h5g.GroupID, source: str):
        self.id, self.source = id, source

    def __iter__(self) -> Iterator[str]:
        try:
            names = list(self.id)
        except (RuntimeError, KeyError) as error:
            raise DatasetError(
                f"{self.source}: cannot list its members ({error}); the file is corrupted"
            ) from error
        # invalid UTF-8 is decoded with surrogates, and encoded in the same way
        return (name.decode("utf-8", "surrogateescape") for name in names)

    def __len__(self) -> int:
        return len(self.id)

    def __contains__(self, name: object) -> bool:
        return self.get(name) is not None if "/" in name else self.id.links.exists(_encode(name))

    def __getitem__(self, name: str) -> Hdf5Group | Hdf5Array:
        """Return a member, or one of a subgroup by its path.

        Raises:
          KeyError: There is no such member.
          DatasetError: The member is a link to other data, in another file, or too large.
        """
        group, source = self.id, self._source_of(name)
        *parents, last = filter(None, name.split("/"))
        for parent in parents:
            group = _open(group, parent, source)
            if not isinstance(group, h5py.h5g.GroupID):
                raise KeyError(name)
        member = _open(group, last, source)
        if isinstance(member, h5py.h5g.GroupID):
            return Hdf5Group(member, source)
        if not isinstance(member, h5py.h5d.DatasetID):
            raise DatasetError(f"{source}: expected a group or an array, found a data type")
        return Hdf5Array(member, source)

    def _source_of(self, name: str) -> str:
        """Return the name of a member for error messages: "a.hdf5:water/conformations"."""
        return f"{self.source}{'' if self.source.endswith(':') else '/'}{name}"

    def array(self, name: str) -> Hdf5Array:
        """Return a member that is an array. This is faster than indexing.

        Raises:
          KeyError: There is no such member.
          DatasetError: See `__getitem__`; or the member is not an array.
        """
        source = self._source_of(name)
        member = _open(self.id, name, source, h5py.h5d.open)
        return Hdf5Array(member, source)

    def attribute(self, name: str) -> str:
        """Return an attribute that is one text, or "" if it is missing."""
        return _attribute(self.id, name)

    def groups(self) -> Iterator[str]:
        """Yield the paths of all groups in this one, each group once, in the order of the file."""
        paths: list[bytes] = []
        h5py.h5o.visit(self.id, paths.append)  # follows only hard links, and no circles
        for path in paths:
            name = path.decode("utf-8", "surrogateescape")
            if h5py.h5o.get_info(self.id, path).type == h5py.h5o.TYPE_GROUP and name != ".":
                yield name


class Hdf5File(Hdf5Group):
    """Root group of an open file."""

    def __init__(self, path: Path):
        """Open a file for reading.

        Raises:
          DatasetError: The file is missing, truncated or not an HDF5 file, or crashes HDF5.
        """
        self.path = path
        if not path.exists():
            raise DatasetError(
                f"{path}: no such file. Give the path of an HDF5 file as config.data.path."
            )
        check_regular(path)
        check_hdf5(path)
        try:
            self._file = h5py.File(path, "r")
            super().__init__(self._file["/"].id, f"{path.name}:")
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise DatasetError(
                f"{path}: cannot be opened as HDF5 ({path.stat().st_size} bytes; {error}). It is "
                "truncated or not an HDF5 file; download it again or recreate it."
            ) from error

    def __bool__(self) -> bool:
        """Return whether the file is open, as in h5py. A closed file has no length."""
        return bool(self._file)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __hash__(self) -> int:
        return id(self)


def _open(group: h5py.h5g.GroupID, name: str, source: str, opener: Callable = h5py.h5o.open) -> Any:
    """Return the object of a hard link."""
    encoded = _encode(name)
    try:
        kind = group.links.get_info(encoded).type
    except RuntimeError:
        if group.links.exists(encoded):
            raise
        raise KeyError(name) from None
    if kind != _HARD:
        raise _reference(source, "a link")
    try:
        return opener(group, encoded)
    except (KeyError, ValueError) as error:
        raise DatasetError(f"{source}: cannot be opened ({error}), expected an array") from error


def _is_elsewhere(id: h5py.h5d.DatasetID) -> bool:
    """Return whether the values of an array are in other files."""
    properties = id.get_create_plist()
    layout = properties.get_layout()
    return layout == _VIRTUAL or (layout == _CONTIGUOUS and properties.get_external_count() > 0)


def _attribute(id: Any, name: str) -> str:
    """Return an attribute that is one text, or "" if it is missing."""
    encoded = name.encode()
    if not h5py.h5a.exists(id, encoded):
        return ""
    attribute = h5py.h5a.open(id, encoded)
    try:  # the usual case; shape and type take as long as the rest
        value = np.empty((), _TEXT)
        attribute.read(value)
        return value.item().decode("utf-8", "replace")
    except (TypeError, OSError, AttributeError):
        pass
    shape = attribute.shape
    if shape is None or math.prod(shape) != 1:
        return ""
    value = np.empty(shape, attribute.dtype)
    attribute.read(value)
    value = value.ravel()[0]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _encode(name: str) -> bytes:
    """Return a name as it is stored in the file."""
    return name.encode("utf-8", "surrogateescape")


def _reference(source: str, kind: str) -> DatasetError:
    """Return the error of a member that refers to data elsewhere."""
    return DatasetError(
        f"{source}: is {kind}, which may be a private file of yours, and was not read. If you "
        "trust the file, first copy the data into one file without links, with h5copy or h5py."
    )
