"""Files of Molecule3D, described in readers/molecule3d.py: SDF and the table of properties."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import numpy as np

from mlip_jax.datasets.reader import DatasetError, check_regular

_FILE = re.compile(r"combined_mols_(\d+)_to_(\d+)\.sdf")
_COLUMNS = ("dipole x", "dipole y", "dipole z", "homo", "lumo", "homolumogap", "scf energy")
_BLOCK = 1 << 24


class SdfFile:
    """Index of the records in an SDF file, built as far as records are requested."""

    def __init__(self, path: Path, start: int, stop: int):
        self.path, self.start, self.stop = path, start, stop
        self._file = None
        self._offsets = np.zeros(stop - start + 1, np.int64)
        self._known = 0  # records whose end is known
        self._scanned = 0

    def __len__(self) -> int:
        return self.stop - self.start

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def block(self, index: int) -> bytes:
        """Return record `index` of this file."""
        if self._file is None or self._file.closed:
            self._file = self.path.open("rb")
        # Before returning the last record, scan the rest of the file for surplus records.
        while self._known <= index or (
            index == len(self) - 1 and self._scanned < self.path.stat().st_size
        ):
            self._scan()
        first, last = (int(p) for p in self._offsets[index : index + 2])
        self._file.seek(first)
        return self._file.read(last - first)

    def _scan(self) -> None:
        """Find the ends of records, lines that begin with $$$$, in the next block of the file."""
        self._file.seek(self._scanned)
        content = self._file.read(_BLOCK)
        # Stop at the end of a line, so that no $$$$ is split between two blocks.
        final = len(content) < _BLOCK
        length = len(content) if final else content.rfind(b"\n") + 1
        if not content or not length:
            raise DatasetError(
                f"{self.path}: ends after {self._known} records, but its name states {len(self)}. "
                "It is truncated; download it again."
            )
        # Find all end marks at the start of a line.
        at = content.find(b"$$$$", 0, length)
        while at >= 0:
            end = content.find(b"\n", at, length)
            end = length if end < 0 else end + 1
            if at == 0 or content[at - 1] == 10:
                if self._known == len(self):
                    raise DatasetError(
                        f"{self.path}: has more than the {len(self)} records that its name states"
                    )
                self._known += 1
                self._offsets[self._known] = self._scanned + end
            at = content.find(b"$$$$", end, length)
        rest = max(int(self._offsets[self._known]) - self._scanned, 0)
        if final and content[rest:length].strip():
            raise DatasetError(
                f"{self.path}: record {self.start + self._known} does not end with $$$$. The file "
                "is truncated; download it again."
            )
        self._scanned += length


class PropertyTable:
    """Table properties.csv with an index of its lines.

    Attributes:
      path: Path of the table.
      unread: Names of the columns that are not read.
    """

    def __init__(self, path: Path):
        self.path = path
        check_regular(path)
        self._file = path.open("rb")
        header = self._file.readline().decode("utf-8", "replace")
        self._columns = {name.strip().lower(): i for i, name in enumerate(_cells(header))}
        self.unread = [c for c in self._columns if c and c not in (*_COLUMNS, "cid")]
        missing = [c for c in _COLUMNS if c not in self._columns]
        if missing:
            self._file.close()
            raise DatasetError(f"{path}: has no column {missing[0]!r}; found {list(self._columns)}")
        self._offsets = self._index()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def row(self, molecule: int) -> tuple[int, dict[str, float]]:
        """Return the compound number (0 if missing) and the values per column, NaN if empty."""
        first, last = (int(p) for p in self._offsets[molecule : molecule + 2])
        self._file.seek(first)
        line = self._file.read(last - first).decode("utf-8", "replace")
        cells = _cells(line)
        try:
            cid = cells[self._columns["cid"]] if "cid" in self._columns else ""
            return int(float(cid or 0)), {
                c: float(cells[self._columns[c]] or math.nan) for c in _COLUMNS
            }
        except (IndexError, ValueError) as error:
            raise DatasetError(
                f"{self.path}: line {molecule + 2}: expected {len(self._columns)} numbers, found "
                f"{line.strip()[:200]!r}"
            ) from error

    def _index(self) -> np.ndarray:
        """Return the offset of each line and of the end of the file, shape (lines + 1,)."""
        offset = self._file.tell()
        ends = [np.array([offset], np.int64)]
        last = b"\n"
        while content := self._file.read(_BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(content, np.uint8) == 10) + offset + 1)
            offset += len(content)
            last = content[-1:]
        offsets = np.concatenate(ends)
        return offsets if last == b"\n" else np.append(offsets, offset)


def sdf_files(folder: Path) -> dict[tuple[int, int], Path]:
    """Return the SDF files of a folder by their range of molecules, (first, last + 1)."""
    if not folder.is_dir():
        return {}
    matches = ((_FILE.fullmatch(p.name), p) for p in folder.glob("combined_mols_*.sdf"))
    return {
        (int(m[1]), int(m[2])): p for m, p in matches if m and int(m[2]) > int(m[1]) and p.is_file()
    }


def _cells(line: str) -> list[str]:
    """Return the cells of a line of a table, [] if it is not CSV."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []
