"""GEOM: conformers of drug-like molecules and of QM9's, as the RDKit pickles or the crude MessagePack files.

Layout (Axelrod and Gómez-Bombarelli, Sci. Data 9, 185, 2022; doi.org/10.7910/DVN/JNGTDF; tutorials of
github.com/learningmatter-mit/geom):

    rdkit_folder/summary_drugs.json, summary_qm9.json   {SMILES: {"pickle_path": "drugs/....pickle", "charge": 0, ...}}
    rdkit_folder/drugs/*.pickle, qm9/*.pickle           one molecule each, as below, with "smiles"
    drugs_crude.msgpack, qm9_crude.msgpack              a stream of maps {SMILES: molecule} of about 1000 molecules

and a molecule is a dict with

    charge              e
    ensembleenergy, ensemblefreeenergy   kcal/mol;  ensembleentropy  cal/(mol K);  lowestenergy  hartree
    totalconfs, uniqueconfs, temperature, ...
    conformers          [{"totalenergy": hartree, "relativeenergy": kcal/mol above the lowest, "degeneracy": rotamers,
                        "boltzmannweight": ..., "geom_id": ..., "set": ..., and "rd_mol": an RDKit molecule with one
                        conformer in Å, or "xyz": [[atomic number, x, y, z], ...] in Å}, ...], in NO certain order

A molecule lacks what was not computed for it. There are no forces. Labels are GFN2-xTB (CREST). Conformers can have
reacted on the way: the bonds of an rd_mol need not be those of the SMILES.

In the pickles, which need the package rdkit, an RDKit molecule is a byte string. It is taken out by the restricted
unpickler of datasets/safe_pickle.py and given to RDKit's own parser. That one runs no code of the file, but it is not
made for damaged input: wrong bytes inside a molecule can end the process instead of raising. The MessagePack files
have no such part.
"""

from __future__ import annotations

import gzip
import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase import units

from mlip_jax.datasets import archives, options, reader, safe_pickle
from mlip_jax.datasets.elements import checked_numbers
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.readers.spice import charge_from_smiles
from mlip_jax.structure import Structure

_KCAL = units.kcal / units.mol
# name here: (name in the file, eV per unit there)
_OF_MOLECULE = {"ensemble_energy": ("ensembleenergy", _KCAL), "ensemble_free_energy": ("ensemblefreeenergy", _KCAL),
                "ensemble_entropy": ("ensembleentropy", _KCAL / 1000)}
_OF_CONFORMER = {"energy_relative": ("relativeenergy", _KCAL), "boltzmann_weight": ("boltzmannweight", 1.0),
                 "degeneracy": ("degeneracy", 1.0)}
_HEAD = 1 << 16  # bytes in which the first molecule's key "conformers" stands
_MAX_ATOMS = 10_000  # of a molecule; the largest of GEOM has 181
_MAX_MOLECULE = 1 << 26  # bytes in MessagePack; 7,000 conformers of 100 atoms take 25 MB
_READ_ERRORS = (OSError, EOFError, tarfile.TarError, zlib.error)


