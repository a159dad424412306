"""Reader of PubChemQCR and PubChemQCR-S: relaxation trajectories of molecules in an LMDB file.

Layout (huggingface.co/datasets/divelab/PubChemQCR, its database.md; Fu et al., arXiv:2506.23008):

    key     CID (PubChem's number of the compound) as 9 digits: b"000015111"
    value   gzip-compressed pickle of {"pm3": [...], "hf": [...], "DFT_1st": [...],
            "DFT_2nd": [...]}: the stages of one relaxation, each a list of snapshots in the order
            of the steps, an empty list, or None

A snapshot is

    coordinates  [{"atom": "C", "charge": 6.0, "x": ..., "y": ..., "z": ...}, ...]
                 Å; charge: of the nucleus
    energy       hartree
    gradient     [{"atom": "C", "charge": 6.0, "dx": ..., "dy": ..., "dz": ...}, ...]
                 hartree/bohr: a GRADIENT

Steps from SMASH have no "charge". Steps from GAMESS may have symbols in capitals ("CL"). The last
snapshot of a stage and the first one of the next stage have the same positions at two levels of
theory. The DFT stages are B3LYP/6-31G* (PubChemQC: Nakata and Shimazaki, J. Chem. Inf. Model. 57,
1300, 2017).

A file summary.csv next to the LMDB file may have the columns cid, smiles, homo_ev, lumo_ev, gap_ev
and dipole_e_bohr. These properties belong to the last snapshot of DFT_1st and are NaN for all
others.
"""

from __future__ import annotations

import csv
import itertools
import operator
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ase import units

from mlip_jax.config import ConfigError
from mlip_jax.datasets import options, reader
from mlip_jax.datasets.charges import charge_from_smiles
from mlip_jax.datasets.formats import safe_pickle
from mlip_jax.datasets.formats.lmdb_file import LmdbFile, TruncatedFileError, page_size
from mlip_jax.datasets.formats.pickle_messages import short_keys
from mlip_jax.datasets.identity import molecule_identity
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.structure import Structure

STAGES = {"pm3": "PM3", "hf": "HF", "DFT_1st": "B3LYP/6-31G*", "DFT_2nd": "B3LYP/6-31G*"}
_COLUMNS = {
    "homo_ev": ("homo", 1.0),
    "lumo_ev": ("lumo", 1.0),
    "gap_ev": ("gap", 1.0),
    "dipole_e_bohr": ("dipole_moment", units.Bohr),
}
_SUMMARY_STAGE = "DFT_1st"
_SNAPSHOT = {"coordinates", "energy", "gradient"}
_SYMBOL = operator.itemgetter("atom")
_MAX_RECORD = 2**26  # bytes after decompression; the longest of 3,000 trajectories takes 260 kB


