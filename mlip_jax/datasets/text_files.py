"""Text files, optionally compressed and with a byte-order mark."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mlip_jax import limits
from mlip_jax.datasets.reader import DatasetError, check_regular

COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BOM = codecs.BOM_UTF8
# Exceptions of truncated and corrupted compressed files.
READ_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError)


def is_compressed(path: Path) -> bool:
    """Return whether the name of a file ends with the suffix of a compressed file."""
    return path.suffix.lower() in COMPRESSED


def suffix_of(path: Path) -> str:
    """Return the suffix of a file in lower case, without that of its compression.

    >>> suffix_of(Path("water.XYZ.gz"))
    '.xyz'
    """
    return Path(path.stem if is_compressed(path) else path.name).suffix.lower()


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, decompressed if necessary.

    Raises:
      DatasetError: The path is a pipe or a device. Also raised while a compressed file is being
        read, if it expands beyond its limit.
    """
    check_regular(path)
    if not is_compressed(path):
        return open(path, "rb")
    return io.BufferedReader(_Decompressed(path))


class _Decompressed(io.RawIOBase):
    """Decompressed bytes of a file, at most a multiple of its size or limits.SMALL."""

    def __init__(self, path: Path):
        self._path, self._file = path, COMPRESSED[path.suffix.lower()](path, "rb")
        self._size = max(path.stat().st_size, 1)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        count = self._file.tell()
        limits.check_expansion(count, self._size, self._path, DatasetError)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def bounded_lines(file: IO, source: object) -> Iterator:
    """Yield the lines of an open file of text or bytes, each of limited length.

    Raises:
      DatasetError: A line is longer than its limit.
    """
    longest = limits.limit("line_bytes")
    while line := file.readline(longest + 1):
        if len(line) > longest:
            limits.check("line_bytes", len(line), source, DatasetError)
        yield line


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[Iterator[str]]:
    """Open a text file, decompressed if necessary, and yield an iterator of its lines.

    Invalid UTF-8 is replaced, because it can only occur in names.

    Raises:
      DatasetError: The file is truncated or corrupted, or a line is too long. Also raised while the
        file is being read in the body of the `with` statement.
    """
    try:
        with (
            open_bytes(path) as binary,
            io.TextIOWrapper(binary, encoding="utf-8-sig", errors="replace", newline="") as file,
        ):
            yield bounded_lines(file, path)
    except READ_ERRORS as error:
        raise DatasetError(
            f"{path}: cannot be read to its end ({error}); it is corrupted or truncated"
        ) from error
