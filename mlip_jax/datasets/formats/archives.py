"""Compressed tar archives from strangers, read member by member without believing their headers.

A few megabytes of a compressed archive can hold gigabytes of headers (pax records, long names, maps of sparse files),
which `tarfile` takes into memory before it gives the first member. Here the decompressed bytes that it may read in
order to find the next member are limited.
"""

from __future__ import annotations

import contextlib
import tarfile
import zlib
from typing import BinaryIO

# Bytes of headers before a member. Real archives have a few hundred, 4 kB with the longest path. Not more, since some
# versions of tarfile search headers in a time that grows with their length squared.
MAX_HEADERS = 1 << 14
_AHEAD = 2 * tarfile.RECORDSIZE  # that tarfile may read beyond what it needs


class Members:
    """The members of an archive, from the first on.

    Args:
      file: Of the decompressed bytes. It is closed by the caller.

    Raises:
      tarfile.ReadError: Also where the headers before a member are too long.
    """

    def __init__(self, file: BinaryIO):
        self._file = _Limited(file)
        self._file.left = MAX_HEADERS + _AHEAD
        with _errors():
            self._tar = tarfile.open(fileobj=self._file, mode="r|")  # reads the first member's header

    def next(self) -> tarfile.TarInfo | None:
        """The next member; None after the last."""
        # What is left of the last member's data is passed over, not kept.
        self._file.left = max(self._tar.offset - self._file.count, 0) + MAX_HEADERS + _AHEAD
        with _errors():
            info = self._tar.next()
        self._tar.members.clear()  # the list would only grow
        return info

    def content(self, info: tarfile.TarInfo) -> BinaryIO:
        """The data of the member that `next` has given, before it is called again."""
        if info.size < 0:
            raise tarfile.ReadError(f"a member of {info.size} bytes")
        self._file.left = info.size + _AHEAD
        return self._tar.extractfile(info)

    def close(self) -> None:
        """Let go of the archive, not of the file."""
        self._tar.close()


@contextlib.contextmanager
def _errors():
    """Whatever tarfile stumbles on in a damaged header, RecursionError among it, as ReadError."""
    try:
        yield
    except (tarfile.TarError, OSError, EOFError, zlib.error):
        raise
    except Exception as error:
        raise tarfile.ReadError(f"damaged header ({type(error).__name__}: {error})") from error


class _Limited:
    """A file that gives no more than `left` bytes."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.left = self.count = 0

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self.left + 1))
        self.left -= len(data)
        self.count += len(data)
        if self.left < 0:
            raise tarfile.ReadError(f"more than {MAX_HEADERS} bytes of headers before a member, as no data file has; "
                                    "the archive is damaged or malicious")
        return data