class Reader(reader.Reader):
    """Reader of PubChemQCR files. A record is a molecule with its stages.

    Args:
      path: Path of the LMDB file.
      stages: Stages to read. The stage is the `subset` of a structure. `conformer` numbers the
        snapshots of these stages consecutively, before some of them are skipped.
      stride: Interval between the snapshots that are read per stage. The first and the last one are
        always read.
      max_snapshots: Maximum number of snapshots per stage, evenly spaced from the first to the last
        one. 1 reads only the last one.
      summary: Path of the table of SMILES and properties. "auto" uses summary.csv next to the file
        if present, "" uses none.
      level_of_theory: Level of theory of the labels, which the file does not state. "" uses the
        published one.
    """

    LEVEL_OF_THEORY = STAGES["DFT_1st"]
    UNITS = {"positions": "Å", "energy": "hartree", "forces": "hartree/bohr, gradient"}

    def __init__(
        self,
        path: str | Path,
        *,
        stages: Sequence[str] = ("DFT_1st",),
        stride: int = 1,
        max_snapshots: int | None = None,
        summary: str = "auto",
        level_of_theory: str = "",
    ):
        super().__init__(path)
        self._stages = options.texts("stages", stages)
        unknown = [s for s in self._stages if s not in STAGES]
        if unknown or not self._stages or len(set(self._stages)) < len(self._stages):
            raise ConfigError(
                f"stages must be some of {', '.join(STAGES)}; received {self._stages}"
            )
        self._stride = options.positive_integer("stride", stride)
        self._max_snapshots = options.positive_integer(
            "max_snapshots", max_snapshots, allow_none=True
        )
        published = ", ".join(dict.fromkeys(STAGES[s] for s in self._stages))
        self.level_of_theory = options.text("level_of_theory", level_of_theory) or published
        if not level_of_theory:
            self.notes.append(
                f"{self.path.name} does not state its level of theory; {published} is assumed, as "
                f"published. To change it, set {options.as_flag('level_of_theory', '...')}"
            )
        self._summary_path = _find_summary(self.path, options.path("summary", summary))
        self._summary, self._names, self._unread = (
            _read_summary(self._summary_path) if self._summary_path else ({}, (), ())
        )
        if not self._summary_path:
            self.notes.append(
                f"{self.path.name} contains no charges or SMILES: all molecules are treated as "
                "neutral, and stereoisomers count as different molecules. Add the table of the release that has them, "
                f"{options.as_flag('summary', 'FILE')}"
            )
        self._environment = LmdbFile(self.path)
        self._length = self._environment.length
        if not self._length:
            self.close()
            raise DatasetError(f"{self.path}: the file contains no trajectories")
        self._keys: np.ndarray | None = None

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether an LMDB file has numbers as keys and gzip-compressed values.

        It is also True if the file is truncated; opening it then reports the problem.
        """
        try:
            if page_size(path) is None:
                return False
            environment = LmdbFile(path)
        except TruncatedFileError:
            return True  # opening the file then raises an error with the remedy
        except (DatasetError, OSError):
            return False
        try:
            key, value = environment.first()
            return key.isdigit() and value[:2] == b"\x1f\x8b"
        except DatasetError:
            return False
        finally:
            environment.close()

    def __len__(self) -> int:
        return self._length

    def files(self) -> list[Path]:
        return [self.path] + ([self._summary_path] if self._summary_path else [])

    def close(self) -> None:
        self._environment.close()

    def read(self, records: range, report: ReadReport) -> Iterator[Structure]:
        """Yield the structures of the records.

        Stages without snapshots and snapshots with positions that are not finite are skipped and
        counted.
        """
        for record in records:
            report.records += 1
            key = self._key(record)
            source = f"{self.path.name}:{key.decode('latin-1')}"
            stages = _unpack(self._environment.get(key, source), source)
            yield from self._read_stages(stages, _cid(key, source), source, record, report)

    def _key(self, record: int) -> bytes:
        """Return the key of a record. The keys are read on first use."""
        if self._keys is None:
            self._keys = self._environment.keys()
        return bytes(self._keys[record])

    def _read_stages(self, stages, cid, source, record, report) -> Iterator[Structure]:
        """Yield the chosen snapshots of a record."""
        smiles, *final = self._summary.get(cid, ("", *(np.nan for _ in self._names)))
        unknown = dict.fromkeys(self._names, float("nan"))
        unread = set(self._unread)
        molecule, charge = molecule_identity(smiles) or str(cid), float(charge_from_smiles(smiles))
        begin = 0
        for stage in self._stages:
            snapshots = stages.get(stage)
            if not isinstance(snapshots, list | None):
                raise DatasetError(
                    f"{source}: stage {stage} is {type(snapshots).__name__}, expected a list of "
                    "snapshots or None"
                )
            if not snapshots:
                report.skip(f"no snapshots of {stage}", source)
                continue
            for step in self._choose_steps(len(snapshots)):
                where = f"{source}/{stage}#{step}"
                numbers, positions, energy, forces = _read_snapshot(snapshots[step], where)
                if not np.isfinite(positions).all():
                    report.skip("positions not finite", where)
                    continue
                unread.update(map(str, snapshots[step].keys() - _SNAPSHOT))
                # The table describes the end of one stage only.
                is_final = stage == _SUMMARY_STAGE and step == len(snapshots) - 1
                report.structures += 1
                yield Structure(
                    numbers=numbers,
                    positions=positions,
                    energy=energy,
                    forces=forces,
                    molecule=molecule,
                    charge=charge,
                    smiles=smiles,
                    conformer=begin + step,
                    record=record,
                    subset=stage,
                    source=source,
                    properties=dict(zip(self._names, final)) if is_final else unknown,
                )
            begin += len(snapshots)
        report.add_unread(unread)

    def _choose_steps(self, count: int) -> list[int]:
        """Return the indices of the snapshots to read in a stage of `count` snapshots."""
        steps = list(range(0, count, self._stride))
        if steps[-1] != count - 1:
            steps.append(count - 1)
        if self._max_snapshots == 1:
            return steps[-1:]
        if self._max_snapshots is not None and len(steps) > self._max_snapshots:
            steps = [
                steps[i]
                for i in np.linspace(0, len(steps) - 1, self._max_snapshots).round().astype(int)
            ]
        return steps


def _cid(key: bytes, source: str) -> int:
    """Return the compound number of a key."""
    if not key.isdigit():
        raise DatasetError(f"{source}: the key is not a number; expected a CID, as in PubChemQCR")
    return int(key)


def _unpack(value: bytes, source: str) -> dict:
    """Return the stages of a compressed record."""
    decompressor = zlib.decompressobj(wbits=31)
    try:
        data = decompressor.decompress(value, _MAX_RECORD)
    except zlib.error as error:
        raise DatasetError(
            f"{source}: the record is not gzip or is corrupted ({error}). Is this a PubChemQCR "
            "file?"
        ) from error
    if not decompressor.eof:
        if len(data) >= _MAX_RECORD:
            raise DatasetError(
                f"{source}: the record has more than {_MAX_RECORD} bytes when decompressed, more "
                "than any trajectory. The file is corrupted or malicious."
            )
        raise DatasetError(
            f"{source}: the record is truncated. Download the file again or recreate it."
        )
    stages = safe_pickle.loads(data, allowed={}, source=source)
    if not isinstance(stages, dict) or not set(stages) & set(STAGES):
        raise DatasetError(
            f"{source}: expected a dict with {', '.join(STAGES)}; found "
            f"{short_keys(stages) if isinstance(stages, dict) else type(stages).__name__}"
        )
    return stages


def _read_snapshot(snapshot, source) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """Return atomic numbers, positions (Å), energy (eV) and forces (eV/Å) of a snapshot.

    A missing energy or gradient gives NaN.
    """
    try:
        numbers, positions = _columns(snapshot["coordinates"], "x", "y", "z", source=source)
        energy = snapshot.get("energy")
        energy = float("nan") if energy is None else float(energy) * units.Hartree
        if not snapshot.get("gradient"):
            return numbers, positions, energy, np.full_like(positions, np.nan)
        of_gradient, gradient = _columns(snapshot["gradient"], "dx", "dy", "dz", source=source)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"{source}: not a snapshot with coordinates (atom, x, y, z), energy and gradient "
            f"(atom, dx, dy, dz): {type(error).__name__}: {error}"
        ) from error
    if not np.array_equal(numbers, of_gradient):
        raise DatasetError(
            f"{source}: the atoms of coordinates and of gradient differ: {numbers.tolist()} and "
            f"{of_gradient.tolist()}; expected the same atoms in the same order"
        )
    return numbers, positions, energy, -gradient * (units.Hartree / units.Bohr)


def _columns(atoms, *names, source) -> tuple[np.ndarray, np.ndarray]:
    """Return atomic numbers, shape (n,), and named values per atom, shape (n, len(names))."""
    numbers = reader.symbols_to_numbers(map(_SYMBOL, atoms), source)
    # fromiter accepts only single numbers. numpy.array would walk through a list in place of a
    # number, which can be endless.
    rows = map(operator.itemgetter(*names), atoms)
    values = np.fromiter(itertools.chain.from_iterable(rows), np.float64).reshape(-1, len(names))
    if not len(numbers) or not numbers.all():
        raise DatasetError(
            f"{source}: a snapshot has {len(numbers)} atoms, {int((numbers == 0).sum())} of them "
            "without a nucleus"
        )
    return numbers, values


def _find_summary(path: Path, summary: str) -> Path | None:
    """Return the path of the summary, or None if there is none."""
    if summary == "auto":
        default = path.parent / "summary.csv"
        return default if default.is_file() else None
    if summary and not Path(summary).is_file():
        raise DatasetError(
            f"{summary}: no such file. Give the path of the table as option summary, "
            f"{options.as_flag('summary', '...')}, or '' for none."
        )
    return Path(summary) if summary else None


def _read_summary(path: Path) -> tuple[dict[int, tuple], tuple[str, ...], tuple[str, ...]]:
    """Return (SMILES, properties ...) by CID, the properties and the columns that are not read."""
    with open(path, newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        if "cid" not in (table.fieldnames or ()):
            raise DatasetError(
                f"{path}: expected a table with the column cid; found {table.fieldnames}. Give "
                "another path as option summary, or '' for none."
            )
        columns = [c for c in _COLUMNS if c in table.fieldnames]
        rows = {}
        try:
            for row in table:
                rows[int(row["cid"])] = (
                    row.get("smiles") or "",
                    *(float(row[c] or "nan") * _COLUMNS[c][1] for c in columns),
                )
        except (ValueError, TypeError, UnicodeDecodeError, csv.Error) as error:
            raise DatasetError(f"{path}: line {table.line_num}: {error}") from error
    unread = (c for c in table.fieldnames if c and c not in {*columns, "cid", "smiles"})
    return rows, tuple(_COLUMNS[c][0] for c in columns), tuple(unread)
