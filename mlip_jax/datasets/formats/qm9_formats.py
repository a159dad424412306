"""File layouts of QM9: archive, folder, extended xyz and ASE database, described in readers/qm9.py.

Each layout yields (record, index or None, source, parser) per record. The parser is a function that
returns the fields of a Structure.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from ase import units

from mlip_jax import limits
from mlip_jax.datasets import options
from mlip_jax.datasets.formats import ase_database
from mlip_jax.datasets.formats.qm9_archive import MEMBER, Archive
from mlip_jax.datasets.formats.qm9_records import (
    BINDING,
    ENERGY_UNITS,
    FIELDS,
    LENGTH_UNITS,
    UNITS_OF,
    binding_energy,
    comment_fields,
    parse_integer,
    parse_member,
    parse_number,
    parse_table,
    split_columns,
    structure_fields,
    unit_factor,
)
from mlip_jax.datasets.reader import DatasetError, symbols_to_numbers

SIZE = 133_885

_LONGEST = 1 << 20  # bytes of a line; the file is not QM9 if one is longer


def format_of(path: Path) -> str | None:
    """Return "archive", "folder", "xyz" or "database", or None if the path is not QM9."""
    if path.is_dir():
        return "folder" if any(MEMBER.search(f.name) for f in path.iterdir()) else None
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith(b"BZh"):
        with Archive(path) as archive:
            return "archive" if archive.first_member() else None
    if ase_database.is_ase_database(path):
        try:
            with ase_database.AseDatabase(path) as database:
                row = next(database.rows(range(min(1, len(database)))), None)
        except DatasetError:
            return None
        return "database" if row is not None and "energy_U0" in row.data else None
    lines = head.decode("utf-8", "replace").split("\n")
    if len(lines) < 2 or not lines[0].strip().isdecimal():
        return None
    return "xyz" if {"U0", "zpve", "Cv", "alpha"} <= set(comment_fields(lines[1])) else None


def open_format(path: Path, db_units: str):
    """Open QM9 in any of its layouts.

    Raises:
      DatasetError: The file cannot be read, or has another layout.
    """
    try:
        layout = format_of(path)
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise DatasetError(
            f"{path}: cannot be read ({error}); the file is truncated or corrupted. Download it "
            "again."
        ) from error
    if layout is None:
        raise DatasetError(
            f"{path}: has none of QM9's formats: dsgdb9nsd.xyz.tar.bz2, a folder of "
            "dsgdb9nsd_*.xyz, extended xyz with U0, zpve, Cv and alpha, or an ASE database with "
            "energy_U0"
        )
    if layout == "database":
        return _Database(path, db_units)
    return {"archive": Archive, "folder": _UnpackedFolder, "xyz": _ExtendedXyz}[layout](path)


class _UnpackedFolder:
    """Folder with the unpacked members of the archive."""

    has_indices = True

    def __init__(self, path: Path):
        self.path = path
        self._files = sorted(f for f in path.iterdir() if MEMBER.search(f.name))

    def __len__(self) -> int:
        return len(self._files)

    def files(self) -> list[Path]:
        return list(self._files)

    def close(self) -> None:
        pass

    def read(self, records: range):
        for record in records:
            file = self._files[record]
            index, source = int(MEMBER.search(file.name)[1]), f"{self.path.name}:{file.name}"
            yield (
                record,
                index,
                source,
                lambda f=file, i=index, s=source: parse_member(f.read_bytes(), i, s),
            )


class _ExtendedXyz:
    """Single file of molecules. Opening it builds an index of them."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("rb")
        self._starts = []
        try:
            while line := self._file.readline(_LONGEST):
                if not line.strip():
                    continue
                if not line.strip().isdigit():
                    raise DatasetError(
                        f"{path}:{len(self._starts)}: expected a number of atoms, found "
                        f"{line[:60]!r}. The file is corrupted or not an xyz file."
                    )
                self._starts.append(self._file.tell() - len(line))
                limits.check("structure_atoms", int(line[:20]), path, DatasetError)
                for _ in range(int(line) + 1):
                    if not self._file.readline(_LONGEST):
                        raise DatasetError(
                            f"{path}:{len(self._starts) - 1}: the file is truncated within the "
                            "molecule. Download it again or recreate it."
                        )
        except DatasetError:
            self.close()
            raise
        # Only the complete data set in its original order identifies the molecules by position.
        self.has_indices = len(self._starts) == SIZE

    def __len__(self) -> int:
        return len(self._starts)

    def files(self) -> list[Path]:
        return [self.path]

    def close(self) -> None:
        self._file.close()

    def read(self, records: range):
        for record in records:
            source = f"{self.path.name}:{record}"
            index = record + 1 if self.has_indices else None
            yield record, index, source, lambda r=record, s=source: self._molecule(r, s)

    def _molecule(self, record: int, source: str) -> dict[str, Any]:
        """Parse a molecule into the fields of a Structure."""
        self._file.seek(self._starts[record])
        n = int(self._file.readline(_LONGEST))
        lines = [self._file.readline(_LONGEST).decode("utf-8", "replace") for _ in range(n + 1)]
        comment = comment_fields(lines[0])
        # Properties lists name, type and width of each group of columns.
        columns = comment.get("Properties", "species:S:1:pos:R:3").split(":")
        column_of, width_so_far = {}, 0
        for name, width in zip(columns[::3], columns[2::3]):
            column_of[name] = width_so_far
            width_so_far += parse_integer(width, source)
        if not {"species", "pos"} <= set(column_of):
            raise DatasetError(
                f"{source}: Properties={comment['Properties']} lacks species and pos"
            )
        rows = [split_columns(line, width_so_far, source) for line in lines[1:]]
        raw = {
            name: parse_number(comment[key], source)
            for name, (_, key, *_) in FIELDS.items()
            if key in comment
        }
        return structure_fields(
            numbers=symbols_to_numbers((row[column_of["species"]] for row in rows), source),
            positions=parse_table(
                [row[column_of["pos"] : column_of["pos"] + 3] for row in rows], source
            ),
            raw=raw,
            factors={name: f[3] for name, f in FIELDS.items()},
            source=source,
            unread={*comment, *column_of}
            - {key for _, key, *_ in FIELDS.values()}
            - {"Properties", "pbc", "species", "pos"},
        )


