"""Reader of ANI-1x, ANI-1ccx and ANI-1: conformations with labels at several levels of theory.

Layout of ANI-1x and ANI-1ccx (Smith et al., Sci. Data 7, 134, 2020;
github.com/aiqm/ANI1x_datasets), one group for each formula with n atoms and m conformations:

    atomic_numbers                (n,)       uint8
    coordinates                   (m, n, 3)  Å
    <level>.energy                (m,)       hartree, total
    <level>.forces                (m, n, 3)  hartree/Å, forces
    <level>.dipole                (m, 3)     e·Å
    wb97x_dz.hirshfeld_charges, wb97x_dz.cm5_charges, wb97x_tz.mbis_charges  (m, n)  e

The levels are wb97x_dz, wb97x_tz, ccsd(t)_cbs (energies only) and the components of the last one.
Missing labels of a conformation are NaN. Missing Hirshfeld and CM5 charges are ALL ZERO in the file
and are read as NaN. A group is a FORMULA that mixes isomers without distinguishing them. The
molecule identity is therefore only the formula, so a split by molecule keeps isomers together.

Layout of ANI-1 (Smith et al., Sci. Data 4, 170193, 2017; ani_gdb_s01.h5 to s08.h5), nested groups
such as /gdb11_s01/gdb11_s01-0, each one molecule:

    species      (n,)       symbols as bytes
    coordinates  (m, n, 3)  Å
    energies     (m,)       hartree, total, ωB97X/6-31G(d); no forces
    smiles       (k,)       characters of the SMILES, joined
    coordinatesHE, energiesHE  conformations of high energy, stored separately

Other authors add `forces` (m, n, 3) to the second layout, in hartree/Å or hartree/bohr, or gradients
under that name. The options set unit and sign, and the checks of the data detect wrong ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase import units

from mlip_jax.datasets import hdf5, options, reader
from mlip_jax.datasets.charges import charge_from_smiles
from mlip_jax.datasets.file_units import force_unit
from mlip_jax.datasets.formats.elements import validate_numbers
from mlip_jax.datasets.hdf5 import HDF5_ERRORS
from mlip_jax.datasets.identity import molecule_identity
from mlip_jax.datasets.reader import DatasetError, ReadReport, symbols_to_numbers
from mlip_jax.structure import Structure

_LEVELS = {
    "wb97x_dz": "ωB97X/6-31G(d)",
    "wb97x_tz": "ωB97X/def2-TZVPP",
    "ccsd(t)_cbs": "CCSD(T)*/CBS",
}
_CHARGES = {"wb97x_dz": ("hirshfeld_charges", "cm5_charges"), "wb97x_tz": ("mbis_charges",)}


class Reader(reader.Reader):
    """Reader of ANI files. A record is a group: a formula in ANI-1x, a molecule in ANI-1.

    Args:
      path: File, or folder of such files.
      level: Level of theory of the labels: "wb97x_dz", "wb97x_tz", "ccsd(t)_cbs", or another level
        with energies.
      keep_unlabeled: Whether to keep conformations without an energy at this level (as NaN).
        Otherwise they are skipped.
      high_energy: Whether to read ANI-1's conformations of high energy as well.
      forces_key: Name of the forces in the layout of ANI-1; files may lack them.
      forces_unit: Force unit, e.g. "hartree/bohr".
      forces_are_gradients: Whether the file has the gradient, whose sign is then changed.
    """

    RENAMED_OPTIONS = {"keep_unlabelled": "keep_unlabeled"}
    LEVEL_OF_THEORY = _LEVELS["wb97x_dz"]
    UNITS = {
        "positions": "Å",
        "energy": "hartree",
        "forces": "hartree/Å",
        "dipole": "e·Å",
        "charges": "e",
    }
    PROBLEM_OPTIONS = {
        "gradients": "forces_are_gradients=True",
        "units": "forces_unit=hartree/bohr",
    }

    def __init__(
        self,
        path: str | Path,
        level: str = "wb97x_dz",
        keep_unlabeled: bool = False,
        high_energy: bool = False,
        forces_key: str = "forces",
        forces_unit: str = "hartree/Ang",
        forces_are_gradients: bool = False,
    ):
        super().__init__(path)
        self._level = options.text("level", level)
        self._keep = options.flag("keep_unlabeled", keep_unlabeled)
        self._high = options.flag("high_energy", high_energy)
        self._forces_key = options.text("forces_key", forces_key)
        # Forces are minus the gradient.
        sign = -1 if options.flag("forces_are_gradients", forces_are_gradients) else 1
        self._force = sign * force_unit(options.text("forces_unit", forces_unit))
        self._paths = _hdf5_files(self.path)
        self._files: list[hdf5.Hdf5File] = []
        try:
            for file in self._paths:
                self._files.append(hdf5.Hdf5File(file))
            self._groups = [
                (i, name) for i, file in enumerate(self._files) for name in _group_names(file)
            ]
            if not self._groups:
                raise DatasetError(
                    f"{self.path}: no group has 'coordinates', as in ANI-1x and ANI-1. Is this an "
                    "ANI file?"
                )
            self._choose_level()
        except BaseException:
            self.close()
            raise

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether the first group with coordinates has the layout of ANI-1x or ANI-1."""
        try:
            files = _hdf5_files(path)
            with hdf5.Hdf5File(files[0]) as file:
                group = file
                for _ in range(4):
                    if "coordinates" in group:
                        break
                    group = next((g for g in group.values() if isinstance(g, hdf5.Hdf5Group)), {})
                return "coordinates" in group and (_is_1x(group) or _is_1(group))
        except HDF5_ERRORS:
            return False

    def __len__(self) -> int:
        return len(self._groups)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def files(self) -> list[Path]:
        return list(self._paths)

    def read(self, records: range, report: ReadReport) -> Iterator[Structure]:
        """Yield the structures of the records.

        Conformations without an energy at the chosen level are skipped unless `keep_unlabeled` is
        set.
        """
        for record in records:
            file, name = self._groups[record]
            source = f"{self._paths[file].name}:{name}"
            report.records += 1
            try:
                group = self._files[file][name]
                if _is_1x(group):
                    yield from self._read_1x(group, name.rsplit("/", 1)[-1], source, record, report)
                elif _is_1(group):
                    yield from self._read_1(group, name.rsplit("/", 1)[-1], source, record, report)
                else:
                    raise DatasetError(
                        f"{source}: expected a list of 'atomic_numbers', or symbols of 'species'; "
                        f"found {sorted(group)}. Is this an ANI-1x or ANI-1 file?"
                    )
            except DatasetError:
                raise
            except HDF5_ERRORS as error:
                raise DatasetError(
                    f"{source}: the record cannot be read ({error}); the file is corrupted. "
                    "Download it again or recreate it."
                ) from error

    def _read_1x(self, group, name, source, record, report) -> Iterator[Structure]:
        """Yield the conformations of a group of ANI-1x or ANI-1ccx."""
        numbers = validate_numbers(group.array("atomic_numbers").read(), source)
        positions = _positions(group, "coordinates", len(numbers), source)
        m, n = positions.shape[:2]
        level = self._level
        energy = _labels(group, f"{level}.energy", (m,), source) * units.Hartree
        forces = (
            _labels(group, f"{level}.forces", (m, n, 3), source) * self._force
            if (f"{level}.forces" in group)
            else None
        )
        properties, charges = {}, {}
        if level in _CHARGES:
            properties["dipole"] = _labels(group, f"{level}.dipole", (m, 3), source)
            charges = {
                k: _charges(group, f"{level}.{k}", (m, n), numbers, source) for k in _CHARGES[level]
            }
        labels = {f"{level}.{k}" for k in ("energy", "forces", *properties, *charges)}
        report.add_unread(set(group) - labels - {"atomic_numbers", "coordinates"})
        for c in self._usable(positions, energy, source, 0, report):
            yield Structure(
                numbers=numbers,
                positions=positions[c],
                energy=float(energy[c]),
                forces=None if forces is None else forces[c],
                molecule=name,
                conformer=c,
                record=record,
                source=source,
                properties={k: v[c] for k, v in properties.items()},
                atom_properties={k: v[c] for k, v in charges.items()},
            )

    def _read_1(self, group, name, source, record, report) -> Iterator[Structure]:
        """Yield the conformations of a group of ANI-1."""
        symbols = [
            s.decode() if isinstance(s, bytes) else s
            for s in group.array("species").read().tolist()
        ]
        numbers = validate_numbers(symbols_to_numbers(symbols, source), source)
        smiles = _join_characters(group.array("smiles").read()) if "smiles" in group else ""
        first, key = 0, self._forces_key
        report.add_unread(
            name
            for name in group
            if name.removesuffix("HE") not in {"species", "coordinates", "energies", "smiles", key}
        )
        # Conformations of high energy are numbered after the others.
        for suffix in ("", "HE") if self._high and "coordinatesHE" in group else ("",):
            positions = _positions(group, f"coordinates{suffix}", len(numbers), source)
            energy = _labels(group, f"energies{suffix}", (len(positions),), source) * units.Hartree
            forces = (
                _labels(group, f"{key}{suffix}", positions.shape, source) * self._force
                if f"{key}{suffix}" in group
                else None
            )
            for c in self._usable(positions, energy, source, first, report):
                yield Structure(
                    numbers=numbers,
                    positions=positions[c],
                    energy=float(energy[c]),
                    forces=None if forces is None else forces[c],
                    charge=float(charge_from_smiles(smiles)),
                    molecule=molecule_identity(smiles) or name,
                    smiles=smiles,
                    conformer=first + c,
                    record=record,
                    subset="high energy" if suffix else "",
                    source=source,
                )
            first += len(positions)

    def _usable(self, positions, energy, source, first, report) -> Iterator[int]:
        """Yield the indices of the usable conformations and count the others in `report`."""
        finite = np.isfinite(positions).all((1, 2))
        for c in range(len(positions)):
            if not finite[c]:
                report.skip("positions not finite", f"{source}#{first + c}")
            elif np.isnan(energy[c]) and not self._keep:
                report.skip(f"no {self._level} energy", f"{source}#{first + c}")
            else:
                report.structures += 1
                yield c

    def _choose_level(self) -> None:
        """Set the level of theory.

        Raise DatasetError if no group has its energies, or the forces under a requested name.
        """
        levels: dict[str, None] = {}  # ordered
        wanted = self._forces_key not in ("", "forces")
        for file, name in self._groups:
            group = self._files[file][name]
            levels |= {k.removesuffix(".energy"): None for k in group if k.endswith(".energy")}
            levels |= {"wb97x_dz": None} if "energies" in group and "species" in group else {}
            wanted = wanted and self._forces_key not in group
            if self._level in levels and not wanted:
                break
        if self._level not in levels:
            raise DatasetError(
                f"{self.path}: has no energies of level {self._level!r}; it has "
                f"{', '.join(map(repr, levels)) or 'no energies'}. Choose one, "
                f"{options.as_flag('level', '...')}."
            )
        if wanted:
            raise DatasetError(
                f"{self.path}: no group has {self._forces_key!r}; the last one has "
                f"{', '.join(group)}. Give the name, {options.as_flag('forces_key', 'NAME')}."
            )
        self.level_of_theory = _LEVELS.get(self._level, self._level)


