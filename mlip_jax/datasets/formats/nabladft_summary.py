"""Table summary.csv of ∇²DFT: orbital energies and dipoles, described in readers/nabladft.py."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
from ase import units

from mlip_jax.datasets.formats.ase_database import AseRow
from mlip_jax.datasets.reader import DatasetError

_SUMMARY = {
    "homo": ("DFT HOMO", units.Hartree),
    "lumo": ("DFT LUMO", units.Hartree),
    "gap": ("DFT HOMO-LUMO GAP", units.Hartree),
    "dipole_moment": ("DFT TOTAL DIPOLE", units.Debye),
}
_TOTAL = "DFT TOTAL ENERGY"
_SAME_ENERGY = 1e-3  # hartree; allows for rounding in the summary, but not for another conformation


class SummaryTable:
    """Table of all conformations in the release (gigabytes).

    Only the keys and offsets of its lines are kept in memory.

    Attributes:
      path: Path of the table.
      unread: Names of the columns that are not read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("rb")
        try:
            self._columns = self._header()
            keys, offsets = self._index()
        except BaseException:
            self._file.close()
            raise
        # Sorted keys allow for a binary search per row.
        order = np.argsort(keys, kind="stable")
        self._keys, self._offsets = keys[order], offsets[order]
        twice = np.flatnonzero(self._keys[1:] == self._keys[:-1])
        if len(twice):
            key = int(self._keys[twice[0]])
            self._file.close()
            raise DatasetError(
                f"{path}: MOSES id {key >> 32}, CONFORMER id {key & 0xFFFFFFFF} occurs twice"
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def labels(self, row: AseRow, energy: float, source: str) -> dict[str, float]:
        """Return orbital energies (eV) and dipole (e·Å) of a row, NaN if the table lacks it.

        `energy` is the total energy of the row (hartree), which must agree with that of the table.
        """
        moses, conformation = (int(row.key_value_pairs[k]) for k in ("moses_id", "conformation_id"))
        at = np.searchsorted(self._keys, _key(moses, conformation))
        # Each step of an optimization has other orbitals. The table contains only those of the
        # first or last conformation.
        if (
            at == len(self._keys)
            or self._keys[at] != _key(moses, conformation)
            or "iteration" in row.key_value_pairs
        ):
            return dict.fromkeys(_SUMMARY, math.nan)
        self._file.seek(int(self._offsets[at]))
        values = _cells(self._file.readline())
        total = self._number(values, _TOTAL, source)
        # Equal keys with other energies mean that the table is from another release.
        if abs(total - energy) > _SAME_ENERGY:
            raise DatasetError(
                f"{source}: the total energy is {energy:.6f} hartree, but {self.path.name} has "
                f"{total:.6f} for MOSES id {moses}, CONFORMER id {conformation}. The table belongs "
                "to another release; give the matching table, or summary='' for none."
            )
        return {
            name: self._number(values, column, source) * unit
            for name, (column, unit) in _SUMMARY.items()
        }

    def _header(self) -> dict[str, int]:
        """Return the index of each column. Raise DatasetError if a required column is missing."""
        header = _cells(self._file.readline())
        columns = {name.strip(): i for i, name in enumerate(header)}
        read = {"MOSES id", "CONFORMER id", "SMILES", _TOTAL, *(c for c, _ in _SUMMARY.values())}
        self.unread = [c for c in columns if c and c not in read]
        missing = [
            c
            for c in ("MOSES id", "CONFORMER id", _TOTAL, *(c for c, _ in _SUMMARY.values()))
            if c not in columns
        ]
        if missing:
            raise DatasetError(
                f"{self.path}: has no column {missing[0]!r}; found {header[:30]}. Expected "
                "summary.csv of ∇²DFT."
            )
        return columns

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys and the offsets of all lines, both of shape (lines,)."""
        first, second = self._columns["MOSES id"], self._columns["CONFORMER id"]
        needed, offset, number = max(first, second) + 1, self._file.tell(), 1
        keys, offsets, parts = [], [], []
        for line in self._file:
            number += 1
            if line.strip():
                cells = line.split(b",", needed)
                try:
                    keys.append(_key(int(cells[first]), int(cells[second])))
                except (IndexError, ValueError) as error:
                    raise DatasetError(
                        f"{self.path}: line {number}: expected the numbers of a molecule and a "
                        f"conformation, found {line[:60]!r}"
                    ) from error
                offsets.append(offset)
            offset += len(line)
            if len(keys) == 1_000_000:  # arrays take less memory than lists of integers
                parts.append((np.array(keys, np.int64), np.array(offsets, np.int64)))
                keys, offsets = [], []
        parts.append((np.array(keys, np.int64), np.array(offsets, np.int64)))
        return tuple(np.concatenate(p) for p in zip(*parts))

    def _number(self, values: list[str], column: str, source: str) -> float:
        """Return a cell as a number, NaN if it is empty."""
        try:
            text = values[self._columns[column]].strip()
            return float(text) if text else math.nan
        except (IndexError, ValueError) as error:
            raise DatasetError(
                f"{self.path}: the line of {source} has no number for {column!r}: {values}"
            ) from error


def _key(moses: int, conformation: int) -> int:
    """Combine the two numbers of a conformation into one integer."""
    return moses << 32 | conformation


def _cells(line: bytes) -> list[str]:
    """Return the cells of a line, [] if it is not CSV."""
    try:
        return next(csv.reader([line.decode("utf-8", "replace")]), [])
    except csv.Error:
        return []