class Reader(reader.Reader):
    """GEOM: the folder of pickles, a folder of pickles without summary, one pickle, or a crude MessagePack file.

    A record is a molecule. MessagePack files (`.msgpack`, also inside `.tar.gz`) are read from front to back, and
    counting the molecules means passing through them once.

    Args:
      subset: Of a folder, read only this part: "drugs" or "qm9". Of a file, the name that its structures get; "": by
        the file's name.
      max_conformers: Of each molecule, only so many of lowest energy (in the order of the file, which need not be
        that of the energies). `conformer` is the place in the file.
      level_of_theory: Of the labels; the files do not say. "": as published.
    """

    LEVEL_OF_THEORY = "GFN2-xTB (CREST)"
    UNITS = {"positions": "Å", "energy": "hartree", "energy_relative": "kcal/mol", "forces": "none"}

    def __init__(self, path: str | Path, subset: str = "", max_conformers: int | None = None,
                 level_of_theory: str = ""):
        super().__init__(path)
        self._max_conformers = options.positive_integer("max_conformers", max_conformers, allow_none=True)
        subset = options.text("subset", subset)
        self.level_of_theory = options.text("level_of_theory", level_of_theory) or self.LEVEL_OF_THEORY
        kind = _kind(self.path)
        if kind is None:
            raise DatasetError(f"{self.path}: not GEOM data. Expected its rdkit_folder (summary_drugs.json, drugs/), "
                               "a folder of its pickles, one pickle, or a crude .msgpack file.")
        self._molecules = (_Folder(self.path, subset) if kind == "folder" else
                           _Pickle(self.path, subset) if kind == "pickle" else _Stream(self.path, kind, subset))
        self.sequential = isinstance(self._molecules, _Stream)

    @classmethod
    def matches(cls, path: Path) -> bool:
        try:
            kind = _kind(path)
            if kind != "folder":
                return kind is not None
            if any(path.glob("summary_*.json")):
                return any((path / s).is_dir() for s in ("drugs", "qm9"))
            first = next(_pickles(path), None)
            return first is not None and _kind(first) == "pickle"
        except _READ_ERRORS:
            return False

    def __len__(self) -> int:
        return len(self._molecules)

    def files(self) -> list[Path]:
        return self._molecules.files()

    def close(self) -> None:
        self._molecules.close()

    def read(self, records: range, report: ReadReport) -> Iterator[Structure]:
        """Molecules without conformers, or whose pickle the summary names but is not there, are skipped."""
        for record, item in self._molecules.read(records):
            report.records += 1
            if item.missing:
                report.skip(item.missing, item.source)
                continue
            yield from self._read_molecule(item, record, report)

    def _read_molecule(self, item: _Molecule, record: int, report: ReadReport) -> Iterator[Structure]:
        molecule, source = item.content, item.source
        if not isinstance(molecule, Mapping) or not isinstance(molecule.get("conformers"), list):
            found = sorted(map(str, molecule)) if isinstance(molecule, Mapping) else type(molecule).__name__
            raise DatasetError(f"{source}: expected a dict with a list 'conformers', as GEOM has it; found {found}")
        conformers = molecule["conformers"]
        if not conformers:
            report.skip("no conformers", source)
        shared = _labels(molecule, _OF_MOLECULE, source)
        smiles = item.smiles or molecule.get("smiles") or ""
        if not isinstance(smiles, str):
            raise DatasetError(f"{source}: smiles is {safe_pickle.shown(smiles)}, expected a text")
        for c in _lowest(conformers, self._max_conformers, source):
            where = f"{source}#{c}"
            numbers, positions, charge = _atoms(conformers[c], where)
            if not np.isfinite(positions).all():
                report.skip("positions not finite", where)
                continue
            if molecule.get("charge") is not None:
                charge = _number(molecule["charge"], "charge", source)
            elif charge is None:
                charge = charge_from_smiles(smiles)
            report.structures += 1
            yield Structure(
                numbers=numbers, positions=positions, energy=_energy(conformers[c], where) * units.Hartree,
                charge=float(charge), molecule=smiles or source, smiles=smiles, conformer=c, record=record,
                subset=item.subset, source=source,
                properties={**_labels(conformers[c], _OF_CONFORMER, where), **shared})


class _Molecule(NamedTuple):
    """A record as it stands in a file."""

    content: object
    smiles: str
    subset: str
    source: str
    missing: str = ""  # why there is no content


# --- What a molecule holds ---

def _lowest(conformers: list, count: int | None, source: str) -> list[int]:
    """Places of the `count` conformers of lowest energy; those without an energy come last."""
    if count is None or len(conformers) <= count:
        return list(range(len(conformers)))
    energies = [_energy(c, f"{source}#{i}") for i, c in enumerate(conformers)]
    return sorted(np.argsort(energies, kind="stable")[:count].tolist())


def _energy(conformer, source) -> float:
    if not isinstance(conformer, Mapping):
        raise DatasetError(f"{source}: a conformer is {type(conformer).__name__}, expected a dict")
    return _number(conformer.get("totalenergy"), "totalenergy", source)


def _labels(holder: Mapping, names: Mapping[str, tuple[str, float]], source: str) -> dict[str, float]:
    if not isinstance(holder, Mapping):
        raise DatasetError(f"{source}: a conformer is {type(holder).__name__}, expected a dict")
    return {name: _number(holder.get(key), key, source) * unit for name, (key, unit) in names.items()}


