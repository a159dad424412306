"""Reader of ∇²DFT (nablaDFT): conformations of drug-like molecules in an ASE database, one per row.

Layout (github.com/AIRI-Institute/nablaDFT; Khrabrov et al., arXiv 2406.14347, 2024), the row of a
molecule with n atoms:

    numbers, positions                             (n,), (n, 3)  Å
    key_value_pairs  moses_id, conformation_id     integers: numbers of the molecule in MOSES and
                                                   of its conformation
                     smiles                        without hydrogens
                     iteration                     integer, only in the optimization trajectories
    data             energy                        (1,)    hartree, MINUS the isolated atoms
                     forces                        (n, 3)  hartree/Å; true forces, not a gradient

    metadata         _distance_unit                "Ang"
                     _property_unit_dict           {"energy": "Hartree", "forces": "Hartree/Ang"}
                     atomrefs                      {"energy": [hartree by atomic number]}; some
                                                   files lack it

Structures get total energies: the energies of the atoms are added. They are read from the file or,
if it lacks them, from the constants of the data set below. Files with total energies are
recognized, because their energies are a hundred times larger, and are not changed.

The optional `summary.csv` of the release (unpacked, next to the database) has additional labels of
each conformation, identified by "MOSES id" and "CONFORMER id": "DFT TOTAL ENERGY", "DFT HOMO", "DFT
LUMO", "DFT HOMO-LUMO GAP" in hartree and "DFT TOTAL DIPOLE" in debye. The unit of the dipole is not
stated there; it is inferred from typical dipoles of such molecules. The dipole vectors are not
read, because it is not documented that they share the frame of the positions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase import units
from ase.data import atomic_numbers, chemical_symbols

from mlip_jax.datasets import options, reader
from mlip_jax.datasets.charges import charge_from_smiles
from mlip_jax.datasets.formats.ase_database import AseDatabase, AseRow, is_ase_database
from mlip_jax.datasets.formats.elements import validate_numbers
from mlip_jax.datasets.formats.nabladft_summary import SummaryTable
from mlip_jax.datasets.identity import molecule_identity
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.structure import Structure

log = logging.getLogger(__name__)
# Energies of isolated atoms (hartree), ωB97X-D/def2-SVP (iodine with its effective core potential),
# as subtracted in the data set.
_ATOM_ENERGIES = {
    "H": -0.5024932583661139,
    "C": -37.79809934247253,
    "N": -54.522414832380626,
    "O": -74.97667809850873,
    "F": -99.61446950401614,
    "P": -341.13941895023964,
    "S": -397.9719278356063,
    "Cl": -459.98864965660516,
    "Br": -2573.8571719614743,
    "I": -297.7564286148722,
}
_KEYS = {"moses_id", "conformation_id"}
_READ = _KEYS | {"smiles", "iteration", "energy", "forces"}


class Reader(reader.Reader):
    """Reader of the energy databases of ∇²DFT. A record is a row, i.e. one conformation.

    Args:
      path: Path of the ASE database.
      summary: Path of the table of additional labels. "auto" uses `summary.csv` next to the
        database if present, "" uses none. Opening the table requires one pass through it.
    """

    LEVEL_OF_THEORY = "ωB97X-D/def2-SVP"
    UNITS = {
        "positions": "Å",
        "energy": "hartree, minus the isolated atoms",
        "forces": "hartree/Å",
        "homo, lumo, gap": "hartree",
        "dipole_moment": "debye",
    }

    def __init__(self, path: str | Path, summary: str = "auto"):
        super().__init__(path)
        summary = options.text("summary", summary)
        self._database = AseDatabase(self.path)
        try:
            self._open(summary)
        except BaseException:
            self._database.close()
            raise

    def _open(self, summary: str) -> None:
        """Check layout and units of the database and find the atom energies and the summary."""
        # The first row shows the layout of the whole file.
        first = next(self._database.rows(range(min(1, len(self._database)))), None)
        if first is None:
            raise DatasetError(f"{self.path}: the database has no rows")
        _check_layout(first, f"{self.path.name}:{first.id}")
        _check_units(self._database.metadata, self.path)
        self._atoms = _atom_energies(self._database.metadata, self.path)
        self.atom_energies = {
            chemical_symbols[z]: float(e) * units.Hartree
            for z, e in enumerate(self._atoms)
            if np.isfinite(e)
        }
        self._subtracted = self._first_subtracted()
        self._summary_path = self._find_summary(summary)
        self._summary: SummaryTable | None = None

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether an ASE database has the keys of ∇²DFT in its first row."""
        if not is_ase_database(path):
            return False
        try:
            with AseDatabase(path) as database:
                return (
                    all(
                        _KEYS <= row.key_value_pairs.keys()
                        for row in database.rows(range(min(1, len(database))))
                    )
                    and len(database) > 0
                )
        except (DatasetError, OSError):
            return False

    def __len__(self) -> int:
        return len(self._database)

    def close(self) -> None:
        self._database.close()
        if self._summary is not None:
            self._summary.close()

    def files(self) -> list[Path]:
        return [self.path, *([self._summary_path] if self._summary_path else [])]

    def read(self, records: range, report: ReadReport) -> Iterator[Structure]:
        """Yield the structures of the records.

        The energy is NaN if a row lacks it. The orbital energies are NaN if the summary lacks the
        row.
        """
        if self._summary_path and self._summary is None:
            self._summary = SummaryTable(self._summary_path)
        for record, row in zip(records, self._database.rows(records)):
            report.records += 1
            source = f"{self.path.name}:{row.id}"
            _check_layout(row, source)
            if not np.isfinite(row.positions).all():
                report.skip("positions not finite", source)
                continue
            report.structures += 1
            report.add_unread({*row.key_value_pairs, *row.data, *row.results} - _READ)
            if self._summary is not None:
                report.add_unread(self._summary.unread)
            yield self._structure(row, record, source)

    def _structure(self, row: AseRow, record: int, source: str) -> Structure:
        """Convert a row to a structure in eV and Å."""
        energy = self._total_energy(row, source)
        smiles = str(row.key_value_pairs.get("smiles", ""))
        properties = {}
        if self._summary is not None:
            properties = self._summary.labels(row, energy, source)
        return Structure(
            numbers=validate_numbers(row.numbers, source),
            positions=row.positions,
            energy=energy * units.Hartree,
            forces=_forces(row, source),
            charge=float(charge_from_smiles(smiles)),
            molecule=molecule_identity(smiles) or f"moses {row.key_value_pairs['moses_id']}",
            smiles=smiles,
            record=record,
            source=source,
            properties=properties,
        )

    def _total_energy(self, row: AseRow, source: str) -> float:
        """Return the total energy of a row (hartree), NaN if missing."""
        stored = _energy(row, source)
        if math.isnan(stored):
            return stored
        subtracted = self._is_subtracted(row, source)
        if subtracted != self._subtracted:
            raise DatasetError(
                f"{source}: the energy {stored} hartree {'excludes' if subtracted else 'includes'} "
                "the isolated atoms, unlike the first energy of the file. Do not mix files with both "
                "conventions."
            )
        return stored + (self._sum_of_atoms(row, source) if subtracted else 0.0)

    def _first_subtracted(self) -> bool:
        """Return whether the first known energy is stored minus those of the isolated atoms."""
        for row in self._database.rows(range(len(self._database))):
            source = f"{self.path.name}:{row.id}"
            if not math.isnan(_energy(row, source)):
                return self._is_subtracted(row, source)
        return True  # there are no energies

    def _is_subtracted(self, row: AseRow, source: str) -> bool:
        """Return whether the energy of a row is stored minus the energies of the isolated atoms."""
        stored, atoms = _energy(row, source), self._sum_of_atoms(row, source)
        # The binding energy of a molecule is 0.1 to 2 % of its total energy.
        if abs(stored) < 0.3 * abs(atoms):
            return True
        if abs(stored / atoms - 1) < 0.3:
            return False
        raise DatasetError(
            f"{source}: energy {stored}: expected the total energy of these atoms in "
            f"hartree (about {atoms:.1f}) or the total energy minus the isolated atoms. Check its "
            "unit."
        )

    def _sum_of_atoms(self, row: AseRow, source: str) -> float:
        """Return the sum of the energies of the isolated atoms (hartree)."""
        # The table of atom energies may end before the heaviest element.
        known = (row.numbers >= 0) & (row.numbers < len(self._atoms))
        energies = self._atoms[np.where(known, row.numbers, 0)]
        missing = row.numbers[~known | ~np.isfinite(energies)]
        if len(missing):
            raise DatasetError(
                f"{source}: the energy of an isolated {_symbol(missing[0])} atom is "
                f"unknown, so the total energy is undefined; known: {', '.join(self.atom_energies)}"
            )
        return float(energies.sum())

    def _find_summary(self, summary: str) -> Path | None:
        """Return the path of the summary, or None if there is none."""
        if summary == "auto":
            default = self.path.parent / "summary.csv"
            if not default.is_file() and default.with_name("summary.csv.gz").is_file():
                log.warning("%s.gz is not used; unpack it for orbital energies", default)
            return default if default.is_file() else None
        if not summary:
            return None
        if not Path(summary).is_file() or summary.endswith(".gz"):
            raise DatasetError(
                f"{summary}: no such uncompressed table. Give summary.csv of the release (after "
                f"gzip -d), {options.as_flag('summary', 'FILE')}, or '' for none."
            )
        return Path(summary)


