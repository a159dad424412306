"""Reader of Molecule3D: 3,899,647 ground-state geometries in SDF files and a table of properties.

Layout (github.com/divelab/MoleculeX; Xu et al., arXiv 2110.01717, 2021), the folder `raw`:

    combined_mols_0_to_1000000.sdf, ..., combined_mols_3000000_to_3899647.sdf
        V2000 mol blocks with all hydrogens, Å; file names contain the numbers of the molecules
    properties.csv
        one line for each molecule in the same order, with a header:
        cid                       PubChem's number of the compound
        dipole x, dipole y, dipole z     debye
        homo, lumo, homolumogap   eV
        scf energy                eV, total
    random_split_inds.json, scaffold_split_inds.json
        {"train": [molecule, ...], "valid": [...], "test": [...]}

The repository does not state the units. Its scripts created the table with cclib, which uses eV and
debye. The release agrees with that: its highest scf energy is -31.99, the energy of H2 in eV. The
units are options nevertheless, and the scale of the energies is checked.

A record is a molecule. Records are numbered across all files in the order of their ranges. There
are no forces, because each geometry is a minimum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase import units
from ase.data import atomic_numbers

from mlip_jax.datasets import options, reader
from mlip_jax.datasets.formats.molecule3d_files import PropertyTable, SdfFile, sdf_files
from mlip_jax.datasets.identity import molecule_identity
from mlip_jax.datasets.isolation.molecules import is_safe_mol_block
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.structure import Structure

_ENERGY_UNITS = {"eV": 1.0, "hartree": units.Hartree}
_DIPOLE_UNITS = {"debye": units.Debye, "e*Ang": 1.0, "e*bohr": units.Bohr}
_SPLITS = ("random", "scaffold")
_ROUNDING = 1e-3  # tolerance between the gap and LUMO - HOMO, in the unit of the table
_CHARGE_CODES = {1: 3, 2: 2, 3: 1, 5: -1, 6: -2, 7: -3}
_ISOTOPES = {"D": 1, "T": 1}


class Reader(reader.Reader):
    """Reader of the raw files of Molecule3D.

    Args:
      path: The folder `raw` or its parent. SDF files may be missing; records are then numbered
        across the existing ones.
      split: Split that `official_split` returns: "random" or "scaffold".
      smiles: Whether to derive SMILES with RDKit (about 1 ms per molecule). The SMILES is "" if
        RDKit does not accept the molecule.
      energy_unit: Unit of the scf energy: "eV" or "hartree".
      orbital_unit: Unit of the orbital energies: "eV" or "hartree".
      dipole_unit: Unit of the dipole moment: "debye", "e*Ang" or "e*bohr".
    """

    LEVEL_OF_THEORY = "B3LYP/6-31G*"
    UNITS = {"positions": "Å", "energy": "eV", "homo, lumo, gap": "eV", "dipole": "debye"}

    def __init__(
        self,
        path: str | Path,
        *,
        split: str = "random",
        smiles: bool = False,
        energy_unit: str = "eV",
        orbital_unit: str = "eV",
        dipole_unit: str = "debye",
    ):
        super().__init__(path)
        self._energy = _option("energy_unit", energy_unit, _ENERGY_UNITS)
        self._orbital = _option("orbital_unit", orbital_unit, _ENERGY_UNITS)
        self._dipole = _option("dipole_unit", dipole_unit, _DIPOLE_UNITS)
        self._split = _option("split", split, {name: name for name in _SPLITS})
        self._smiles = options.flag("smiles", smiles)
        if not self._smiles:
            self.notes.append(
                "molecules are identified by the number of their compound, so stereoisomers count "
                f"as different molecules. To avoid it, set {options.as_flag('smiles', 'True')}"
            )
        folder = self.path / "raw" if (self.path / "raw").is_dir() else self.path
        self._parts = [SdfFile(p, *span) for span, p in sorted(sdf_files(folder).items())]
        if not self._parts or not (folder / "properties.csv").is_file():
            names = sorted(p.name for p in folder.iterdir())[:20] if folder.is_dir() else "a file"
            raise DatasetError(
                f"{self.path}: expected a folder with combined_mols_*_to_*.sdf and properties.csv, "
                f"as in Molecule3D; found {names}"
            )
        for before, after in zip(self._parts, self._parts[1:]):
            if after.start < before.stop:
                raise DatasetError(
                    f"{after.path} begins at molecule {after.start}, but {before.path.name} "
                    f"extends to {before.stop - 1}"
                )
        self._starts = np.cumsum([0] + [len(p) for p in self._parts])
        self._table = PropertyTable(folder / "properties.csv")
        try:
            self._check_table()
        except BaseException:
            self.close()
            raise

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether a folder, or its subfolder `raw`, contains the table and SDF files."""
        try:
            folder = path / "raw" if (path / "raw").is_dir() else path
            return (folder / "properties.csv").is_file() and bool(sdf_files(folder))
        except (OSError, DatasetError):
            return False

    def __len__(self) -> int:
        return int(self._starts[-1])

    def close(self) -> None:
        self._table.close()
        for part in self._parts:
            part.close()

    def files(self) -> list[Path]:
        splits = (self._table.path.with_name(f"{name}_split_inds.json") for name in _SPLITS)
        return (
            [p.path for p in self._parts] + [self._table.path] + [p for p in splits if p.is_file()]
        )

    def read(self, records: range, report: ReadReport) -> Iterator[Structure]:
        """Yield the structures of the records. Empty table cells are NaN.

        Molecules without atoms are skipped.
        """
        for record in records:
            report.records += 1
            part, molecule = self._locate(record)
            source = f"{part.path.name}:{molecule}"
            structure = self._structure(part.block(molecule - part.start), molecule, record, source)
            if not len(structure):
                report.skip("no atoms", source)
                continue
            report.structures += 1
            report.add_unread(self._table.unread)
            yield structure

    def official_split(self) -> dict[str, np.ndarray] | None:
        """Return the chosen split of the release; None if the folder has no split files.

        Raises:
          DatasetError: The chosen split file is missing or corrupted, or contains molecules whose
            SDF files are missing.
        """
        if not any(
            self._table.path.with_name(f"{name}_split_inds.json").is_file() for name in _SPLITS
        ):
            return None
        path = self._table.path.with_name(f"{self._split}_split_inds.json")
        try:
            stored = parse_json(read_bytes(path))
            parts = {name: np.array(stored[name], np.int64) for name in ("train", "valid", "test")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{path}: cannot be read as {{'train': [...], 'valid': [...], 'test': [...]}} "
                f"({type(error).__name__}: {error})"
            ) from error
        return {name: self._records(molecules, path) for name, molecules in parts.items()}

    def _locate(self, record: int) -> tuple[SdfFile, int]:
        """Return the file of a record and the number of its molecule in the whole data set."""
        at = int(np.searchsorted(self._starts, record, "right")) - 1
        return self._parts[at], self._parts[at].start + record - int(self._starts[at])

    def _records(self, molecules: np.ndarray, path: Path) -> np.ndarray:
        """Return the record numbers of molecules, given by their numbers in the whole data set."""
        firsts = np.array([p.start for p in self._parts])
        at = np.searchsorted(firsts, molecules, "right") - 1
        ends = np.array([p.stop for p in self._parts])
        missing = (at < 0) | (molecules >= ends[at])
        if missing.any():
            raise DatasetError(
                f"{path}: {int(missing.sum())} of its {len(molecules)} molecules, the first number "
                f"{molecules[missing][0]}, are in none of "
                f"{', '.join(p.path.name for p in self._parts)}. Add the missing SDF files, or "
                "choose another data.split than 'official'."
            )
        return self._starts[:-1][at] + molecules - firsts[at]

    def _check_table(self) -> None:
        """Raise DatasetError if the table is too short or its energies do not fit the molecules."""
        needed = self._parts[-1].stop
        if len(self._table) < needed:
            raise DatasetError(
                f"{self._table.path}: has {len(self._table)} molecules, but "
                f"{self._parts[-1].path.name} ends at {needed}. The table is truncated or belongs "
                "to other files."
            )
        # Core electrons contribute most of a total energy, so the elements determine its scale
        # (Thomas-Fermi: -0.7687 Z^(7/3) hartree per atom).
        for record in range(min(10, len(self))):
            part, molecule = self._locate(record)
            numbers = _parse(part.block(molecule - part.start), f"{part.path.name}:{molecule}")[0]
            energy = self._table.row(molecule)[1]["scf energy"] * self._energy
            scale = -0.7687 * units.Hartree * float((numbers.astype(float) ** (7 / 3)).sum())
            if (
                len(numbers)
                and numbers.max() <= 18
                and math.isfinite(energy)
                and not 0.3 < energy / scale < 2
            ):
                raise DatasetError(
                    f"{part.path.name}:{molecule}: a total energy of {energy:.4g} eV does not fit "
                    f"these atoms (about {0.7 * scale:.4g} eV): the table has another unit, or "
                    "another order than the SDF files. Set the unit, "
                    f"{options.as_flag('energy_unit', 'hartree')}."
                )

    def _structure(self, block: bytes, molecule: int, record: int, source: str) -> Structure:
        """Return the structure of a mol block and its table row, after checking their identity."""
        numbers, positions, charge, title = _parse(block, source)
        cid, row = self._table.row(molecule)
        named = re.fullmatch(r"(?:CID\D?)?0*(\d+)", title, re.IGNORECASE)
        if named and cid and int(named[1]) != cid:
            raise DatasetError(
                f"{source}: the SDF file has compound {named[1]}, but line {molecule + 2} of "
                f"{self._table.path.name} is compound {cid}: the orders differ"
            )
        homo, lumo, gap = row["homo"], row["lumo"], row["homolumogap"]
        if abs(gap - (lumo - homo)) > _ROUNDING:
            raise DatasetError(
                f"{source}: the gap is {gap}, but LUMO - HOMO is {lumo} - {homo}: the columns of "
                f"{self._table.path.name} are mislabeled"
            )
        smiles = _smiles(block) if self._smiles else ""
        dipole = np.array([row[f"dipole {x}"] for x in "xyz"]) * self._dipole
        return Structure(
            numbers=numbers,
            positions=positions,
            energy=row["scf energy"] * self._energy,
            charge=charge,
            molecule=molecule_identity(smiles) or (str(cid) if cid else f"molecule {molecule}"),
            smiles=smiles,
            record=record,
            source=source,
            properties={
                "homo": homo * self._orbital,
                "lumo": lumo * self._orbital,
                "gap": gap * self._orbital,
                "dipole": dipole,
            },
        )