def _number(value, key, source) -> float:
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise DatasetError(f"{source}: {key} is {safe_pickle.shown(value)}, expected a number")
    try:
        return float(value)
    except OverflowError as error:
        raise DatasetError(f"{source}: {key} is too large a number ({error})") from error


def _atoms(conformer: Mapping, source: str) -> tuple[np.ndarray, np.ndarray, float | None]:
    """Numbers, positions, and the total charge where the conformer itself knows it."""
    if not isinstance(conformer, Mapping):
        raise DatasetError(f"{source}: a conformer is {type(conformer).__name__}, expected a dict")
    if isinstance(conformer.get("rd_mol"), _RDKitMolecule):
        return conformer["rd_mol"].atoms(source)
    if "xyz" not in conformer:
        raise DatasetError(f"{source}: expected a conformer with 'rd_mol' (an RDKit molecule) or 'xyz'; found "
                           f"{sorted(map(str, conformer))}")
    table = _table(conformer["xyz"], source)
    return checked_numbers(table[:, 0], source), table[:, 1:].copy(), None


def _table(rows, source: str) -> np.ndarray:
    """(n, 4) float64. Rows are looked at before numpy is, which would walk through lists of lists without end."""
    if isinstance(rows, np.ndarray):
        rows = np.asarray(rows).tolist() if rows.ndim == 2 else [rows]
    if not isinstance(rows, list | tuple) or not 0 < len(rows) <= _MAX_ATOMS:
        found = f"{len(rows)} rows" if isinstance(rows, list | tuple) else type(rows).__name__
        raise DatasetError(f"{source}: xyz has {found}, expected a list of 1 to {_MAX_ATOMS} rows: atomic number, x, "
                           "y, z")
    for row in rows:
        if not isinstance(row, list | tuple) or len(row) != 4:
            raise DatasetError(f"{source}: xyz has the row {safe_pickle.shown(row)}, expected atomic number, x, y, z")
        if not all(isinstance(cell, float | int | np.integer | np.floating) for cell in row):
            raise DatasetError(f"{source}: xyz has the row {safe_pickle.shown(row)}, which is not four numbers")
    try:
        return np.array(rows, np.float64)
    except (OverflowError, MemoryError) as error:
        raise DatasetError(f"{source}: xyz is not a table of numbers ({error})") from error


class _RDKitMolecule:
    """What a pickle gets in the place of rdkit.Chem.rdchem.Mol: it keeps the byte string for RDKit's parser."""

    __slots__ = ("_binary",)

    def __init__(self, binary):
        if not isinstance(binary, bytes):
            raise TypeError(f"an RDKit molecule of {type(binary).__name__}, expected bytes")
        self._binary = binary

    def __setstate__(self, _):
        """Attributes that a program has hung on the molecule: not needed."""

    def atoms(self, source: str) -> tuple[np.ndarray, np.ndarray, float]:
        try:
            from rdkit import Chem, rdBase
        except ImportError as error:
            raise ImportError("GEOM's pickles need the package rdkit: pip install 'mlip_jax[data]'") from error
        try:
            with rdBase.BlockLogs():
                molecule = Chem.Mol(self._binary)
        except (RuntimeError, ValueError) as error:
            raise DatasetError(f"{source}: RDKit cannot read the molecule ({error}). The file is damaged, or was "
                               "written by a later version of RDKit.") from error
        if molecule.GetNumConformers() != 1 or not molecule.GetNumAtoms():
            raise DatasetError(f"{source}: an RDKit molecule with {molecule.GetNumAtoms()} atoms and "
                               f"{molecule.GetNumConformers()} conformers, expected positions of one")
        numbers = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()], np.int32)
        positions = np.array(molecule.GetConformer().GetPositions(), np.float64)
        return checked_numbers(numbers, source), positions, float(Chem.GetFormalCharge(molecule))


_ALLOWED = {**safe_pickle.NUMPY, ("rdkit.Chem.rdchem", "Mol"): _RDKitMolecule}


