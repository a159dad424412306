"""Safe output of text from files of other people in tables, logs and text files.

Names of molecules, SMILES and messages with them can contain line breaks, which begin new records
in text files; escape sequences, which control a terminal; and formulas, which spreadsheets run.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

# Cells that spreadsheets read as formulas. Those that begin with apostrophes are changed as well,
# so that `from_cell` restores every text.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
LONGEST_CELL = 32_000  # characters


def one_line(text: str) -> str:
    """Return the text on one line, with single spaces and without unprintable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def one_line_values(labels: Mapping[str, Any]) -> dict[str, Any]:
    r"""Return labels whose texts are on one line, because ASE writes line breaks into the header.

    >>> one_line_values({"smiles": "C\n2\n", "charge": 0.0})
    {'smiles': 'C 2', 'charge': 0.0}
    """
    return {k: one_line(v) if isinstance(v, str) else v for k, v in labels.items()}


def printable(text: str) -> str:
    r"""Return the text with escape codes for unprintable characters, except line breaks and tabs.

    >>> printable("red: \x1b[31m")
    'red: \\x1b[31m'
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def to_cell(value: Any) -> Any:
    """Return a value for a CSV file that spreadsheets do not run: "=C" becomes "'=C".

    Numbers are unchanged, also as text. Texts are cut to the length that spreadsheets accept, which
    is also below that of Python's reader of CSV files.
    """
    if isinstance(value, str) and len(value) > LONGEST_CELL:
        value = f"{value[: LONGEST_CELL - 1]}…"
    if not isinstance(value, str) or not _FORMULA.match(value) or _is_number(value):
        return value
    return f"'{value}"


def from_cell(text: str) -> str:
    """Return the text that `to_cell` changed.

    >>> [from_cell(to_cell(text)) for text in ("=C", "'=C", "-1.5", "'t Hooft")]
    ['=C', "'=C", '-1.5', "'t Hooft"]
    """
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


class TableWriter:
    """Writer of CSV files like `csv.writer`, whose cells spreadsheets do not run."""

    def __init__(self, file: IO[str], **options: Any):
        self._writer = csv.writer(file, **options)

    def writerow(self, row: Iterable[Any]) -> None:
        """Write one row."""
        self._writer.writerow([to_cell(value) for value in row])

    def writerows(self, rows: Iterable[Iterable[Any]]) -> None:
        """Write several rows."""
        for row in rows:
            self.writerow(row)


def table_text(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return the text of a CSV file of `TableWriter`; cells with NaN are empty."""
    text = io.StringIO()
    table = TableWriter(text, lineterminator="\n")
    table.writerow(header)
    table.writerows(["" if cell != cell else cell for cell in row] for row in rows)
    return text.getvalue()


def table_rows(file: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV file of `TableWriter` by column, missing cells as "".

    Raises:
      ValueError: The file is not such a table.
    """
    try:
        for row in csv.DictReader(file, restval=""):
            yield {name: from_cell(cell) for name, cell in row.items() if isinstance(cell, str)}
    except csv.Error as error:
        raise ValueError(f"not a table in CSV: {error}") from error


def _is_number(text: str) -> bool:
    """Return whether `float` accepts the text, without spaces and underscores."""
    try:
        float(text)
    except ValueError:
        return False
    return text == text.strip() and "_" not in text