def _hdf5_files(path: Path) -> list[Path]:
    """Return the file itself, or the sorted HDF5 files of a folder."""
    if not path.is_dir():
        return [path]
    files = sorted(f for f in path.iterdir() if f.suffix in (".h5", ".hdf5"))
    if not files:
        raise DatasetError(f"{path}: contains no .h5 or .hdf5 files")
    return files


def _group_names(file: hdf5.Hdf5File) -> list[str]:
    """Return the paths of the groups with coordinates, in the order of the file."""
    try:
        return [name for name in file.groups() if "coordinates" in file[name]]
    except HDF5_ERRORS as error:
        raise DatasetError(
            f"{file.path}: cannot list its groups ({error}); the file is corrupted. Download it "
            "again or recreate it."
        ) from error


def _is_1x(group) -> bool:
    """Return whether a group has the layout of ANI-1x."""
    return (
        "atomic_numbers" in group
        and group.array("atomic_numbers").ndim == 1
        and group.array("coordinates").ndim == 3
    )


def _is_1(group) -> bool:
    """Return whether a group has the layout of ANI-1."""
    if "species" not in group:
        return False
    species = group.array("species")
    return species.ndim == 1 and species.dtype.kind in "SO"


def _positions(group, name, n, source) -> np.ndarray:
    """Return positions (Å), shape (m, n, 3)."""
    positions = group.array(name).read(np.float64)
    if positions.ndim != 3 or positions.shape[1:] != (n, 3):
        raise DatasetError(f"{source}: {name} have shape {positions.shape}, expected (m, {n}, 3)")
    return positions


def _labels(group, name, shape, source) -> np.ndarray:
    """Return labels of the given shape in the unit of the file, NaN if the file lacks them."""
    if name not in group:
        return np.full(shape, np.nan)
    values = group.array(name).read(np.float64)
    if values.shape != shape:
        raise DatasetError(f"{source}: {name} has shape {values.shape}, expected {shape}")
    return values


def _charges(group, name, shape, numbers, source) -> np.ndarray:
    """Return atomic charges (e), NaN for conformations without charges."""
    charges = _labels(group, name, shape, source)
    # Charges in a molecule of several elements are never all zero: zeros mean missing.
    if len(np.unique(numbers)) > 1:
        charges[(charges == 0).all(1)] = np.nan
    return charges


def _join_characters(characters: np.ndarray) -> str:
    """Join characters to a text."""
    return "".join(
        c.decode() if isinstance(c, bytes) else str(c) for c in np.ravel(characters).tolist()
    )
