"""LMDB database in one file, checked first because reading a truncated one kills the process."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np

from mlip_jax.datasets.reader import DatasetError


class LmdbFile:
    """LMDB file, open for reading.

    LMDB can open a file only once per process. Readers of the same file share the handle, and the
    last one closes it.
    """

    _open: dict[tuple, list] = {}

    def __init__(self, path: Path):
        self.path = path
        _check_header(path)
        stat = path.stat()
        self._key = (os.path.realpath(path), stat.st_ino, stat.st_mtime_ns)
        if self._key not in self._open:
            self._open[self._key] = [_open_lmdb(path), 0]
        self._open[self._key][1] += 1
        self.handle = self._open[self._key][0]

    def close(self) -> None:
        """Release the handle. Further calls have no effect."""
        if self.handle is not None:
            self.handle = None
            shared = self._open[self._key]
            shared[1] -= 1
            if not shared[1]:
                del self._open[self._key]
                shared[0].close()

    def __del__(self):
        if getattr(self, "handle", None) is not None:
            self.close()

    def keys(self, count: int) -> np.ndarray:
        """Return all keys in order as one array of fixed width; 3.5 million keys take 56 MB."""
        import lmdb

        try:
            with self._handle().begin() as transaction, transaction.cursor() as cursor:
                return np.fromiter(cursor.iternext(keys=True, values=False), "S16", count)
        except (lmdb.Error, ValueError) as error:
            raise DatasetError(
                f"{self.path}: cannot read the list of keys ({error}); the file is corrupted. "
                "Download it again or recreate it."
            ) from error

    def get(self, key: bytes, source: str) -> bytes:
        """Return the value of a key. `source` identifies the record in error messages."""
        import lmdb

        try:
            with self._handle().begin() as transaction:
                value = transaction.get(key)
        except lmdb.Error as error:
            raise DatasetError(
                f"{source}: the record cannot be read ({error}); the file is corrupted. Download "
                "it again or recreate it."
            ) from error
        if value is None:
            raise DatasetError(
                f"{source}: no record has this key; keys are expected to be CIDs of 9 digits"
            )
        return value

    def _handle(self):
        """Return the open handle. Raise DatasetError if the reader is closed."""
        if self.handle is None:
            raise DatasetError(f"{self.path}: the reader is closed")
        return self.handle


def page_size(path: Path) -> int | None:
    """Return the page size that the first page of an LMDB file states; None for other files."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        head = file.read(44)
    # Layout: page header (16 bytes), magic number, version, address, map size, page size.
    if len(head) < 44 or struct.unpack_from("=I", head, 16)[0] != 0xBEEFC0DE:
        return None
    size = struct.unpack_from("=I", head, 40)[0]
    return size if 256 <= size <= 65536 else None


def _check_header(path: Path) -> None:
    """Raise DatasetError if a file is not LMDB or is too short for its first two pages.

    LMDB maps files into memory. Reading beyond the end of a truncated file would kill the process
    instead of raising an error.
    """
    page = page_size(path)
    if page is None:
        content = "a folder" if path.is_dir() else f"{path.stat().st_size} bytes of something else"
        raise DatasetError(
            f"{path}: not an LMDB file; found {content}, expected a single file (LMDB's "
            "subdir=False)"
        )
    if path.stat().st_size < 2 * page:
        raise _truncation_error(path, 2 * page)


def _open_lmdb(path: Path):
    """Open an LMDB file read-only. Raise DatasetError if it is corrupted or truncated."""
    try:
        import lmdb
    except ImportError as error:
        raise ImportError(
            "LMDB files require the package lmdb: pip install 'mlip-flax[data]'"
        ) from error
    try:
        environment = lmdb.open(
            str(path), subdir=False, readonly=True, lock=False, create=False, readahead=False
        )
    except lmdb.Error as error:
        raise DatasetError(
            f"{path}: cannot open it as LMDB ({error}). It is corrupted or not an LMDB file; "
            "download it again or recreate it."
        ) from error
    # Every page that the file states must exist, because reads do not check the size.
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if path.stat().st_size < needed:
        environment.close()
        raise _truncation_error(path, needed)
    return environment


class TruncatedFileError(DatasetError):
    """File that is shorter than its header states."""


def _truncation_error(path: Path, needed: int) -> TruncatedFileError:
    """Return the error for a file of fewer than `needed` bytes."""
    return TruncatedFileError(
        f"{path}: truncated: {path.stat().st_size} bytes, but its header states {needed}. Download "
        "it again or recreate it."
    )
