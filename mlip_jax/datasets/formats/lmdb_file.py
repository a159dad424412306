"""Reader of LMDB databases in one file, which checks every offset.

The library lmdb maps the file into memory and trusts its pointers, so a corrupted file crashes
the process or causes endless loops. Reading a file requires only a small part of the format
(github.com/LMDB/lmdb, libraries/liblmdb/mdb.c; 64-bit machines, little-endian):

    page          number (8 bytes), unused (2), flags (2), end of the offsets (2), start of the
                  nodes (2), then the offset of each node (2 each), sorted by key
    node          size (4; with the next 2 bytes the child page of a branch), flags (2), length of
                  the key (2), key, value
    large value   the node has the number of its first page, where it begins after 16 bytes
    pages 0, 1    magic number (4, at byte 16), version (4), address (8), size (8), page size (4),
                  ..., the main database (at byte 88): unused (4), flags (2), depth (2), three
                  counts of pages (8 each), number of entries (8), root page (8); then the number of
                  the last page (8) and the number of the transaction (8)

Of pages 0 and 1, the one with the higher transaction number is valid.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mlip_jax import limits
from mlip_jax.datasets.reader import DatasetError

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_HEADER, _NODE = 16, 8  # bytes before the offsets of a page, and before the key of a node
_BRANCH, _LEAF = 1, 2  # flags of pages
_LARGE = 1  # flag of a node
_NO_PAGE = 2**64 - 1
_MAX_DEPTH = 32
_KEY_BYTES = 16
_KEPT_PAGES = 4096  # pages in memory, of usually 4 kB


class CorruptedPageError(ValueError):
    """A page of an LMDB file is invalid."""


class LmdbFile:
    """LMDB file, open for reading.

    Attributes:
      path: Path of the file.
      length: Number of entries.
      root: Number of the root page.
      depth: Depth of the tree.

    Raises:
      DatasetError: The file is truncated, corrupted, of another version, or not an LMDB file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._page_size = _read_page_size(path)
        self._file: BinaryIO | None = open(path, "rb")
        self._size = path.stat().st_size
        self._pages: dict[int, bytes] = {}
        try:
            heads = [os.pread(self._fd, 152, k * self._page_size) for k in (0, 1)]
            magic, versions = zip(*(struct.unpack_from("=II", head, 16) for head in heads))
            if set(magic) != {_MAGIC} or set(versions) != {_VERSION}:
                raise CorruptedPageError(
                    f"magic numbers {magic}, versions {versions}, expected version {_VERSION}"
                )
            head = max(heads, key=lambda head: struct.unpack_from("=Q", head, 144))
            flags, self.depth = struct.unpack_from("=HH", head, 92)
            self.length, self.root, last = struct.unpack_from("=QQQ", head, 120)
            if flags:
                raise CorruptedPageError(f"keys of another kind (flags {flags})")
            if (last + 1) * self._page_size > self._size:
                raise _truncation_error(path, (last + 1) * self._page_size)
            if self.length * _NODE > self._size or (self.length and self.root == _NO_PAGE):
                raise CorruptedPageError(f"{self.length} entries in {self._size} bytes")
        except BaseException as error:
            self.close()
            if isinstance(error, CorruptedPageError | struct.error):
                raise DatasetError(
                    f"{path}: cannot open it as LMDB ({error}). It is corrupted or of another "
                    "version; download it again or recreate it."
                ) from error
            raise

    def close(self) -> None:
        """Close the file. Further calls have no effect."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def first(self) -> tuple[bytes, bytes]:
        """Return the first key and its value. Raise DatasetError if there is none."""
        key = next((key for keys in self._leaves() for key in keys.tolist()), None)
        if key is None:
            raise DatasetError(f"{self.path}: the file has no entries")
        return key, self.get(key, f"{self.path.name}: first entry")

    def keys(self) -> np.ndarray:
        """Return all keys in order as one array of fixed width; 3.5 million keys take 56 MB."""
        keys = np.concatenate([np.empty(0, f"S{_KEY_BYTES}"), *self._leaves()])
        if len(keys) != self.length:
            raise DatasetError(
                f"{self.path}: {len(keys)} keys, but its header states {self.length}; the file is "
                "corrupted. Download it again or recreate it."
            )
        return keys

    def get(self, key: bytes, source: str) -> bytes:
        """Return the value of a key. `source` identifies the record in error messages."""
        try:
            value = self._find(key)
        except (CorruptedPageError, struct.error) as error:
            raise DatasetError(
                f"{source}: the record cannot be read ({error}); the file is corrupted. Download "
                "it again or recreate it."
            ) from error
        if value is None:
            raise DatasetError(
                f"{source}: no record has this key; keys are expected to be CIDs of 9 digits"
            )
        return value

    @property
    def _fd(self) -> int:
        """File descriptor. Raise DatasetError if the reader is closed."""
        if self._file is None:
            raise DatasetError(f"{self.path}: the reader is closed")
        return self._file.fileno()

    def _find(self, key: bytes) -> bytes | None:
        """Return the value of a key, None if there is none."""
        number = self.root
        for _ in range(_MAX_DEPTH if self.length else 0):
            page, flags, offsets = self._page(number)
            # the first key of a branch is smaller than all others and not stored
            low, high = (1 if flags == _BRANCH else 0), len(offsets)
            while low < high:
                middle = (low + high) // 2
                if _key_of(page, offsets[middle]) <= key:
                    low = middle + 1
                else:
                    high = middle
            if flags == _BRANCH:
                number = _child(page, offsets[low - 1])
                continue
            exists = low and _key_of(page, offsets[low - 1]) == key
            return self._value(page, offsets[low - 1]) if exists else None
        if self.length:
            raise CorruptedPageError("the tree has no leaves")
        return None

    def _value(self, page: bytes, offset: int) -> bytes:
        """Return the value of a node of a leaf."""
        size, flags, key_size = struct.unpack_from("=IHH", page, offset)
        start = offset + _NODE + key_size
        if not flags:
            if start + size > len(page):
                raise CorruptedPageError("a value beyond the end of its page")
            return page[start : start + size]
        if flags != _LARGE:
            raise CorruptedPageError(f"a value of another kind (flags {flags})")
        (number,) = struct.unpack_from("=Q", page, start)
        begin = number * self._page_size + _HEADER
        if begin + size > self._size:
            raise CorruptedPageError("a value beyond the end of the file")
        limits.check("array_bytes", size, self.path, DatasetError)
        return os.pread(self._fd, size, begin)

    def _leaves(self) -> Iterator[np.ndarray]:
        """Yield the keys of each leaf, in order."""
        waiting, left = [self.root] if self.length else [], self._size // self._page_size
        try:
            while waiting:
                page, flags, offsets = self._page(waiting.pop(), keep=False)
                left -= 1
                if left < 0:
                    raise CorruptedPageError("pages that refer to each other in a circle")
                if flags == _LEAF:
                    yield _keys_of(page, offsets)
                else:
                    waiting += [_child(page, offset) for offset in reversed(offsets)]
        except (CorruptedPageError, struct.error) as error:
            raise DatasetError(
                f"{self.path}: cannot read the list of keys ({error}); the file is corrupted. "
                "Download it again or recreate it."
            ) from error

    def _page(self, number: int, keep: bool = True) -> tuple[bytes, int, tuple[int, ...]]:
        """Return a page of the tree, its kind and the offsets of its nodes."""
        page = self._pages.get(number)
        if page is None:
            if not 2 <= number < self._size // self._page_size:
                raise CorruptedPageError(f"page {number} does not exist")
            page = os.pread(self._fd, self._page_size, number * self._page_size)
            if keep and len(self._pages) < _KEPT_PAGES:
                self._pages[number] = page
        flags, end = struct.unpack_from("=HH", page, 10)
        if flags not in (_BRANCH, _LEAF) or not _HEADER < end <= len(page) or end % 2:
            raise CorruptedPageError(f"page {number} is not a page of the tree")
        return page, flags, struct.unpack_from(f"={(end - _HEADER) // 2}H", page, _HEADER)


def _key_of(page: bytes, offset: int) -> bytes:
    """Return the key of a node."""
    (size,) = struct.unpack_from("=H", page, offset + 6)
    if offset + _NODE + size > len(page):
        raise CorruptedPageError("a key beyond the end of its page")
    return page[offset + _NODE : offset + _NODE + size]


def _child(page: bytes, offset: int) -> int:
    """Return the page that a node of a branch refers to."""
    low, high = struct.unpack_from("=IH", page, offset)
    return high << 32 | low


def _keys_of(page: bytes, offsets: tuple[int, ...]) -> np.ndarray:
    """Return the keys of a leaf, cut off after _KEY_BYTES."""
    values, starts = np.frombuffer(page, np.uint8), np.array(offsets, np.int64)
    if starts.max() + _NODE > len(page):
        raise CorruptedPageError("a node beyond the end of its page")
    sizes = values[starts + 6] + values[starts + 7] * np.int64(256)
    if (starts + _NODE + sizes).max() > len(page):
        raise CorruptedPageError("a key beyond the end of its page")
    indices = starts[:, None] + _NODE + np.arange(_KEY_BYTES)
    inside = np.arange(_KEY_BYTES) < sizes[:, None]
    keys = np.where(inside, values[np.minimum(indices, len(page) - 1)], 0).astype(np.uint8)
    return keys.view(f"S{_KEY_BYTES}").ravel()


def page_size(path: Path) -> int | None:
    """Return the page size that the first page of an LMDB file states; None for other files."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        head = file.read(44)
    if len(head) < 44 or struct.unpack_from("=I", head, 16)[0] != _MAGIC:
        return None
    size = struct.unpack_from("=I", head, 40)[0]
    return size if 256 <= size <= 65536 else None


def _read_page_size(path: Path) -> int:
    """Return the page size. Raise DatasetError unless a file is LMDB and has two pages."""
    page = page_size(path)
    if page is None:
        content = "a folder" if path.is_dir() else f"{path.stat().st_size} bytes of something else"
        raise DatasetError(
            f"{path}: not an LMDB file; found {content}, expected a single file (LMDB's "
            "subdir=False)"
        )
    if path.stat().st_size < 2 * page:
        raise _truncation_error(path, 2 * page)
    return page


class TruncatedFileError(DatasetError):
    """File that is shorter than its header states."""


def _truncation_error(path: Path, needed: int) -> TruncatedFileError:
    """Return the error for a file of fewer than `needed` bytes."""
    return TruncatedFileError(
        f"{path}: truncated: {path.stat().st_size} bytes, but its header states {needed}. Download "
        "it again or recreate it."
    )