def _load_pickle(path: Path, source: str):
    try:
        with open(path, "rb") as file:
            return safe_pickle.load(file, allowed=_ALLOWED, source=source)
    except OSError as error:
        raise DatasetError(f"{source}: the file cannot be read ({error})") from error


# --- Where molecules come from ---

def _kind(path: Path) -> str | None:
    """What a path is, by its first bytes: "folder", "pickle", "msgpack", "tar", or None for something else."""
    if path.is_dir():
        return "folder"
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and b"conformers" in head:
        return "pickle"
    if head[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path) as file:
                first = archives.Members(file).next()
                return "tar" if first is not None and first.name.endswith(".msgpack") else None
        except _READ_ERRORS:
            return None
    return "msgpack" if _starts_a_map_of_texts(head) and b"conformers" in head else None


def _starts_a_map_of_texts(head: bytes) -> bool:
    """MessagePack's codes for a map that is not empty, then for a string."""
    if len(head) < 6:
        return False
    start = 1 if 0x81 <= head[0] <= 0x8f else {0xde: 3, 0xdf: 5}.get(head[0])
    return start is not None and (0xa0 <= head[start] <= 0xbf or head[start] in (0xd9, 0xda, 0xdb))


class _Pickle:
    """One pickle."""

    def __init__(self, path: Path, subset: str):
        self._path, self._subset = path, subset or _subset_of(path.parent.name)

    def __len__(self):
        return 1

    def files(self):
        return [self._path]

    def close(self):
        pass

    def read(self, records: range) -> Iterator[tuple[int, _Molecule]]:
        for record in records:
            yield record, _Molecule(_load_pickle(self._path, self._path.name), "", self._subset, self._path.name)


class _Folder:
    """Pickles, in the order of the summaries; without summaries in the order of their names."""

    def __init__(self, path: Path, subset: str):
        self._path = path
        self._summaries = {p.stem.removeprefix("summary_"): p for p in sorted(path.glob("summary_*.json"))}
        if self._summaries:
            known = self._summaries
            self._entries = [e for name, p in known.items() if subset in ("", name) for e in _read_summary(p, name)]
        else:
            entries = [(str(p.relative_to(path)), "", _subset_of(p.parent.name)) for p in sorted(_pickles(path))]
            known = {e[2] for e in entries}
            self._entries = [e for e in entries if subset in ("", e[2])]
        if subset and subset not in known:
            raise DatasetError(f"{path}: has no subset {subset!r}; found {sorted(filter(None, known)) or 'none'}")
        if not self._entries:
            raise DatasetError(f"{path}: expected GEOM's rdkit_folder, with summary_drugs.json or summary_qm9.json, or "
                               "a folder of its pickles; found neither")
        self._wanted = subset

    def __len__(self):
        return len(self._entries)

    def files(self):
        summaries = [p for name, p in self._summaries.items() if self._wanted in ("", name)]
        pickles = (self._path / e[0] for e in self._entries if e[0])
        return summaries + [p for p in pickles if p.is_file()]

    def close(self):
        pass

    def read(self, records: range) -> Iterator[tuple[int, _Molecule]]:
        for record in records:
            name, smiles, subset = self._entries[record]
            source = f"{self._path.name}:{name or smiles}"
            missing = ("no pickle in the summary" if not name else
                       "" if (self._path / name).is_file() else "pickle is missing")
            content = None if missing else _load_pickle(self._path / name, source)
            yield record, _Molecule(content, smiles, subset, source, missing)


def _pickles(folder: Path) -> Iterator[Path]:
    """Those in a folder and in its folders."""
    yield from folder.glob("*.pickle")
    yield from folder.glob("*/*.pickle")


def _subset_of(name: str) -> str:
    return next((s for s in ("drugs", "qm9") if name.lower().startswith(s)), "")


def _read_summary(path: Path, subset: str) -> list[tuple[str, str, str]]:
    """(path of the pickle in the folder, SMILES, subset) of each molecule."""
    try:
        with open(path, encoding="utf-8") as file:
            summary = json.load(file)
        entries = [(molecule.get("pickle_path") or "", smiles, subset) for smiles, molecule in summary.items()]
    except (ValueError, AttributeError, RecursionError, OSError) as error:
        raise DatasetError(f"{path}: not a summary of GEOM ({type(error).__name__}: {error}); expected "
                           "{SMILES: {'pickle_path': ...}}. It is truncated or something else.") from error
    for name, smiles, _ in entries:
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise DatasetError(f"{path}: {smiles}: pickle_path {name!r} does not lie in the folder")
    return entries