class _Database:
    """ASE database as written by SchNetPack."""

    def __init__(self, path: Path, db_units: str):
        self.path = path
        self._database = ase_database.AseDatabase(path)
        try:
            self.has_indices = len(self._database) == SIZE
            length = self._database.metadata.get("_distance_unit", "Ang")
            self._length_unit = unit_factor("_distance_unit", length, LENGTH_UNITS, path)
            self._factors = self._find_factors(db_units)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._database)

    def files(self) -> list[Path]:
        return [self.path]

    def close(self) -> None:
        self._database.close()

    def read(self, records: range):
        for record, row in zip(records, self._database.rows(records)):
            source = f"{self.path.name}:{row.id}"
            yield (
                record,
                record + 1 if self.has_indices else None,
                source,
                lambda r=row, s=source: self._row(r, s),
            )

    def _row(self, row, source: str) -> dict[str, Any]:
        """Convert a row to the fields of a Structure."""
        if "energy_U0" not in row.data:
            raise DatasetError(
                f"{source}: expected energy_U0 in the data of the row, found {sorted(row.data)}"
            )
        raw = {}
        for name, (_, _, key, *_) in FIELDS.items():
            if key in row.data:
                value = np.asarray(row.data[key], np.float64)
                if value.size != 1:
                    raise DatasetError(
                        f"{source}: {key} has shape {value.shape}, expected one number"
                    )
                raw[name] = float(value.reshape(-1)[0])
        smiles = row.key_value_pairs.get("smiles", row.data.get("smiles", ""))
        return structure_fields(
            numbers=row.numbers,
            positions=row.positions * self._length_unit,
            raw=raw,
            factors=self._factors,
            source=source,
            smiles=smiles if isinstance(smiles, str) else "",
            unread={*row.data, *row.key_value_pairs, *row.results}
            - {key for _, _, key, *_ in FIELDS.values()}
            - {"smiles"},
        )

    def _find_factors(self, db_units: str) -> dict[str, float]:
        """Return the conversion factor of each property, None if its unit is not stated."""
        stated = self._database.metadata.get("_property_unit_dict") or {}
        stated = {name: stated[f[2]] for name, f in FIELDS.items() if f[2] in stated}
        if "energy" in stated:
            if db_units != "auto":
                raise DatasetError(
                    f"{self.path}: states its units ({stated['energy']!r} for energy_U0); remove "
                    f"db_units={db_units!r}"
                )
            factors = {
                name: unit_factor(
                    FIELDS[name][2], unit, UNITS_OF.get(name, ENERGY_UNITS), self.path
                )
                for name, unit in stated.items()
            }
            return {name: factors.get(name) for name in FIELDS}
        if db_units == "auto":
            db_units = self._infer_units()
        return {name: f[3] if db_units == "hartree" else f[4] for name, f in FIELDS.items()}

    def _infer_units(self) -> str:
        """Infer "eV" or "hartree" from the energies of the first rows."""
        for row in self._database.rows(range(min(len(self._database), 20))):
            energy = float(np.asarray(row.data.get("energy_U0", np.nan), np.float64).reshape(-1)[0])
            if not np.isfinite(energy):
                continue
            matching = [
                name
                for name, unit in (("eV", 1.0), ("hartree", units.Hartree))
                if BINDING[0] < binding_energy(energy * unit, row.numbers) < BINDING[1]
            ]
            if not matching:
                raise DatasetError(
                    f"{self.path}: states no units, and energy_U0 of row {row.id}, {energy:.6g}, "
                    "is not a total energy of this molecule in eV or hartree. Use total energies, "
                    "without subtracting atomic energies."
                )
            return matching[0]
        raise DatasetError(
            f"{self.path}: states no units, and its first rows have no energy_U0 to infer them "
            f"from. Set {options.as_flag('db_units', 'eV')} (or hartree)."
        )
