"""Archive dsgdb9nsd.xyz.tar.bz2 of QM9, described in readers/qm9.py, read in order."""

from __future__ import annotations

import bz2
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from mlip_jax.datasets.formats import archives
from mlip_jax.datasets.formats.qm9_records import parse_member
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.wording import count_of

MEMBER = re.compile(r"dsgdb9nsd_(\d{6})\.xyz$")
_MAX_MEMBER = 1 << 20  # bytes; a molecule takes 2,000


class Archive:
    """Archive .tar.bz2, read in order. The position is kept between calls."""

    has_indices = True

    def __init__(self, path: Path):
        self.path = path
        self._tar: archives.Members | None = None
        self._following: Iterator[tarfile.TarInfo] = iter(())
        self._next = 0  # record of the next item of `_following`
        self._length: int | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __len__(self) -> int:
        if self._length is None:
            with Archive(self.path) as other:
                self._length = sum(1 for _ in other._members())
        return self._length

    def files(self) -> list[Path]:
        """Return the path of the archive."""
        return [self.path]

    def close(self) -> None:
        """Close the archive. The next read starts from the beginning."""
        if self._tar is not None:
            self._tar.close()
            self._file.close()
            self._tar = None

    def first_member(self) -> tarfile.TarInfo | None:
        """Return the first molecule's member, or None if it is not among the first five members."""
        self._rewind()
        for _ in range(5):
            info = self._tar.next()
            if info is None or info.size > _MAX_MEMBER:
                return None
            if info.isfile() and MEMBER.search(info.name):
                return info
        return None

    def read(self, records: range):
        """Yield the records. Going back to an earlier record starts from the beginning again."""
        if not len(records):
            return
        # A compressed stream cannot seek backward.
        if self._tar is None or self._next > records[0]:
            self._next, self._following = 0, self._members()
        while self._next < records.stop:
            info = next(self._following, None)
            if info is None:
                raise DatasetError(
                    f"{self.path}: ends after {count_of(self._next, 'molecule')}, requested "
                    f"{records[-1]}"
                )
            record, self._next = self._next, self._next + 1
            if record in records:
                index = int(MEMBER.search(info.name)[1])
                source = f"{self.path.name}:{Path(info.name).name}"
                content = self._content(info)
                yield (
                    record,
                    index,
                    source,
                    lambda c=content, i=index, s=source: parse_member(c, i, s),
                )

    def _content(self, info) -> bytes:
        """Return the content of a member. Raise DatasetError if it is too large or corrupted."""
        try:
            if info.size > _MAX_MEMBER:
                raise tarfile.ReadError(
                    f"{info.name[:60]!r} has {info.size} bytes, more than any molecule"
                )
            return self._tar.content(info).read()
        except (OSError, EOFError, tarfile.TarError) as error:
            raise self._corruption_error(error) from error

    def _members(self) -> Iterator[tarfile.TarInfo]:
        """Yield the members of all molecules from the beginning."""
        try:
            self._rewind()
            while (info := self._tar.next()) is not None:
                if info.isfile() and MEMBER.search(info.name):
                    yield info
        except (OSError, EOFError, tarfile.TarError) as error:
            raise self._corruption_error(error) from error

    def _rewind(self) -> None:
        """Reopen the archive at its beginning."""
        self.close()
        # Use bz2.open: the mode "r|bz2" of tarfile takes a truncated stream for the end of the
        # archive.
        self._file = bz2.open(self.path)
        try:
            self._tar = archives.Members(self._file)
        except BaseException:
            self._file.close()
            raise

    def _corruption_error(self, error) -> DatasetError:
        """Return the error for an archive that cannot be read further."""
        return DatasetError(
            f"{self.path}: cannot read beyond molecule {self._next} ({error}); the archive is "
            "truncated or corrupted. Download it again."
        )
