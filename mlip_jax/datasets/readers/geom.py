"""Reader of GEOM: conformers of drug-like and QM9 molecules in pickles or MessagePack files.

Layout (Axelrod and Gómez-Bombarelli, Sci. Data 9, 185, 2022; doi.org/10.7910/DVN/JNGTDF; tutorials
of github.com/learningmatter-mit/geom):

    rdkit_folder/
      summary_drugs.json, summary_qm9.json   {SMILES: {"pickle_path": "drugs/....pickle", ...}}
      drugs/*.pickle, qm9/*.pickle           one molecule each, as below, with "smiles"
    drugs_crude.msgpack, qm9_crude.msgpack   stream of maps {SMILES: molecule}, 1000 molecules each

A molecule is a dict with

    charge              e
    ensembleenergy, ensemblefreeenergy    kcal/mol
    ensembleentropy     cal/(mol K)
    lowestenergy        hartree
    totalconfs, uniqueconfs, temperature, ...
    conformers          list of dicts, in NO certain order:
      totalenergy       hartree
      relativeenergy    kcal/mol above the lowest
      degeneracy        number of rotamers
      boltzmannweight, geom_id, set
      rd_mol or xyz     RDKit molecule with one conformer in Å, or [[atomic number, x, y, z], ...]
                        in Å

A molecule lacks entries that were not computed for it. There are no forces. Labels are GFN2-xTB
(CREST). Conformers can have reacted during the search: the bonds of an rd_mol may differ from those
of the SMILES.

The pickles require the package rdkit. An RDKit molecule in them is a byte string, which the
restricted unpickler of datasets/formats/safe_pickle.py extracts and RDKit's own parser reads. That
parser runs no code of the file, but wrong bytes inside a molecule can crash it. It therefore runs in
a separate process (datasets/isolation/). The MessagePack files contain no RDKit molecules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from ase import units

from mlip_jax.datasets import options, reader
from mlip_jax.datasets.charges import charge_from_smiles
from mlip_jax.datasets.formats import safe_pickle
from mlip_jax.datasets.formats.elements import validate_numbers
from mlip_jax.datasets.formats.geom_files import (
    READ_ERRORS,
    GeomRecord,
    MessagePackStream,
    Pickle,
    PickleFolder,
    RDKitMolecule,
    kind_of,
    parse_molecules,
    pickles_in,
)
from mlip_jax.datasets.formats.pickle_messages import short_keys
from mlip_jax.datasets.identity import molecule_identity
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.structure import Structure

_KCAL = units.kcal / units.mol
# property: (name in the file, conversion factor of the file's unit; energies to eV)
_OF_MOLECULE = {
    "ensemble_energy": ("ensembleenergy", _KCAL),
    "ensemble_free_energy": ("ensemblefreeenergy", _KCAL),
    "ensemble_entropy": ("ensembleentropy", _KCAL / 1000),
}
_OF_CONFORMER = {
    "energy_relative": ("relativeenergy", _KCAL),
    "boltzmann_weight": ("boltzmannweight", 1.0),
    "degeneracy": ("degeneracy", 1.0),
}
# Entries that are read, or counts, conditions and names that are not labels.
_KNOWN_OF_MOLECULE = {"conformers", "smiles", "charge", "totalconfs", "uniqueconfs", "temperature"}
_KNOWN_OF_MOLECULE |= {"lowestenergy", "datasets", *(key for key, _ in _OF_MOLECULE.values())}
_KNOWN_OF_CONFORMER = {"totalenergy", "rd_mol", "xyz", "geom_id", "set", "conformerweights"}
_KNOWN_OF_CONFORMER |= {key for key, _ in _OF_CONFORMER.values()}
_MAX_ATOMS = 10_000  # per molecule; the largest one in GEOM has 181


class Reader(reader.Reader):
    """Reader of GEOM: a folder of pickles with or without summary, a pickle or a MessagePack file.

    A record is a molecule. MessagePack files (`.msgpack`, also inside `.tar.gz`) are read from
    front to back; counting the molecules requires one pass through the file.

    Args:
      path: Path of the folder or file.
      subset: For a folder, the subset to read: "drugs" or "qm9". For a file, the name assigned to
        its structures; "" infers it from the file name.
      max_conformers: Maximum number of conformers per molecule, those of lowest energy. They keep
        the order of the file, which need not be that of the energies. `conformer` is the index in
        the file.
      level_of_theory: Level of theory of the labels, which the files do not state. "" uses the
        published one.
    """

    LEVEL_OF_THEORY = "GFN2-xTB (CREST)"
    UNITS = {"positions": "Å", "energy": "hartree", "energy_relative": "kcal/mol", "forces": "none"}

    def __init__(
        self,
        path: str | Path,
        subset: str = "",
        max_conformers: int | None = None,
        level_of_theory: str = "",
    ):
        super().__init__(path)
        self._max_conformers = options.positive_integer(
            "max_conformers", max_conformers, allow_none=True
        )
        subset = options.text("subset", subset)
        self.level_of_theory = (
            options.text("level_of_theory", level_of_theory) or self.LEVEL_OF_THEORY
        )
        kind = kind_of(self.path)
        if kind is None:
            raise DatasetError(
                f"{self.path}: not GEOM data. Expected its rdkit_folder (summary_drugs.json, "
                "drugs/), a folder of its pickles, one pickle, or a crude .msgpack file."
            )
        self._molecules = (
            PickleFolder(self.path, subset)
            if kind == "folder"
            else Pickle(self.path, subset)
            if kind == "pickle"
            else MessagePackStream(self.path, kind, subset)
        )
        self.sequential = isinstance(self._molecules, MessagePackStream)

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether a path is a pickle, a MessagePack file or a folder of GEOM."""
        try:
            kind = kind_of(path)
            if kind != "folder":
                return kind is not None
            if any(path.glob("summary_*.json")):
                return any((path / s).is_dir() for s in ("drugs", "qm9"))
            first = next(pickles_in(path), None)
            return first is not None and kind_of(first) == "pickle"
        except READ_ERRORS:
            return False

    def __len__(self) -> int:
        return len(self._molecules)

    def files(self) -> list[Path]:
        return self._molecules.files()

    def close(self) -> None:
        self._molecules.close()

    def read(self, records: range, report: ReadReport) -> Iterator[Structure]:
        """Yield the structures of the records.

        Molecules without conformers, and molecules whose pickle is listed in the summary but
        missing, are skipped.
        """
        for record, item in self._molecules.read(records):
            report.records += 1
            if item.missing:
                report.skip(item.missing, item.source)
                continue
            yield from self._read_molecule(item, record, report)

    def _read_molecule(
        self, item: GeomRecord, record: int, report: ReadReport
    ) -> Iterator[Structure]:
        """Yield the conformers of a molecule."""
        molecule, source = item.content, item.source
        if not isinstance(molecule, Mapping) or not isinstance(molecule.get("conformers"), list):
            content = (
                short_keys(molecule) if isinstance(molecule, Mapping) else type(molecule).__name__
            )
            raise DatasetError(
                f"{source}: expected a dict with a list 'conformers', as in GEOM; found {content}"
            )
        conformers = molecule["conformers"]
        if not conformers:
            report.skip("no conformers", source)
        shared = _labels(molecule, _OF_MOLECULE, source)
        smiles = item.smiles or molecule.get("smiles") or ""
        if not isinstance(smiles, str):
            raise DatasetError(
                f"{source}: smiles is {safe_pickle.short_repr(smiles)}, expected a text"
            )
        names = {str(k) for k in molecule} - _KNOWN_OF_MOLECULE
        for each in conformers:
            if isinstance(each, Mapping):
                names |= {str(k) for k in each} - _KNOWN_OF_CONFORMER
        report.add_unread(names)
        chosen = _lowest(conformers, self._max_conformers, source)
        _parse_ahead(conformers, chosen)
        for c in chosen:
            where = f"{source}#{c}"
            numbers, positions, charge = _atoms(conformers[c], where)
            if not np.isfinite(positions).all():
                report.skip("positions not finite", where)
                continue
            # The charge of the molecule takes precedence over that of the conformer and the SMILES.
            if molecule.get("charge") is not None:
                charge = _number(molecule["charge"], "charge", source)
            elif charge is None:
                charge = charge_from_smiles(smiles)
            report.structures += 1
            yield Structure(
                numbers=numbers,
                positions=positions,
                energy=_energy(conformers[c], where) * units.Hartree,
                charge=float(charge),
                molecule=molecule_identity(smiles) or source,
                smiles=smiles,
                conformer=c,
                record=record,
                subset=item.subset,
                source=source,
                properties={**_labels(conformers[c], _OF_CONFORMER, where), **shared},
            )


