"""Reader of QM7-X: 4.2 million equilibrium and displaced structures of molecules.

The molecules have up to seven heavy atoms.

Layout (Hoja et al., Sci. Data 8, 43, 2021; Zenodo 4288677), files 1000.hdf5 to 8000.hdf5. A group
per molecule, named by its number ("1"), contains a group per structure, "Geom-m1-i1-c1-opt". m
counts the SMILES strings, i their stereoisomers, c the conformers of these. "opt" is the minimum;
"d1" to "d100" (or "1" to "100") are displaced from it. For n atoms:

    atNUM, atXYZ            (n,), (n, 3)  atomic numbers; Å
    ePBE0+MBD               (1,)    eV, total energy; ePBE0 and eMBD are its components
    totFOR                  (n, 3)  eV/Å, forces; pbe0FOR and vdwFOR are their components
    eH, eL, HLgap           (1,)    eV
    vDIP, DIP               (3,), (1,)  e·Å
    mPOL                    (1,)    bohr³
    hCHG, hVOL, hRAT        (n,) or (n, 1)  Hirshfeld charges (e), volumes (bohr³) and ratios to the
                            free atom
    atPOL                   (n,) or (n, 1)  bohr³

About twenty more entries are not read; a note lists them. DupMols.dat, published with the files, lists duplicate
structures.

The smaller form used by mlff is one .npz file: R (m, N, 3) Å, z (m, N), E (m, 1) eV total energy
and F (m, N, 3) eV/Å, padded with z = 0 to the largest molecule. It does not identify its molecules.

The identity of a molecule is its m. Stereoisomers share it, because enantiomers have equal energies
and would otherwise appear in both the training and the test split. In the .npz form only the
formula is known and used as identity.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase import units
from ase.data import chemical_symbols

from mlip_jax.datasets import hdf5, options, reader
from mlip_jax.datasets.formats.elements import validate_numbers
from mlip_jax.datasets.formats.qm7x_padded import ATOM_ENERGIES, PaddedFile, check_energy, is_padded
from mlip_jax.datasets.hdf5 import HDF5_ERRORS
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.structure import Structure

_PROPERTIES = {
    "homo": ("eH", 1.0),
    "lumo": ("eL", 1.0),
    "gap": ("HLgap", 1.0),
    "dipole_moment": ("DIP", 1.0),
    "polarizability": ("mPOL", units.Bohr**3),
    "dispersion_energy": ("eMBD", 1.0),
}
_ATOM_PROPERTIES = {
    "hirshfeld_charges": ("hCHG", 1.0),
    "hirshfeld_volumes": ("hVOL", units.Bohr**3),
    "hirshfeld_ratios": ("hRAT", 1.0),
    "atomic_polarizabilities": ("atPOL", units.Bohr**3),
}


_READ = {"atNUM", "atXYZ", "ePBE0+MBD", "totFOR"}
_READ_PROPERTIES = {"vDIP", *(f for f, _ in (*_PROPERTIES.values(), *_ATOM_PROPERTIES.values()))}


class Reader(reader.Reader):
    """Reader of QM7-X files.

    A record is a molecule with all its structures or, in an .npz file, a row.

    Args:
      path: File, or folder with several of the HDF5 files.
      properties: Whether to read the labels other than energies and forces (five times as many
        arrays).
      duplicates: Path of DupMols.dat. The structures that it lists, and those displaced from them,
        are skipped.
    """

    LEVEL_OF_THEORY = "PBE0+MBD/tight"
    UNITS = {
        "positions": "Å",
        "energy": "eV",
        "forces": "eV/Å",
        "polarizability": "bohr³",
        "hirshfeld_volumes": "bohr³",
    }

    def __init__(
        self, path: str | Path, properties: bool = True, duplicates: str | Path | None = None
    ):
        super().__init__(path)
        self.atom_energies = {chemical_symbols[z]: e for z, e in ATOM_ENERGIES.items()}
        self._properties = properties = options.flag("properties", properties)
        duplicates = options.path("duplicates", duplicates, allow_none=True)
        self._duplicates = Path(duplicates) if duplicates else None
        duplicate = _read_duplicates(self._duplicates)
        if self.path.suffix == ".npz":
            self._source = PaddedFile(self.path)
            self.notes.append(
                f"{self.path.name} does not identify its molecules: structures with equal formulas "
                "count as one molecule"
            )
        else:
            self._source = _MoleculeGroups(_hdf5_files(self.path), properties, duplicate)

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether an HDF5 file, the first one of a folder or an .npz file is QM7-X."""
        try:
            if path.is_dir():
                files = sorted(path.glob("*.hdf5"))
                return bool(files) and _is_qm7x(files[0])
            if path.suffix == ".npz":
                return is_padded(path)
            return _is_qm7x(path)
        except OSError:
            return False

    def __len__(self) -> int:
        return len(self._source)

    def close(self) -> None:
        self._source.close()

    def files(self) -> list[Path]:
        return [*self._source.paths, *([self._duplicates] if self._duplicates else [])]

    def read(self, records: range, report: ReadReport) -> Iterator[Structure]:
        """Yield the structures of the records.

        Listed duplicates and structures with positions that are not finite are skipped.
        """
        return self._source.read(records, report)


