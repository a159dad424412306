"""HDF5 and SQLite files, which the process of native parsers reads before this process opens them.

Small files are read completely, and large ones from their beginning. The other records of large files
are read by worker processes during a conversion (store/conversion.py).
"""

from __future__ import annotations

import os
from pathlib import Path

from mlip_jax import workers
from mlip_jax.datasets.isolation.process import PARSERS, ParserDeathError
from mlip_jax.datasets.isolation.program import SMALL_HDF5, SMALL_SQLITE
from mlip_jax.datasets.reader import DatasetError

_SQLITE, _HDF5 = b"SQLite format 3\0", b"\x89HDF\r\n\x1a\n"
_MAX_CHECKED = 1000
# SECONDS: limit of a check of a small file; it includes the import of the library, which is slow on
# busy computers and network file systems. _BYTES_PER_SECOND: lowest rate of reading.
SECONDS, _BYTES_PER_SECOND = 60.0, 10e6
# problem of each file that was checked, by device, inode, size and times of the last changes
_checked: dict[tuple[int, ...], str] = {}


def check(path: Path) -> None:
    """Raise DatasetError if a path is an HDF5 or SQLite file that crashes its parser."""
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(16)
        if head.startswith(_HDF5):
            check_hdf5(path)
        elif head == _SQLITE:
            check_sqlite(path)


def check_hdf5(path: Path, *, growing: bool = False) -> None:
    """Raise DatasetError if HDF5 crashes on a file, or takes too long.

    Args:
      path: File to check.
      growing: Whether another process may append to the file.
    """
    _check(path, "read_hdf5", "HDF5", growing)


def check_sqlite(path: Path) -> None:
    """Raise DatasetError if SQLite crashes on a file, or takes too long."""
    _check(path, "read_sqlite", "SQLite")


def is_large_native(path: Path) -> bool:
    """Return whether a file is HDF5 or SQLite and was not read completely by its check."""
    size = path.stat().st_size
    if size <= min(SMALL_HDF5, SMALL_SQLITE):
        return False
    with path.open("rb") as file:
        head = file.read(16)
    return head.startswith(_HDF5) or (head == _SQLITE and size > SMALL_SQLITE)


def _check(path: Path, parser: str, library: str, growing: bool = False) -> None:
    """Read a file in the process of native parsers, unless this process may die itself."""
    if workers.is_isolated():
        return
    path = path.absolute()
    key = (*_key(path), growing)
    if key not in _checked:
        problem = ""
        try:
            read = min(key[2], SMALL_SQLITE)  # bytes, at most
            seconds = SECONDS + read / _BYTES_PER_SECOND
            options = [b"growing"] if growing else []
            PARSERS.call(parser, os.fsencode(path), *options, seconds=seconds)
        except ParserDeathError as error:
            problem = str(error)
        except ValueError:
            pass  # the reader raises a better message
        if not growing and _key(path) != key[:-1]:
            raise DatasetError(f"{path}: the file was changed while it was read")
        if len(_checked) >= _MAX_CHECKED:
            _checked.pop(next(iter(_checked)))
        _checked[key] = problem
    if _checked[key]:
        raise DatasetError(
            f"{path}: {library} cannot read the file ({_checked[key]}). It is corrupted or "
            "malicious; download it again or recreate it."
        )


def _key(path: Path) -> tuple[int, ...]:
    """Return the identity of the content of a file."""
    status = os.stat(path)
    return (
        *(status.st_dev, status.st_ino, status.st_size),
        *(status.st_mtime_ns, status.st_ctime_ns),
    )