def _parse_ahead(conformers: list, chosen: list[int]) -> None:
    """Parse the RDKit molecules of the chosen conformers at once."""
    binaries = [
        conformers[c]["rd_mol"]
        for c in chosen
        if isinstance(conformers[c], Mapping)
        and isinstance(conformers[c].get("rd_mol"), RDKitMolecule)
    ]
    if binaries:
        parse_molecules(binaries)


def _lowest(conformers: list, count: int | None, source: str) -> list[int]:
    """Return the indices of the `count` conformers of lowest energy in ascending order.

    Conformers without an energy are chosen last.
    """
    if count is None or len(conformers) <= count:
        return list(range(len(conformers)))
    energies = [_energy(c, f"{source}#{i}") for i, c in enumerate(conformers)]
    return sorted(np.argsort(energies, kind="stable")[:count].tolist())


def _energy(conformer, source) -> float:
    """Return the total energy of a conformer (hartree), NaN if missing."""
    if not isinstance(conformer, Mapping):
        raise DatasetError(f"{source}: a conformer is {type(conformer).__name__}, expected a dict")
    return _number(conformer.get("totalenergy"), "totalenergy", source)


def _labels(
    holder: Mapping, names: Mapping[str, tuple[str, float]], source: str
) -> dict[str, float]:
    """Return the labels in `names`, converted by their factors, NaN if missing."""
    if not isinstance(holder, Mapping):
        raise DatasetError(f"{source}: a conformer is {type(holder).__name__}, expected a dict")
    return {
        name: _number(holder.get(key), key, source) * unit for name, (key, unit) in names.items()
    }


