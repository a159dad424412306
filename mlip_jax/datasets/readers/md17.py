"""Reader of MD17 and revised MD17 (rMD17): .npz files of molecular dynamics, one per molecule.

A row is a frame.

Layout of rMD17 (Christensen and von Lilienfeld, Mach. Learn.: Sci. Technol. 1, 045018, 2020;
figshare 12672038), n atoms in m frames, float64:

    nuclear_charges  (n,)       uint8
    coords           (m, n, 3)  Å
    energies         (m,)       kcal/mol, total
    forces           (m, n, 3)  kcal/mol/Å, forces
    old_indices      (m,)       row in the original MD17; old_energies, old_forces: the labels there

Layout of MD17 (Chmiela et al., Sci. Adv. 3, e1603015, 2017; quantum-machine.org/gdml) and of the
data files of sGDML:

    z                (n,)       atomic numbers
    R                (m, n, 3)  Å
    E                (m, 1) or (m,)  kcal/mol, total
    F                (m, n, 3)  kcal/mol/Å, forces
    name, theory, md5, type     texts;  r_unit, e_unit  texts, only in newer sGDML files

The official splits of rMD17 are CSV files of row numbers, `splits/index_train_01.csv` to
`index_test_05.csv`, common to all molecules; `<molecule>_train_01.csv` is for one molecule. The row
numbers refer to the file that the splits were published with. A split is rejected if it contains
rows that the data file does not have.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase import units

from mlip_jax.config import ConfigError
from mlip_jax.datasets import options, reader
from mlip_jax.datasets.formats import npz
from mlip_jax.datasets.formats.elements import validate_numbers
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.structure import Structure

_REVISED = {
    "numbers": "nuclear_charges",
    "positions": "coords",
    "energy": "energies",
    "forces": "forces",
}
_ORIGINAL = {"numbers": "z", "positions": "R", "energy": "E", "forces": "F"}
# Texts and indices, and labels of the original data that the revised ones replace.
_KNOWN = {"name", "theory", "md5", "type", "r_unit", "e_unit"}
_KNOWN |= {"old_indices", "old_energies", "old_forces"}
_TWO_FILES, _NONE = "('TRAIN.csv', 'TEST.csv')", "''"
_BLOCK = 512  # rows read at once
_KCAL = units.kcal / units.mol
_E_UNITS = {"kcal/mol": _KCAL, "kcal mol-1": _KCAL, "kcal": _KCAL, "ev": 1.0}
_R_UNITS = ("ang", "angstrom", "a", "å")
# Approximate energies of isolated atoms (eV), to distinguish units that differ by a factor of 20.
_ROUGH_ATOMS = {
    1: -13.6,
    6: -1029.0,
    7: -1485.0,
    8: -2042.0,
    9: -2713.0,
    16: -10830.0,
    17: -12520.0,
}


class Reader(reader.Reader):
    """Reader of MD17 and rMD17 files. A record is a frame.

    Args:
      path: Path of the .npz file.
      split_files: CSV files of row numbers, (train, test), that replace the official ones next to
        the data; "" or () for no split.
      split_number: Number of the official split, 1 to 5. None uses the first one if its files are
        next to the data.
    """

    LEVEL_OF_THEORY = "PBE/def2-SVP (rMD17); PBE+vdW-TS (MD17)"
    UNITS = {"positions": "Å", "energy": "kcal/mol", "forces": "kcal/mol/Å"}

    def __init__(
        self,
        path: str | Path,
        split_files: tuple[str, str] | str | None = None,
        split_number: int | None = None,
    ):
        super().__init__(path)
        split_number = options.positive_integer("split_number", split_number, allow_none=True)
        if split_files is None:
            self._splits = self._find_splits(split_number or 1)
            if split_number is not None and self._splits is None:
                raise DatasetError(
                    f"{self.path}: the files of split {split_number}, such as "
                    f"splits/index_train_{split_number:02d}.csv, are missing next to the data. Add "
                    f"them, or give others, {options.as_flag('split_files', _TWO_FILES)}."
                )
        else:
            if isinstance(split_files, list | tuple):
                split_files = [
                    os.fspath(f) if isinstance(f, os.PathLike) else f for f in split_files
                ]
            files = options.texts("split_files", split_files)
            if len(files) not in (0, 2):
                raise ConfigError(
                    "reader option split_files must be two files, ('TRAIN', 'TEST'), or '' for "
                    f"none; received {split_files!r}"
                )
            self._splits = tuple(Path(f) for f in files) or None
        self._file = npz.NpzFile(self.path)
        try:
            self._open()
            self.official_split()  # reports an invalid split before the data are converted
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Read the layout, the atomic numbers and the units of the file."""
        self._keys = _keys(self._file.members)
        if self._keys is None:
            raise DatasetError(
                f"{self.path}: expected the layout of rMD17 ({', '.join(_REVISED.values())}) "
                f"or MD17 ({', '.join(_ORIGINAL.values())}; z for one molecule), found "
                f"{sorted(self._file.members)}"
            )
        self.numbers = validate_numbers(
            self._file.whole(self._keys["numbers"]), f"{self.path}: {self._keys['numbers']}"
        )
        self._length = self._file.members[self._keys["positions"]].shape[0]
        if not self._length:
            raise DatasetError(f"{self.path}: the file contains no frames")
        self._check_shapes()
        revised = self._keys is _REVISED
        self.level_of_theory = (
            "PBE/def2-SVP" if revised else self._file.text("theory") or "PBE+vdW-TS"
        )
        self.molecule = _molecule_name(self.path)
        self._unit = self._energy_unit()
        self._unread = [k for k in self._file.members if k not in _KNOWN | {*self._keys.values()}]
        self.sequential = any(
            self._file.streamed(k) for k in self._keys.values() if k in self._file
        )

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether an .npz file has the arrays of rMD17 or MD17."""
        return path.suffix == ".npz" and _keys(npz.members(path)) is not None

    def __len__(self) -> int:
        return self._length

    def close(self) -> None:
        self._file.close()

    def files(self) -> list[Path]:
        return [self.path, *(f for f in self._splits or () if f.is_file())]

    def read(self, records: range, report: ReadReport) -> Iterator[Structure]:
        """Yield the structures of the records. Frames with non-finite positions are skipped."""
        for at in range(0, len(records), _BLOCK):
            block = records[at : at + _BLOCK]
            yield from self._read_block(block, report)

    def _read_block(self, records: range, report: ReadReport) -> Iterator[Structure]:
        """Yield the structures of consecutive records, which are read at once."""
        start, stop = records[0], records[-1] + 1
        positions = self._rows("positions", start, stop)
        energy = self._rows("energy", start, stop).reshape(-1) * self._unit
        forces = self._rows("forces", start, stop) * self._unit
        # One flag per frame, (frames,).
        finite = np.isfinite(positions).all((1, 2))
        for record in records:
            i = record - start
            source = f"{self.path.name}:{record}"
            report.records += 1
            report.add_unread(self._unread)
            if not finite[i]:
                report.skip("positions not finite", source)
                continue
            report.structures += 1
            yield Structure(
                numbers=self.numbers,
                positions=positions[i].copy(),
                energy=float(energy[i]),
                forces=forces[i].copy(),
                molecule=self.molecule,
                record=record,
                source=source,
            )

    def official_split(self) -> dict[str, np.ndarray] | None:
        """Return the rows of "train" and "test" from the split files; None without split files.

        Raises:
          DatasetError: A split file is missing, is not a list of rows or contains rows that the
            data file does not have, or the two files share rows.
        """
        if self._splits is None:
            return None
        split = {
            name: self._read_split(file) for name, file in zip(("train", "test"), self._splits)
        }
        shared = np.intersect1d(split["train"], split["test"])
        if len(shared):
            raise DatasetError(
                f"{self._splits[0]} and {self._splits[1]}: {len(shared)} rows are in both, the "
                f"first is {shared[0]}"
            )
        return split

    def _read_split(self, file: Path) -> np.ndarray:
        """Return the row numbers in a split file, shape (rows,), after checking them."""
        try:
            rows = np.array(
                [int(word) for word in file.read_text(encoding="utf-8").replace(",", " ").split()],
                np.int64,
            )
        except (OSError, ValueError) as error:
            raise DatasetError(f"{file}: expected row numbers, one per line ({error})") from error
        if not len(rows):
            raise DatasetError(f"{file}: contains no row numbers")
        outside = rows[(rows < 0) | (rows >= len(self))]
        if len(outside):
            raise DatasetError(
                f"{file}: {len(outside)} of its {len(rows)} rows, such as {outside[0]}, are not "
                f"among the {len(self)} of {self.path.name}: the split belongs to another or a "
                "larger file. Give the matching files, "
                f"{options.as_flag('split_files', _TWO_FILES)}, or none, "
                f"{options.as_flag('split_files', _NONE)}."
            )
        if len(np.unique(rows)) != len(rows):
            raise DatasetError(
                f"{file}: {len(rows) - len(np.unique(rows))} rows occur more than once"
            )
        return rows

    def _find_splits(self, number: int) -> tuple[Path, Path] | None:
        """Return the official train and test files next to the data, or None."""
        names = [_molecule_name(self.path), "index"]
        for folder in (
            self.path.parent / "splits",
            self.path.parent.parent / "splits",
            self.path.parent,
        ):
            for name in names:
                pair = tuple(
                    folder / f"{name}_{part}_{number:02d}.csv" for part in ("train", "test")
                )
                if all(f.is_file() for f in pair):
                    return pair
        return None

    def _rows(self, label: str, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) of a label in the unit of the file, NaN if it is missing."""
        key = self._keys[label]
        if key not in self._file:
            shape = (stop - start,) if label == "energy" else (stop - start, len(self.numbers), 3)
            return np.full(shape, np.nan)
        return self._file.rows(key, start, stop).astype(np.float64)

    def _check_shapes(self) -> None:
        """Raise DatasetError if array shapes are inconsistent or atomic numbers are invalid."""
        m, n = self._length, len(self.numbers)
        expected = {"positions": [(m, n, 3)], "energy": [(m,), (m, 1)], "forces": [(m, n, 3)]}
        for label, shapes in expected.items():
            key = self._keys[label]
            if key in self._file:
                member = self._file.members[key]
                if member.dtype.hasobject:
                    self._file.rows(key, 0, 1)  # raises DatasetError for pickled objects
                if member.shape not in shapes or member.dtype.kind not in "fiu":
                    raise DatasetError(
                        f"{self.path}: {key} has shape {member.shape} and type {member.dtype}, "
                        f"expected numbers of shape {' or '.join(map(str, shapes))}"
                    )
        if n == 0:
            raise DatasetError(f"{self.path}: {self._keys['numbers']} is empty")

    def _first_energy(self) -> float:
        """Return the first known energy in the unit of the file, NaN if all are missing."""
        for start in range(0, self._length, _BLOCK):
            energies = self._rows("energy", start, start + _BLOCK).reshape(-1)
            known = energies[np.isfinite(energies)]
            if len(known):
                return float(known[0])
        return float("nan")

    def _energy_unit(self) -> float:
        """Return the energy unit of the file (eV): the stated one, otherwise kcal/mol.

        Raise DatasetError if the unit is unsupported or the energies clearly have another unit.
        """
        stated, length = self._file.text("e_unit").strip(), self._file.text("r_unit").strip()
        if stated and stated.lower() not in _E_UNITS:
            raise DatasetError(
                f"{self.path}: e_unit is {stated!r}, expected one of {', '.join(_E_UNITS)}"
            )
        if length and length.lower() not in _R_UNITS:
            raise DatasetError(f"{self.path}: r_unit is {length!r}, expected Ang")
        unit = _E_UNITS[stated.lower()] if stated else _KCAL
        energy = self._first_energy()
        # Energies of the isolated atoms determine the scale of the total energy.
        rough = sum(_ROUGH_ATOMS.get(z, np.nan) for z in self.numbers.tolist())
        for name, factor in (("kcal/mol", _KCAL), ("eV", 1.0), ("hartree", units.Hartree)):
            if factor != unit and 0.9 < energy * factor / rough < 1.1:
                raise DatasetError(
                    f"{self.path}: the first energy, {energy:.6g}, is that of this molecule in "
                    f"{name}, but {'e_unit says ' + stated if stated else 'MD17 has kcal/mol'}. Is "
                    "this an MD17 file?"
                )
        return unit


def _keys(members: dict[str, npz.Member]) -> dict[str, str] | None:
    """Return the array names of the layout that the file has, None if it has neither."""
    for keys in (_REVISED, _ORIGINAL):
        if (
            keys["numbers"] in members
            and keys["positions"] in members
            and keys["energy"] in members
        ):
            one_molecule = len(members[keys["numbers"]].shape) == 1
            if one_molecule and len(members[keys["positions"]].shape) == 3:
                return keys
    return None


def _molecule_name(path: Path) -> str:
    """Return the name of the molecule from the file name."""
    return path.stem.removeprefix("rmd17_").removeprefix("md17_")