class _Stream:
    """A crude MessagePack file, plain or the first one of a tar.gz, one molecule in memory at a time."""

    def __init__(self, path: Path, kind: str, subset: str):
        self._path, self._kind, self._subset = path, kind, subset or _subset_of(path.name)
        self._length: int | None = None
        self._position, self._items = 0, None

    def __len__(self):
        if self._length is None:
            self._length = sum(1 for _ in self._open(skip=lambda _: True))
        return self._length

    def files(self):
        return [self._path]

    def close(self):
        if self._items is not None:
            self._items.close()
            self._items = None

    def read(self, records: range) -> Iterator[tuple[int, _Molecule]]:
        if not records:
            return
        if self._items is None or self._position > records.start:
            self.close()
            self._wanted, self._position = records, 0
            self._items = self._open(skip=lambda record: record < self._wanted.start)
        self._wanted = records
        while self._position < records.stop:
            item = next(self._items, None)
            if item is None:
                self.close()
                raise DatasetError(f"{self._path}: record {records.stop - 1} is not there, or is damaged; the readable "
                                   f"part ends after {self._position}")
            record, self._position = self._position, self._position + 1
            if record in records:
                yield record, _Molecule(item[1], item[0], self._subset, f"{self._path.name}:{item[0]}")

    def _open(self, skip) -> Iterator[tuple[str, object]]:
        """(SMILES, molecule) of all, with None for those that `skip(record)` leaves out."""
        if self._kind == "msgpack":
            with open(self._path, "rb") as file:
                yield from _unpack(file, self._path.stat().st_size, self._path, skip)
            return
        try:
            with gzip.open(self._path) as file:
                archive = archives.Members(file)
                member = archive.next()
                if member is None or not member.isfile():
                    raise tarfile.ReadError("its first member is no file")
                yield from _unpack(archive.content(member), member.size, self._path, skip)
        except _READ_ERRORS as error:
            raise DatasetError(f"{self._path}: cannot be read to its end ({error}). It is truncated or damaged; "
                               "download it again.") from error


class _Limited:
    """A file that gives no more than `left` bytes: a value of many small parts takes some 60 times its bytes."""

    def __init__(self, file):
        self._file, self.left = file, _MAX_MOLECULE

    def read(self, size: int) -> bytes:
        if self.left < 0:
            raise ValueError(f"more than {_MAX_MOLECULE} bytes, which no molecule has")
        data = self._file.read(size)
        self.left -= len(data)
        return data


def _unpack(file, size: int, path: Path, skip) -> Iterator[tuple[str, object]]:
    import msgpack
    # A length in a damaged file is believed, and its memory taken, up to these limits.
    file = _Limited(file)
    unpacker = msgpack.Unpacker(file, raw=False, read_size=1 << 20, max_buffer_size=1 << 28,
                                max_array_len=1 << 20, max_map_len=1 << 20)
    record, last = 0, "the beginning"
    try:
        while unpacker.tell() < size:
            for _ in range(unpacker.read_map_header()):
                smiles = unpacker.unpack()
                if not isinstance(smiles, str):
                    raise DatasetError(f"{path.name}: molecule {record} has the key {safe_pickle.shown(smiles)}, "
                                       "expected a SMILES")
                last, file.left = smiles, _MAX_MOLECULE
                if skip(record):
                    file.left = size
                    unpacker.skip()
                    molecule = None
                else:
                    molecule = unpacker.unpack()
                record += 1
                yield smiles, molecule
    except msgpack.OutOfData as error:
        raise DatasetError(f"{path}: truncated after molecule {record} ({last}): {size} bytes. Download it "
                           "again.") from error
    except (msgpack.UnpackException, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path}: molecule {record} (after {last}) is damaged ({type(error).__name__}: {error}). "
                           "Download it again.") from error