def _check_layout(row: AseRow, source: str) -> None:
    """Raise DatasetError if a row does not have the layout of ∇²DFT."""
    if not row.key_value_pairs.keys() >= _KEYS or "energy" not in row.data:
        raise DatasetError(
            f"{source}: expected 'moses_id' and 'conformation_id' with 'energy', as in ∇²DFT; "
            f"found keys {sorted(row.key_value_pairs)} and data {sorted(row.data)}. To read other "
            "ASE databases, set config.data.reader=ase."
        )


def _check_units(metadata: dict, path: Path) -> None:
    """Raise DatasetError if the database states other units than those of ∇²DFT."""
    stored = {
        "distance": metadata.get("_distance_unit", "Ang"),
        "energy": "Hartree",
        "forces": "Hartree/Ang",
    }
    stored |= {k: v for k, v in (metadata.get("_property_unit_dict") or {}).items() if k in stored}
    for name, unit in {"distance": "Ang", "energy": "Hartree", "forces": "Hartree/Ang"}.items():
        if str(stored[name]).lower() != unit.lower():
            raise DatasetError(f"{path}: {name} is in {stored[name]!r}, expected {unit!r}")


def _atom_energies(metadata: dict, path: Path) -> np.ndarray:
    """Return the energies of isolated atoms (hartree) by atomic number, NaN if unknown."""
    refs = (metadata.get("atomrefs") or {}).get("energy")
    if refs is None:
        refs = np.zeros(119)
        for symbol, energy in _ATOM_ENERGIES.items():
            refs[atomic_numbers[symbol]] = energy
    refs = np.asarray(refs, np.float64)
    if refs.ndim == 2 and refs.shape[1] == 1:
        refs = refs[:, 0]
    if refs.ndim != 1 or len(refs) > 119:
        raise DatasetError(
            f"{path}: atomrefs have shape {refs.shape}, expected one number by atomic number"
        )
    return np.where(refs == 0, np.nan, refs)


