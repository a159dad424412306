"""Reader of SPICE 1.1.4 and 2.0.1: one HDF5 group per molecule.

Layout (github.com/openmm/spice-dataset; Eastman et al., Sci. Data 10, 11, 2023) for a molecule with
n atoms in m conformations:

    atomic_numbers      (n,)       int16
    conformations       (m, n, 3)  float32, bohr
    dft_total_energy    (m,)       float64, hartree
    dft_total_gradient  (m, n, 3)  float32, hartree/bohr: a GRADIENT, the forces are its negative
    formation_energy    (m,)       float64, hartree: total energy minus that of the isolated atoms
    smiles, subset      (1,)       mapped SMILES with all hydrogens; name of the subset

The total charge is stored only in the SMILES.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase import units

from mlip_jax.datasets import hdf5, reader
from mlip_jax.datasets.charges import charge_from_smiles
from mlip_jax.datasets.formats.elements import validate_numbers
from mlip_jax.datasets.hdf5 import HDF5_ERRORS
from mlip_jax.datasets.identity import molecule_identity
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.structure import Structure

UNITS = {
    "conformations": "bohr",
    "dft_total_energy": "hartree",
    "dft_total_gradient": "hartree/bohr",
    "formation_energy": "hartree",
}
_READ = frozenset((*UNITS, "atomic_numbers", "smiles", "subset"))


class Reader(reader.Reader):
    """Reader of SPICE files. A record is a molecule."""

    LEVEL_OF_THEORY = "ωB97M-D3(BJ)/def2-TZVPPD"
    UNITS = {"positions": "bohr", "energy": "hartree", "forces": "hartree/bohr, gradient"}

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._file = hdf5.Hdf5File(self.path)
        self.level_of_theory = self._file.attribute("level_of_theory") or self.LEVEL_OF_THEORY
        self._names = list(self._file)
        if not self._names:
            raise DatasetError(f"{self.path}: the file contains no molecules")

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether the first group of an HDF5 file has the layout of SPICE."""
        try:
            with hdf5.Hdf5File(path) as file:
                first = next(iter(file.values()), None)
                return (
                    isinstance(first, hdf5.Hdf5Group)
                    and "atomic_numbers" in first
                    and ("conformations" in first or "dft_total_energy" in first)
                )
        except HDF5_ERRORS:
            return False

    def __len__(self) -> int:
        return len(self._names)

    def close(self) -> None:
        self._file.close()

    def read(self, records: range, report: ReadReport) -> Iterator[Structure]:
        """Yield the structures of the records.

        Records without positions and conformations with positions that are not finite are skipped.
        """
        for record in records:
            report.records += 1
            name = self._names[record]
            source = f"{self.path.name}:{name}"
            try:
                group = self._file[name]
                if not isinstance(group, hdf5.Hdf5Group):
                    raise DatasetError(
                        f"{source}: expected a group for each molecule, as in SPICE; found an "
                        "array. Is this a SPICE file?"
                    )
                if "atomic_numbers" not in group:
                    raise DatasetError(
                        f"{source}: expected a group with 'atomic_numbers', as in SPICE; found "
                        f"{sorted(group)}. Is this a SPICE file?"
                    )
                yield from _read_molecule(group, source, record, report)
            except DatasetError:
                raise
            except HDF5_ERRORS as error:
                raise DatasetError(
                    f"{source}: the record cannot be read ({error}); the file is corrupted. "
                    "Download it again or recreate it."
                ) from error


def _read_molecule(
    group: hdf5.Hdf5Group, source: str, record: int, report: ReadReport
) -> Iterator[Structure]:
    """Yield the conformations of a molecule."""
    positions = _floats(group, "conformations", None, source)
    if positions is None or not positions.size:
        report.skip("no positions", source)
        return
    numbers = validate_numbers(_floats(group, "atomic_numbers", None, source), source)
    positions *= units.Bohr
    if positions.ndim != 3 or positions.shape[1:] != (len(numbers), 3):
        raise DatasetError(
            f"{source}: conformations have shape {positions.shape}, expected (m, {len(numbers)}, 3)"
        )
    count = len(positions)
    energy = _labels(group, "dft_total_energy", (count,), source) * units.Hartree
    forces = _labels(group, "dft_total_gradient", positions.shape, source) * (
        -units.Hartree / units.Bohr
    )
    formation = _labels(group, "formation_energy", (count,), source) * units.Hartree
    smiles, subset = (_text(group, name, source) for name in ("smiles", "subset"))
    charge, molecule = charge_from_smiles(smiles), molecule_identity(smiles)
    report.add_unread(group.keys() - _READ)
    finite = np.isfinite(positions).all((1, 2))
    for c in range(count):
        if not finite[c]:
            report.skip("positions not finite", f"{source}#{c}")
            continue
        report.structures += 1
        yield Structure(
            numbers=numbers,
            positions=positions[c],
            energy=float(energy[c]),
            forces=forces[c],
            charge=charge,
            molecule=molecule or source,
            smiles=molecule,
            conformer=c,
            record=record,
            subset=subset,
            source=source,
            properties={"formation_energy": float(formation[c])},
        )


def _labels(group, name, shape, source) -> np.ndarray:
    """Return labels of the given shape in the unit of the file, NaN if the file lacks them."""
    values = _floats(group, name, shape, source)
    return np.full(shape, np.nan) if values is None else values


def _floats(group, name, shape, source) -> np.ndarray | None:
    """Return an array as float64 of the given shape (None for any), or None if it is missing.

    Raise DatasetError if the file states another unit than that of SPICE.
    """
    try:
        data = group.array(name)
    except KeyError:
        return None
    if shape is not None and data.shape != shape:
        raise DatasetError(f"{source}: {name} has shape {data.shape}, expected {shape}")
    values = data.read(np.float64)
    stored = data.attribute("units") if name in UNITS else ""
    if stored and stored != UNITS[name]:
        raise DatasetError(f"{source}: {name} is in {stored!r}, expected {UNITS[name]!r}")
    return values


def _text(group, name, source) -> str:
    """Return a text, "" if it is missing."""
    try:
        data = group.array(name)
    except KeyError:
        return ""
    if math.prod(data.shape) != 1:
        raise DatasetError(f"{source}: {name} has shape {data.shape}, expected one text")
    value = data.read().ravel()[0]
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise DatasetError(f"{source}: {name} is not valid UTF-8 ({error})") from error
