"""Merging of the parts of a relaxation's journal, in the order of the molecules."""

from __future__ import annotations

import array
import contextlib
import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlip_jax.files import open_in_place
from mlip_jax.simulation.relaxation.journal import (
    JournalError,
    Layout,
    encode_line,
    parts_of,
    piece_file,
    read_part,
)
from mlip_jax.workdir import atomic_open

# _BLOCK: molecules whose derived columns are computed at a time. Compiled shapes depend on it.
_BLOCK = 16_384


class DerivedColumns(NamedTuple):
    """Columns that are computed from the pieces in a journal.

    Attributes:
      columns: Names of the columns.
      kind: Kind of the pieces from which the columns are computed.
      cells: Function that maps pieces, b"" for a molecule without one, to the values of the columns
        per molecule.
    """

    columns: tuple[str, ...]
    kind: str
    cells: Callable[[Sequence[bytes]], Iterable[Sequence[Any]]]


def merge(
    folder: Path,
    layout: Layout,
    results: Path,
    pieces: Mapping[str, Path],
    stop: int | None = None,
    added: DerivedColumns | None = None,
) -> float:
    """Write the results of all parts in the order of their indices; replace each file atomically.

    Args:
      folder: Folder of the parts.
      layout: Layout of the journal.
      results: CSV file to write, with layout.columns.
      pieces: File to write for each requested kind of pieces.
      stop: Skip molecules with this index or a larger one; None skips none.
      added: Further columns of the CSV file.

    Returns:
      Largest time among the parts (seconds).

    Raises:
      JournalError: If a file cannot be read or written.
    """
    paths = [path for _, path in parts_of(folder)]
    locations, seconds = _in_order(paths, layout, stop)
    targets = {"csv": results, **pieces}
    try:
        with contextlib.ExitStack() as stack:
            sources = {
                kind: [
                    stack.enter_context(
                        open_in_place(path if kind == "csv" else piece_file(path, kind), "rb")
                    )
                    for path in paths
                ]
                for kind in [*targets, *([added.kind] if added else [])]
            }
            outputs = {
                kind: stack.enter_context(atomic_open(path, buffering=2**20))
                for kind, path in targets.items()
            }
            outputs["csv"].write(encode_line((*layout.columns, *(added.columns if added else ()))))
            for start in range(0, len(locations), _BLOCK):
                _write_block(locations[start : start + _BLOCK], layout, sources, outputs, added)
    except OSError as error:
        raise JournalError(
            f"{results.parent}: results of {folder} cannot be merged: {error}. They still "
            "exist. Fix the cause and rerun the same command."
        ) from error
    return seconds


def _write_block(
    locations: np.ndarray, layout: Layout, sources, outputs, added: DerivedColumns | None
) -> None:
    """Write the lines of some molecules and their pieces."""
    lines = []
    for part, start, length in locations.tolist():
        (cells,) = csv.reader([os.pread(sources["csv"][part].fileno(), length, start).decode()])
        lines.append((part, cells))

    def piece(kind, part, cells):
        column = layout.header.index(f"{kind}_offset")
        offset, size = map(int, cells[column : column + 2])
        return os.pread(sources[kind][part].fileno(), size, offset)

    more = added.cells([piece(added.kind, *line) for line in lines]) if added else [()] * len(lines)
    for (part, cells), further in zip(lines, more, strict=True):
        outputs["csv"].write(encode_line([*cells[: len(layout.columns)], *further]))
        for kind in outputs.keys() - {"csv"}:
            outputs[kind].write(piece(kind, part, cells))


def _in_order(paths: list[Path], layout: Layout, stop: int | None) -> tuple[np.ndarray, float]:
    """Return the locations of the lines by index, and the largest time among the parts (seconds).

    The locations (part, start, length) are (M, 3) int64. An index that occurs twice is returned
    once.
    """
    numbers, seconds = array.array("q"), [0.0]
    column = layout.header.index("seconds")
    for part, path in enumerate(paths):
        seconds.append(0.0)
        for line in read_part(path, layout):
            seconds[-1] += float(line.cells[column])
            numbers.extend((line.index, part, line.start, line.stop - line.start))
    table = np.array(numbers, np.int64).reshape(-1, 4)
    _, first = np.unique(table[:, 0], return_index=True)
    table = table[first]
    return table[table[:, 0] < stop if stop is not None else slice(None), 1:], max(seconds)


def read_pieces(
    folder: Path, layout: Layout, kind: str, indices: Sequence[int]
) -> dict[int, bytes]:
    """Read the pieces of one kind for some molecules; molecules without one are missing."""
    missing, pieces = set(indices), {}
    kind_index = layout.kinds.index(kind)
    for _, path in parts_of(folder):
        for line in read_part(path, layout):
            offset, length = line.pieces[kind_index]
            if length and line.index in missing and line.index not in pieces:
                with open_in_place(piece_file(path, kind), "rb") as file:
                    pieces[line.index] = os.pread(file.fileno(), length, offset)
    return pieces
