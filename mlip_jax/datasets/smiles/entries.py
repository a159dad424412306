"""Readers of text files of molecules that may need embedding: SMILES, CSV and SDF."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mlip_jax.config import ConfigError, unknown_name
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.smiles.embedding import Entry
from mlip_jax.datasets.text_files import open_text
from mlip_jax.foreign_text import from_cell

SMILES_COLUMNS, NAME_COLUMNS = (
    ("smiles", "canonical_smiles", "isomeric_smiles"),
    ("name", "id", "title"),
)


class CsvColumns(NamedTuple):
    """Column names of a CSV file, case-insensitive.

    Attributes:
      smiles: Column of SMILES; "" looks for SMILES_COLUMNS.
      name: Column of names; "" looks for NAME_COLUMNS.
    """

    smiles: str = ""
    name: str = ""


def read_entries(path: Path, kind: str, columns: CsvColumns) -> Iterator[Entry]:
    """Yield the molecules of a file in order.

    Args:
      path: Path of the file.
      kind: Kind of the file, a key of KINDS.
      columns: Columns of a CSV file.

    Raises:
      DatasetError: The file is corrupted.
      ConfigError: The file does not have the requested column.
    """
    with open_text(path) as file:
        yield from KINDS[kind](path, file, columns)


def _smi(path: Path, file, columns: CsvColumns) -> Iterator[Entry]:
    """Yield the molecules of a SMILES file."""
    numbers = itertools.count()
    for line, text in enumerate(file, start=1):
        words = text.split(maxsplit=1)
        if (
            not words
            or words[0].startswith("#")
            or line == 1
            and words[0].lower() in SMILES_COLUMNS
        ):
            continue
        smiles, rest = words[0], words[1].strip() if len(words) > 1 else ""
        if rest.startswith("|") and (end := rest.find("|", 1)) > 0:  # extension of CXSMILES
            smiles, rest = f"{smiles} {rest[: end + 1]}", rest[end + 1 :].strip()
        yield Entry(next(numbers), f"{path.name} line {line}", rest, smiles)


def _csv(path: Path, file, columns: CsvColumns) -> Iterator[Entry]:
    """Yield the molecules of a table."""
    rows = table_rows(path, file)
    numbers, line = itertools.count(), 1
    try:
        header = [cell.strip() for cell in next(rows, [])]
        smiles = _column(path, header, columns.smiles, SMILES_COLUMNS, "smiles_column")
        name = _column(path, header, columns.name, NAME_COLUMNS, "name_column", optional=True)
        line = rows.line_num + 1
        for row in rows:
            if any(cell.strip() for cell in row):
                cells = [
                    from_cell(row[i].strip()) if i is not None and i < len(row) else ""
                    for i in (name, smiles)
                ]
                yield Entry(next(numbers), f"{path.name} line {line}", *cells)
            line = rows.line_num + 1
    except csv.Error as error:
        raise DatasetError(f"{path} line {line}: is not CSV ({error})") from error


def table_rows(path: Path, file):
    """Return a `csv.reader`, whose separator is the most frequent one in the header."""
    first = next(file, "")
    # Prefer the usual separator of the file if there is no other one.
    separators = "\t,;" if ".tsv" in path.name.lower() else ",;\t"
    return csv.reader(itertools.chain([first], file), delimiter=max(separators, key=first.count))


def _column(
    path: Path,
    header: list[str],
    name: str,
    usual: tuple[str, ...],
    option: str,
    optional: bool = False,
) -> int | None:
    """Return the index of a column, or None if an optional one is missing."""
    if not header:
        raise DatasetError(f"{path}: is empty; expected a line with the names of the columns")
    lower = [cell.lower() for cell in header]
    for each in (name.lower(),) if name else usual:
        if each in lower:
            return lower.index(each)
    if optional and not name:
        return None
    problem = (
        unknown_name("column", name, header)
        if name
        else f"no column is called {' or '.join(usual)}; found: {', '.join(header)}."
    )
    raise ConfigError(f"{path}: {problem} Set {option}.")


def _sdf(path: Path, file, columns: CsvColumns) -> Iterator[Entry]:
    """Yield the molecules of an SDF file as mol blocks."""
    lines: list[str] = []
    numbers, start = itertools.count(), 1
    for line, text in enumerate(itertools.chain(file, ["$$$$"]), start=1):
        if text.rstrip() != "$$$$":
            lines.append(text)
            continue
        if any(each.strip() for each in lines):
            end = next(
                (i for i, each in enumerate(lines) if each.startswith("M  END")), len(lines) - 1
            )
            yield Entry(
                next(numbers),
                f"{path.name} line {start}",
                lines[0].strip(),
                "",
                "".join(lines[: end + 1]),
            )
        lines, start = [], line + 1


KINDS = {"smi": _smi, "csv": _csv, "sdf": _sdf}
