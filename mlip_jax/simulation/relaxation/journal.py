"""Journal of relaxations on disk: results are appended and survive a crash at any byte.

Each process of a run writes files of its own into one folder:

    part-0.csv             one line per molecule: the columns of the result, seconds, and offset and
                           length of its pieces
    part-0.xyz, part-0.sdf the pieces (frames and mol blocks), one after another

Pieces are written before their line. A line is valid if its last byte is the line break and its
pieces follow those of the line before. On opening, everything after the last valid line is
truncated. merge.py merges the parts.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlip_jax.files import make_subfolder, open_descriptor, open_in_place
from mlip_jax.foreign_text import one_line, to_cell
from mlip_jax.wording import count_of

FLUSH_SECONDS = 1.0
FAILURES = ("failed", "diverged")  # statuses of molecules without a usable result
_SPARSE = 64  # bytes per entry up to which `Indices` is an array
MAX_WAITING_BYTES = 16 * 2**20  # maximum number of bytes of results that wait to be written


class JournalError(RuntimeError):
    """Results cannot be written or read. Earlier results are still recorded."""


class Layout(NamedTuple):
    """Layout of a journal.

    Attributes:
      columns: Columns of a result; the first one is "index".
      kinds: Kinds of the pieces.
    """

    columns: tuple[str, ...]
    kinds: tuple[str, ...]

    @property
    def header(self) -> tuple[str, ...]:
        """Return the columns of a part's CSV file."""
        return (
            *self.columns,
            "seconds",
            *(f"{kind}_{field}" for kind in self.kinds for field in ("offset", "length")),
        )


class JournalLine(NamedTuple):
    """Valid line of a part.

    Attributes:
      start: First byte in the file.
      stop: Byte after the last one.
      cells: Cells of the line.
      pieces: (offset, length) of the piece of each kind.
    """

    start: int
    stop: int
    cells: list[str]
    pieces: list[tuple[int, int]]

    @property
    def index(self) -> int:
        """Return the index of the molecule."""
        return int(self.cells[0])