class _MoleculeGroups:
    """Molecules of several HDF5 files, in the order of the files."""

    def __init__(self, paths: list[Path], properties: bool, duplicates: set[str]):
        self.paths, self._properties, self._duplicates = paths, properties, duplicates
        self._files = []
        try:
            for path in paths:
                self._files.append(hdf5.Hdf5File(path))
            self._names = [
                (f, name) for f, file in enumerate(self._files) for name in _in_order(file)
            ]
        except BaseException:
            self.close()
            raise
        if not self._names:
            self.close()
            raise DatasetError(f"{paths[0]}: the file contains no molecules")

    def __len__(self) -> int:
        return len(self._names)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def read(self, records: range, report: ReadReport) -> Iterator[Structure]:
        """Yield the structures of the records."""
        for record in records:
            file, name = self._names[record]
            source = f"{self.paths[file].name}:{name}"
            report.records += 1
            try:
                yield from self._molecule(self._files[file], name, source, record, report)
            except DatasetError:
                raise
            except HDF5_ERRORS as error:
                raise DatasetError(
                    f"{source}: the record cannot be read ({error}); the file is corrupted. "
                    "Download it again or recreate it."
                ) from error

    def _molecule(self, file, name, source, record, report) -> Iterator[Structure]:
        """Yield the structures of a molecule, minima first."""
        group = file[name]
        names = _in_order(group) if isinstance(group, hdf5.Hdf5Group) else type(group).__name__
        if not isinstance(group, hdf5.Hdf5Group) or not all(
            isinstance(group[k], hdf5.Hdf5Group) for k in names[:1]
        ):
            raise DatasetError(
                f"{source}: expected a group of structures, as in QM7-X; found {names}. Is this a "
                "QM7-X file?"
            )
        for c, key in enumerate(names):
            structure_source = f"{source}/{key}"
            if _minimum_of(key) in self._duplicates:
                report.skip("duplicate", structure_source)
                continue
            structure = self._structure(group[key], key, name, structure_source)
            if not np.isfinite(structure["positions"]).all():
                report.skip("positions not finite", structure_source)
                continue
            report.structures += 1
            report.add_unread(group[key].keys() - _READ - _READ_PROPERTIES)
            if not self._properties:
                report.add_unread(group[key].keys() & _READ_PROPERTIES)
            yield Structure(**structure, conformer=c, record=record, source=structure_source)

    def _structure(self, group, key, name, source) -> dict:
        """Return the arguments of a structure from its group."""
        for field in ("atNUM", "atXYZ", "ePBE0+MBD"):
            if field not in group:
                raise DatasetError(
                    f"{source}: expected {field!r}, as in QM7-X; found {sorted(group)}"
                )
        numbers = validate_numbers(group.array("atNUM").read().reshape(-1), source)
        n = len(numbers)
        energy = float(_values(group, "ePBE0+MBD", (), source))
        check_energy(energy, numbers, source)
        properties, atom_properties = {}, {}
        if self._properties:
            properties = {
                k: float(_values(group, field, (), source)) * unit
                for k, (field, unit) in _PROPERTIES.items()
            }
            properties["dipole"] = _values(group, "vDIP", (3,), source)
            atom_properties = {
                k: _values(group, field, (n,), source) * unit
                for k, (field, unit) in _ATOM_PROPERTIES.items()
            }
        return dict(
            numbers=numbers,
            positions=_values(group, "atXYZ", (n, 3), source),
            energy=energy,
            forces=_values(group, "totFOR", (n, 3), source),
            molecule=f"m{name}",
            subset="equilibrium" if key.endswith("-opt") else "displaced",
            properties=properties,
            atom_properties=atom_properties,
        )


def _hdf5_files(path: Path) -> list[Path]:
    """Return the file itself, or the HDF5 files of a folder in the order of their numbers."""
    if path.is_file():
        return [path]
    files = sorted(path.glob("*.hdf5"), key=_number)
    if not files:
        raise DatasetError(
            f"{path}: contains no .hdf5 files. Give the folder with 1000.hdf5 to 8000.hdf5, or one "
            "of them."
        )
    return files


def _number(path: Path):
    """Return a sort key: files named by a number first, in numerical order."""
    return (0, int(path.stem), "") if path.stem.isdecimal() else (1, 0, path.stem)


def _in_order(group) -> list[str]:
    """Return names in numerical order, with each minimum before the structures displaced from it.

    HDF5 sorts "10" before "2".
    """

    def key(name):
        # "-opt" counts as number 0, so the minimum comes before "-d1", "-d2", ...
        parts = re.split(r"(\d+)", name.replace("-opt", "-0"))
        return [int(part) if i % 2 else part for i, part in enumerate(parts)]

    return sorted(group, key=key)


def _minimum_of(key: str) -> str:
    """Return the name of the minimum from which a structure was displaced."""
    return key.rsplit("-", 1)[0] + "-opt"


def _read_duplicates(path: Path | None) -> set[str]:
    """Return the names of the minima in the list of duplicates."""
    if path is None:
        return set()
    try:
        return {_minimum_of(word) for word in path.read_text(encoding="utf-8").split()}
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: the list of duplicates cannot be read ({error})") from error


def _values(group, field, shape, source) -> np.ndarray:
    """Return a field as float64 of the given shape, NaN if it is missing.

    A last axis of length 1 in the file is ignored.
    """
    if field not in group:
        return np.full(shape, np.nan)
    values = group.array(field).read(np.float64)
    if values.shape not in (shape, (*shape, 1)):
        raise DatasetError(f"{source}: {field} has shape {values.shape}, expected {shape or (1,)}")
    return values.reshape(shape)


def _is_qm7x(path: Path) -> bool:
    """Return whether an HDF5 file has the layout of QM7-X."""
    try:
        with hdf5.Hdf5File(path) as file:
            molecule = next(iter(file.values()), None)
            first = (
                next(iter(molecule.values()), None)
                if isinstance(molecule, hdf5.Hdf5Group)
                else None
            )
            return isinstance(first, hdf5.Hdf5Group) and "atNUM" in first and "atXYZ" in first
    except HDF5_ERRORS:
        return False