def _option(name: str, value: str, known: dict):
    """Return the value of an option in a table. Raise ConfigError if it is not one of the keys."""
    return known[options.one_of(name, value, list(known))]


def _parse(block: bytes, source: str) -> tuple[np.ndarray, np.ndarray, int, str]:
    """Return atomic numbers, positions (Å), total charge and title of a V2000 mol block."""
    lines = block.decode("utf-8", "replace").splitlines()
    version = lines[3][33:39].strip() if len(lines) > 3 else ""
    if version != "V2000":
        raise DatasetError(
            f"{source}: expected a V2000 mol block, found version {version!r} in line 4: "
            f"{lines[3][:60] if len(lines) > 3 else ''!r}"
        )
    try:
        count = int(lines[3][:3])
        atoms = lines[4 : 4 + count]
        if len(atoms) < count:
            raise ValueError(f"{count} atoms, but {len(lines)} lines")
        positions = np.array(
            [(line[:10], line[10:20], line[20:30]) for line in atoms], np.float64
        ).reshape(-1, 3)
        if not np.isfinite(positions).all():
            raise ValueError("positions that are not finite")
        symbols = [line[31:34].strip() for line in atoms]
        numbers = np.array([_ISOTOPES.get(s) or atomic_numbers[s] for s in symbols], np.int32)
        if not numbers.all():
            raise ValueError("a dummy atom")
        return numbers, positions, _charge(atoms, lines[4 + count :]), lines[0].strip()
    except (ValueError, KeyError) as error:
        raise DatasetError(
            f"{source}: the mol block is corrupted ({type(error).__name__}: {error})"
        ) from error


def _charge(atoms: list[str], others: list[str]) -> int:
    """Return the sum of the formal charges. `M  CHG` lines replace the codes of atom lines."""
    charges = [line for line in others if line.startswith("M  CHG")]
    if charges:
        return sum(int(c) for line in charges for c in line[9:].split()[1::2])
    return sum(_CHARGE_CODES.get(int(line[36:39].strip() or 0), 0) for line in atoms)


def _smiles(block: bytes) -> str:
    """Return the SMILES of a mol block without explicit hydrogens, "" if RDKit rejects it."""
    try:
        from rdkit import Chem, RDLogger
    except ImportError as error:
        raise DatasetError(
            "the option smiles requires RDKit: pip install 'mlip-flax[data]'"
        ) from error
    RDLogger.DisableLog("rdApp.*")
    text = block.decode("utf-8", "replace")
    molecule = Chem.MolFromMolBlock(text, removeHs=True) if is_safe_mol_block(text) else None
    return "" if molecule is None else Chem.MolToSmiles(molecule)
