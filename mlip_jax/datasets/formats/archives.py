"""Reader of untrusted compressed tar archives, member by member, without trusting their headers.

A few megabytes of a compressed archive can contain gigabytes of headers (pax records, long names,
maps of sparse files). `tarfile` loads them into memory before it returns the first member. This
module limits the number of decompressed bytes that `tarfile` may read to find the next member.
"""

from __future__ import annotations

import contextlib
import tarfile
import zlib
from typing import BinaryIO

# Maximum number of header bytes before a member. Real archives have a few hundred, or 4 kB with the
# longest path. The limit is low because some versions of tarfile search headers in quadratic time.
MAX_HEADERS = 1 << 14
_AHEAD = 2 * tarfile.RECORDSIZE  # bytes that tarfile may read in advance


class Members:
    """Members of an archive, in order.

    Args:
      file: File of the decompressed bytes. The caller closes it.

    Raises:
      tarfile.ReadError: The archive is invalid, or the headers before a member are too long.
    """

    def __init__(self, file: BinaryIO):
        self._file = _Limited(file)
        self._file.left = MAX_HEADERS + _AHEAD
        with _errors():
            self._tar = tarfile.open(
                fileobj=self._file, mode="r|"
            )  # reads the first member's header

    def next(self) -> tarfile.TarInfo | None:
        """Return the next member; None after the last one."""
        # Allow reading the rest of the last member's data, which tarfile skips.
        self._file.left = max(self._tar.offset - self._file.count, 0) + MAX_HEADERS + _AHEAD
        with _errors():
            info = self._tar.next()
        self._tar.members.clear()  # the list would grow with every member
        return info

    def content(self, info: tarfile.TarInfo) -> BinaryIO:
        """Return the data of the last member. Call it before the next call of `next`."""
        if info.size < 0:
            raise tarfile.ReadError(f"a member of {info.size} bytes")
        self._file.left = info.size + _AHEAD
        return self._tar.extractfile(info)

    def close(self) -> None:
        """Close the archive, but not the file."""
        self._tar.close()


@contextlib.contextmanager
def _errors():
    """Convert any error of tarfile for a corrupted header to ReadError, even RecursionError."""
    try:
        yield
    except (tarfile.TarError, OSError, EOFError, zlib.error):
        raise
    except Exception as error:
        raise tarfile.ReadError(f"corrupted header ({type(error).__name__}: {error})") from error


class _Limited:
    """File that raises ReadError after `left` bytes."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.left = self.count = 0

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes. Raise ReadError beyond `left` bytes in total."""
        data = self._file.read(min(size, self.left + 1))
        self.left -= len(data)
        self.count += len(data)
        if self.left < 0:
            raise tarfile.ReadError(
                f"more than {MAX_HEADERS} bytes of headers before a member, which no data file "
                "has; the archive is corrupted or malicious"
            )
        return data
