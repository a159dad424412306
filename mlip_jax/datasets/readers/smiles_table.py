"""Reader of tables of SMILES and properties: .csv and .tsv files with a header.

    smiles,name,gap,dipole
    CCO,ethanol,7.6,1.7

A record is a row. Its geometry is embedded by RDKit (ETKDGv3), as SMILES are elsewhere. Columns of
numbers are properties with the name of the column, in the unit of the table. An empty cell is an
unknown value. Rows whose SMILES cannot be read or embedded are skipped. The file may be compressed
(.gz, .bz2, .xz).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlip_jax.config import ConfigError, unknown_name
from mlip_jax.datasets import options, reader
from mlip_jax.datasets.identity import molecule_identity
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.smiles import embedding
from mlip_jax.datasets.smiles.entries import (
    NAME_COLUMNS,
    SMILES_COLUMNS,
    CsvColumns,
    read_entries,
    table_rows,
)
from mlip_jax.datasets.text_files import open_text, suffix_of
from mlip_jax.structure import Structure


class Reader(reader.Reader):
    """Reader of tables of SMILES and properties.

    Args:
      path: Path of the file.
      smiles_key: Name of the column of SMILES; "" looks for smiles, canonical_smiles and
        isomeric_smiles, in any case.
      property_keys: Names of the columns that are properties; () takes all columns of numbers.
      mmff: Whether to relax the embedded geometries with MMFF94.
      embed: Whether to embed the molecules. If not, positions are meaningless, which is sufficient
        for models that only read bonds.
      seed: Seed of the embedding.
      level_of_theory: Description of the level of theory of the properties.
    """

    UNITS = {"positions": "Å, embedded", "properties": "those of the table"}
    UNREAD_REMEDY = (
        "A column is read if all of its cells are numbers or empty, and if property_keys in "
        "config.data.reader_options is empty or contains its name."
    )
    GENERAL = True

    def __init__(
        self,
        path: str | Path,
        *,
        smiles_key: str = "",
        property_keys: tuple[str, ...] = (),
        mmff: bool = False,
        embed: bool = True,
        seed: int = 0,
        level_of_theory: str = "",
    ):
        super().__init__(path)
        self.level_of_theory = (
            options.text("level_of_theory", level_of_theory) or self.LEVEL_OF_THEORY
        )
        columns = CsvColumns(options.text("smiles_key", smiles_key))
        self._options = embedding.EmbeddingOptions(
            mmff=options.flag("mmff", mmff), seed=seed, embed=options.flag("embed", embed)
        )
        try:
            self._entries = list(read_entries(self.path, "csv", columns))
        except ConfigError as error:  # no column of SMILES: another format, or another name
            message = str(error).replace(
                "smiles_column", "smiles_key in config.data.reader_options"
            )
            raise DatasetError(message) from error
        if not self._entries:
            raise DatasetError(f"{self.path}: the file contains no molecules")
        self._properties = self._read_properties(
            options.texts("property_keys", property_keys), columns.smiles
        )

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether a file is a table with a column of SMILES."""
        if suffix_of(path) not in (".csv", ".tsv") or not path.is_file():
            return False
        try:
            header = next(_rows(path), [])
        except (csv.Error, DatasetError):
            return False
        return any(cell.strip().lower() in SMILES_COLUMNS for cell in header)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, records: range, report: ReadReport) -> Iterator[Structure]:
        """Yield the embedded molecules of the records."""
        for record in records:
            report.records += 1
            entry = self._entries[record]
            (molecule,) = embedding.embed_entry((entry, self._options))
            if molecule.atoms is None:
                report.skip("SMILES cannot be embedded", entry.where)
                continue
            report.structures += 1
            report.add_unread(name for name, known in self._unread.items() if known[record])
            yield Structure(
                numbers=molecule.atoms.numbers,
                positions=molecule.atoms.positions,
                energy=float("nan"),
                charge=float(molecule.atoms.info["charge"]),
                spin=float(molecule.atoms.info.get("num_unpaired_electrons", 0)),
                molecule=molecule_identity(entry.smiles),
                smiles=molecule.smiles,
                record=record,
                source=entry.where,
                properties={
                    name: float(values[record]) for name, values in self._properties.items()
                },
            )

    def _read_properties(self, keys: tuple[str, ...], smiles: str) -> dict[str, np.ndarray]:
        """Return the values of all records by the name of their column; NaN if unknown."""
        rows = _rows(self.path)
        header = [cell.strip() for cell in next(rows)]
        table = [row for row in rows if any(cell.strip() for cell in row)]
        columns = {
            name: _numbers([row[i] if i < len(row) else "" for row in table])
            for i, name in enumerate(header)
        }
        for key in keys:
            if key not in columns:
                raise ConfigError(f"{self.path}: {unknown_name('column', key, header)}")
            if columns[key] is None:
                raise DatasetError(f"{self.path}: the column {key!r} contains no numbers")
        identifiers = (smiles.lower(), *SMILES_COLUMNS, *NAME_COLUMNS)
        names = keys or [name for name in header if name.lower() not in identifiers]
        read = {name: columns[name] for name in names if columns[name] is not None}
        # columns with some numbers that are not properties: which records have a number
        self._unread = {}
        for i, name in enumerate(header):
            known = [_is_number(row[i]) if i < len(row) else False for row in table]
            if any(known) and name not in read and name.lower() not in identifiers:
                self._unread[name] = known
                if 2 * sum(known) > len(known):  # a column of numbers with a few texts
                    self._explain_unread(name, [row[i] if i < len(row) else "" for row in table])
        return read

    def _explain_unread(self, name: str, cells: list[str]) -> None:
        """Add the first cell of a column that is not a number to the remedy."""
        for cell, entry in zip(cells, self._entries):
            if cell.strip() and not _is_number(cell):
                self.UNREAD_REMEDY += f" In {entry.where}, {name} is {cell.strip()!r}."
                return


def _rows(path: Path) -> Iterator[list[str]]:
    """Yield the rows of a table, with the header."""
    with open_text(path) as file:
        yield from table_rows(path, file)


def _is_number(cell: str) -> bool:
    try:
        return bool(np.isfinite(float(cell)))
    except ValueError:
        return False


def _numbers(cells: list[str]) -> np.ndarray | None:
    """Return cells as numbers, NaN if empty, or None if one is a text or none has a number."""
    try:
        values = np.array([float(cell) if cell.strip() else np.nan for cell in cells])
    except ValueError:
        return None
    return values if np.isfinite(values).any() else None