def _energy(row: AseRow, source: str) -> float:
    """Return the stored energy of a row (hartree)."""
    values = _numbers(row, "energy", source).ravel()
    if len(values) != 1:
        raise DatasetError(f"{source}: energy has {len(values)} values, expected 1")
    return float(values[0])


def _forces(row: AseRow, source: str) -> np.ndarray:
    """Return the forces of a row (eV/Å), shape (n, 3), NaN if missing."""
    if row.data.get("forces") is None:
        return np.full(row.positions.shape, np.nan)
    forces = _numbers(row, "forces", source)
    if forces.shape != row.positions.shape:
        raise DatasetError(
            f"{source}: forces have shape {forces.shape}, expected {row.positions.shape}"
        )
    return forces * units.Hartree


def _numbers(row: AseRow, name: str, source: str) -> np.ndarray:
    """Return a label as float64. Raise DatasetError if it is not numeric."""
    try:
        return np.asarray(row.data[name], np.float64)
    except (TypeError, ValueError) as error:
        raise DatasetError(
            f"{source}: {name} is not numeric ({error}); the row is corrupted"
        ) from error


def _symbol(number: int) -> str:
    """Return the symbol of an element, or its number if there is none."""
    return chemical_symbols[number] if 0 < number < len(chemical_symbols) else str(number)