def _number(value, key, source) -> float:
    """Return a value as float, NaN if it is None. Raise DatasetError if it is not a number."""
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise DatasetError(f"{source}: {key} is {safe_pickle.short_repr(value)}, expected a number")
    try:
        return float(value)
    except OverflowError as error:
        raise DatasetError(f"{source}: {key} is too large a number ({error})") from error


def _atoms(conformer: Mapping, source: str) -> tuple[np.ndarray, np.ndarray, float | None]:
    """Return atomic numbers, positions (Å) and the total charge, None if the conformer lacks it."""
    if not isinstance(conformer, Mapping):
        raise DatasetError(f"{source}: a conformer is {type(conformer).__name__}, expected a dict")
    if isinstance(conformer.get("rd_mol"), RDKitMolecule):
        return conformer["rd_mol"].atoms(source)
    if "xyz" not in conformer:
        raise DatasetError(
            f"{source}: expected a conformer with 'rd_mol' (an RDKit molecule) or 'xyz'; found "
            f"{short_keys(conformer)}"
        )
    table = _table(conformer["xyz"], source)
    return validate_numbers(table[:, 0], source), table[:, 1:].copy(), None


def _table(rows, source: str) -> np.ndarray:
    """Return the rows of xyz as float64, shape (n, 4).

    The rows are checked before NumPy sees them, because NumPy would walk through nested lists
    without end.
    """
    if isinstance(rows, np.ndarray):
        rows = np.asarray(rows).tolist() if rows.ndim == 2 else [rows]
    if not isinstance(rows, list | tuple) or not 0 < len(rows) <= _MAX_ATOMS:
        size = f"{len(rows)} rows" if isinstance(rows, list | tuple) else type(rows).__name__
        raise DatasetError(
            f"{source}: xyz has {size}, expected a list of 1 to {_MAX_ATOMS} rows: atomic number, "
            "x, y, z"
        )
    for row in rows:
        if not isinstance(row, list | tuple) or len(row) != 4:
            raise DatasetError(
                f"{source}: xyz has the row {safe_pickle.short_repr(row)}, expected atomic number, "
                "x, y, z"
            )
        if not all(isinstance(cell, float | int | np.integer | np.floating) for cell in row):
            raise DatasetError(
                f"{source}: xyz has the row {safe_pickle.short_repr(row)}, which is not four "
                "numbers"
            )
    try:
        return np.array(rows, np.float64)
    except (OverflowError, MemoryError) as error:
        raise DatasetError(f"{source}: xyz is not a table of numbers ({error})") from error