class Indices:
    """Set of non-negative integers that uses one byte per integer up to the largest.

    Integers far beyond the number of entries, as in a file of other people, take more.
    """

    def __init__(self) -> None:
        self._there, self._far, self._count = bytearray(), set(), 0

    def add(self, index: int) -> None:
        """Add an integer."""
        if index in self:
            return
        self._count += 1
        if index >= _SPARSE * (self._count + 2**14):
            self._far.add(index)
            return
        if index >= len(self._there):
            self._there.extend(
                bytes(max(index + 1 - len(self._there), len(self._there) // 4, 1024))
            )
        self._there[index] = 1

    def __contains__(self, index: int) -> bool:
        near = 0 <= index < len(self._there) and bool(self._there[index])
        return near or index in self._far

    def __len__(self) -> int:
        return self._count


def finished(folder: Path, layout: Layout) -> Indices:
    """Return the indices of all molecules with a result in any part.

    The parts are only read, so other processes may write at the same time.

    Raises:
      JournalError: If a part has other columns or cannot be read.
    """
    indices = Indices()
    for _, path in parts_of(folder):
        for line in read_part(path, layout):
            indices.add(line.index)
    return indices


def count_failures(
    folder: Path, layout: Layout, share: Callable[[int], bool] = lambda index: True
) -> int:
    """Return the number of molecules whose status is "failed" or "diverged".

    Args:
      folder: Folder of the parts.
      layout: Layout of the journal, with a column "status".
      share: Whether to count a molecule, by its index.
    """
    column = layout.columns.index("status")
    failed = Indices()
    for _, path in parts_of(folder):
        for line in read_part(path, layout):
            if line.cells[column] in FAILURES and share(line.index):
                failed.add(line.index)
    return len(failed)


def check_any_succeeded(folder: Path, layout: Layout, total: int, table: Path) -> None:
    """Raise RuntimeError if all `total` molecules failed; `table` lists the reasons."""
    if count_failures(folder, layout) >= total:
        raise RuntimeError(f"all {total} molecules failed or diverged: see the reasons in {table}")


def read_part(path: Path, layout: Layout) -> Iterator[JournalLine]:
    """Yield the valid lines of a part, up to the first invalid one.

    Raises:
      JournalError: If the part has another layout or cannot be read.
    """
    try:
        sizes = [_size(piece_file(path, kind)) for kind in layout.kinds]
        with open_in_place(path, "rb") as file:
            header = file.readline()
            expected = encode_line(layout.header)
            # a process stopped while writing the header
            if header != expected and expected.startswith(header.rstrip(b"\n")):
                return
            if header != expected:
                raise JournalError(
                    f"{path}: columns are {header[:200]!r}, expected "
                    f"{','.join(layout.header)}; the file was written by another version. Give "
                    "another --workdir."
                )
            start, ends = len(header), [0] * len(layout.kinds)
            for text in file:
                line = _parse(text, start, len(layout.header), ends, sizes)
                if line is None:
                    return
                yield line
                start, ends = line.stop, [offset + length for offset, length in line.pieces]
    except OSError as error:
        raise JournalError(f"{path}: cannot be read: {error}") from error


def _parse(
    text: bytes, start: int, width: int, ends: list[int], sizes: list[int]
) -> JournalLine | None:
    """Return a line with all cells whose pieces start at `ends` and are complete, or None."""
    if not text.endswith(b"\n"):
        return None
    try:
        (cells,) = csv.reader([text.decode()], strict=True)
        numbers = [int(cell) for cell in cells[width - 2 * len(ends) :]]
        if len(cells) != width or not 0 <= int(cells[0]) < 2**63:
            return None
    except (ValueError, csv.Error):  # UnicodeDecodeError is a ValueError
        return None
    pieces = list(zip(numbers[::2], numbers[1::2]))
    sound = all(
        offset == end and length >= 0 and end + length <= size
        for (offset, length), end, size in zip(pieces, ends, sizes)
    )
    return JournalLine(start, start + len(text), cells, pieces) if sound else None


def encode_line(cells: Sequence[Any]) -> bytes:
    """Return a line of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def parts_of(folder: Path) -> list[tuple[int, Path]]:
    """Return the number and the CSV file of each part, sorted by number."""
    candidates = ((p.stem.removeprefix("part-"), p) for p in Path(folder).glob("part-*.csv"))
    return sorted((int(number), path) for number, path in candidates if number.isdecimal())


def piece_file(path: Path, kind: str) -> Path:
    """Return the file that contains the pieces of a part."""
    return path.with_suffix(f".{kind}")


def _size(path: Path) -> int:
    """Return the size of a file in bytes, 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


class Journal:
    """The part of one process, open for appending; a context manager. Threads may share it.

    A background thread writes and syncs the results every FLUSH_SECONDS.

    Attributes:
      path: CSV file of the part.
      layout: Layout of the journal.
      count: Number of results in the part.
    """

    def __init__(self, folder: str | Path, part: int, layout: Layout):
        """Open a part, and continue after its last valid result.

        Args:
          folder: Folder of the parts.
          part: Number of the part.
          layout: Layout of the journal.

        Raises:
          JournalError: If the part has another layout, is in use by another process, or cannot be
            written.
        """
        self.path, self.layout = Path(folder) / f"part-{part}.csv", layout
        self._lock = threading.Lock()
        self._waiting: list[tuple[list[Any], list[bytes]]] = []
        self._waiting_bytes = 0
        self._error: JournalError | None = None
        self._closed = threading.Event()
        self._last = time.monotonic()
        self._files: list[int] = []
        try:
            self._open()
        except BaseException:
            self._close_files()
            raise
        self._thread = threading.Thread(
            target=self._flush_now_and_then, name="journal", daemon=True
        )
        self._thread.start()

    def _open(self) -> None:
        """Open and lock the files, and truncate them after the last valid line."""
        try:
            make_subfolder(self.path.parent)
            for path in (self.path, *(piece_file(self.path, kind) for kind in self.layout.kinds)):
                self._files.append(open_descriptor(path, os.O_RDWR | os.O_CREAT))
            fcntl.flock(self._files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            header = encode_line(self.layout.header)
            self._ends, self.count = [0] * len(self._files), 0
            for line in read_part(self.path, self.layout):
                self._ends = [line.stop, *(offset + length for offset, length in line.pieces)]
                self.count += 1
            if not self.count:
                _write(self._files[0], header, 0)
                self._ends[0] = len(header)
            for file, end in zip(self._files, self._ends):
                os.ftruncate(file, end)
        except BlockingIOError as error:
            raise JournalError(
                f"{self.path}: in use by another process. Wait for it to end."
            ) from error
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be written: {error}") from error

    def add(self, cells: Sequence[Any], pieces: Mapping[str, bytes] = {}) -> None:
        """Record a result.

        Args:
          cells: Values of layout.columns.
          pieces: Pieces by kind.

        Raises:
          JournalError: If this or an earlier result cannot be written. The results before it are
            recorded.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            now = time.monotonic()
            content = [pieces.get(kind, b"") for kind in self.layout.kinds]
            self._waiting.append(([*map(encode_cell, cells), f"{now - self._last:.3f}"], content))
            self._waiting_bytes += sum(map(len, content))
            self._last = now
            self.count += 1
            if self._waiting_bytes > MAX_WAITING_BYTES:
                self._flush()

    def start_clock(self) -> None:
        """Restart the clock that measures the time of the next result."""
        self._last = time.monotonic()

    def close(self) -> None:
        """Write the waiting results and close the files.

        Raises:
          JournalError: If they cannot be written.
        """
        self._closed.set()
        with self._lock:
            try:
                if self._files:
                    self._flush()
            finally:
                self._close_files()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind, error, trace) -> None:
        # the first error says more than a second one would
        with contextlib.suppress(JournalError) if error is not None else contextlib.nullcontext():
            self.close()

    def _flush_now_and_then(self) -> None:
        """Write the waiting results every FLUSH_SECONDS until the journal is closed."""
        while not self._closed.wait(FLUSH_SECONDS):
            with self._lock, contextlib.suppress(JournalError):  # `add` raises it
                if self._files:
                    self._flush()

    def _flush(self) -> None:
        """Write the waiting results. After an exception at any point it may be called again."""
        if not self._waiting:
            return
        ends, lines, blocks = list(self._ends), [], [[] for _ in self.layout.kinds]
        for cells, content in self._waiting:
            for kind, piece in enumerate(content):
                cells = [*cells, ends[kind + 1], len(piece)]
                ends[kind + 1] += len(piece)
                blocks[kind].append(piece)
            lines.append(encode_line(cells))
        try:
            for file, block, end in zip(self._files[1:], blocks, self._ends[1:]):
                if _write(file, b"".join(block), end):
                    os.fsync(file)  # the piece must be on disk before its line
            ends[0] += _write(self._files[0], b"".join(lines), self._ends[0])
            os.fsync(self._files[0])
        except OSError as error:
            self._error = JournalError(
                f"{self.path}: results cannot be written: {error}. "
                f"Recorded: {count_of(self.count - len(self._waiting), 'molecule')}. "
                "Fix the cause and rerun the same command to resume."
            )
            raise self._error from error
        self._ends, self._waiting, self._waiting_bytes, self._error = ends, [], 0, None

    def _close_files(self) -> None:
        """Close all files, which releases the lock."""
        while self._files:
            os.close(self._files.pop())


def _write(file: int, data: bytes, offset: int) -> int:
    """Write all of `data` at `offset` and return the number of bytes."""
    view = memoryview(data)
    while len(view):
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
    return len(data)


def encode_cell(value: Any) -> str:
    """Return a value as text on one line: numbers with all digits, empty if unknown."""
    if value is None or isinstance(value, float) and value != value:
        return ""
    if isinstance(value, float | np.floating):
        return repr(float(value))
    return to_cell(one_line(str(value).encode("utf-8", "replace").decode()))
