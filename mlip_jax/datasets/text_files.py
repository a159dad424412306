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

from mlip_jax.datasets.reader import DatasetError

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
    """Open a file for reading bytes, decompressed if necessary."""
    return COMPRESSED.get(path.suffix.lower(), open)(path, "rb")


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[io.TextIOBase]:
    """Open a text file, decompressed if necessary.

    Invalid UTF-8 is replaced, because it can only occur in names.

    Raises:
      DatasetError: The file is truncated or corrupted. Also raised while the file is being read in
        the body of the `with` statement.
    """
    try:
        with COMPRESSED.get(path.suffix.lower(), open)(
            path, "rt", encoding="utf-8-sig", errors="replace", newline=""
        ) as file:
            yield file
    except READ_ERRORS as error:
        raise DatasetError(
            f"{path}: cannot be read to its end ({error}); it is corrupted or truncated"
        ) from error
