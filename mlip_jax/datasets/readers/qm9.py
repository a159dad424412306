"""Reader of QM9: 133,885 minima of molecules with up to nine heavy atoms, with 15 properties.

The heavy atoms are C, N, O and F. There are no forces. Ramakrishnan et al., Sci. Data 1, 140022,
2014; figshare collection 978904. Three forms are supported:

1. dsgdb9nsd.xyz.tar.bz2, or a folder with its members dsgdb9nsd_000001.xyz and so on. For n atoms:

    line 1          n
    line 2          gdb <index>  A B C  mu  alpha  homo lumo gap  r2  zpve U0 U H G  Cv, in
                    GHz, debye, bohr³, hartree, bohr², hartree, cal/mol/K
    n lines         element  x y z (Å)  Mulliken charge (e)
    3 lines         frequencies (1/cm); SMILES of GDB-17 and of the minimum; InChI of both

   Small numbers are written in the format of Mathematica, 1.2*^-6.

2. One extended-xyz file with the 15 properties in the second line of each molecule as A= B= C= mu=
   alpha= epsHOMO= epsLUMO= epsgap= <R2>= zpve= U0= U= H= G= Cv=, in the units above.

3. An ASE database with energy_U0, homo, ... in the data of its rows, as written by SchNetPack. Its
   units are those in the metadata (`_property_unit_dict`, `_distance_unit`). Files of older
   versions do not state units; they have either the units of QM9 or those of ASE (eV, e·Å, Å³, Å²;
   Cv in cal/mol/K in both). U0 shows which, because it is a few eV per atom below the isolated
   atoms. Every energy is checked in this way.

The energy is U0. The energies of isolated atoms are those of the data set's atomref.txt.

3,054 molecules changed their bonds during relaxation. They are listed in uncharacterized.txt,
published with the data: after a header, rows of index, three SMILES and a number. They are skipped
if the list and the index of a molecule are known. Forms 2 and 3 contain no indices. There, a
molecule is named by its index only if all 133,885 are present, in order.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase import units

from mlip_jax.datasets import options, reader
from mlip_jax.datasets.formats.qm9_formats import Archive, format_of, open_format
from mlip_jax.datasets.formats.qm9_records import ATOM_ENERGIES, BINDING, binding_energy
from mlip_jax.datasets.identity import molecule_identity
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.structure import Structure


class Reader(reader.Reader):
    """Reader of QM9 in any of its three forms. A record is a molecule.

    Args:
      path: The archive (.tar.bz2), a folder of its members, an extended-xyz file or an ASE
        database.
      uncharacterized: Path of the list of molecules that failed the consistency check. The default
        is uncharacterized.txt next to the data, if present.
      keep_uncharacterized: Whether to read these molecules nevertheless.
      db_units: Units of a database that states none: "hartree" for those of QM9, "eV" for those of
        ASE, "auto" to infer them from the energies.

    Attributes:
      notes: Remarks that concern the interpretation of results.
    """

    LEVEL_OF_THEORY = "B3LYP/6-31G(2df,p)"
    UNITS = {
        "positions": "Å",
        "energy": "hartree (databases: as they state)",
        "dipole_moment": "debye",
        "polarizability": "bohr³",
        "electronic_spatial_extent": "bohr²",
        "heat_capacity": "cal/mol/K",
        "rotational_constants": "GHz",
    }

    def __init__(
        self,
        path: str | Path,
        uncharacterized: str | Path | None = None,
        keep_uncharacterized: bool = False,
        db_units: str = "auto",
    ):
        super().__init__(path)
        db_units = options.one_of("db_units", db_units, ("auto", "eV", "hartree"))
        uncharacterized = options.path("uncharacterized", uncharacterized, allow_none=True)
        keep_uncharacterized = options.flag("keep_uncharacterized", keep_uncharacterized)
        self.atom_energies = {symbol: e * units.Hartree for symbol, e in ATOM_ENERGIES.items()}
        self._list: Path | None = None
        self._excluded: frozenset[int] = frozenset()
        self._source = open_format(self.path, db_units)
        self.sequential = isinstance(self._source, Archive)
        try:
            if not keep_uncharacterized:
                self._exclude(uncharacterized)
        except BaseException:
            self.close()
            raise

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether a path has one of the three forms of QM9."""
        try:
            return path.exists() and format_of(path) is not None
        except (OSError, EOFError, ValueError, tarfile.TarError):
            return False

    def __len__(self) -> int:
        return len(self._source)

    def close(self) -> None:
        self._source.close()

    def files(self) -> list[Path]:
        return [*self._source.files(), *([self._list] if self._list else [])]

    def read(self, records: range, report: ReadReport) -> Iterator[Structure]:
        """Yield the structures of the records.

        Molecules listed in uncharacterized.txt are skipped unless `keep_uncharacterized` is set.
        Structures with positions that are not finite are skipped as well.
        """
        for record, index, source, raw in self._source.read(records):
            report.records += 1
            if index in self._excluded:
                report.skip("uncharacterized", source)
                continue
            # Parse only records that are not excluded.
            structure = raw()
            report.add_unread(structure.pop("unread"))
            _check_energy(structure["energy"], structure["numbers"], source)
            if not np.isfinite(structure["positions"]).all():
                report.skip("positions not finite", source)
                continue
            report.structures += 1
            yield Structure(
                **structure,
                molecule=molecule_identity(structure["smiles"])
                or (source if index is None else f"gdb {index}"),
                record=record,
                source=source,
            )

    def _exclude(self, given: str | Path | None) -> None:
        """Read the list of uncharacterized molecules, or add a note that they are kept."""
        folder = self.path if self.path.is_dir() else self.path.parent
        candidates = dict.fromkeys(f / "uncharacterized.txt" for f in (folder, self.path.parent))
        file = (
            Path(given) if given is not None else next((f for f in candidates if f.is_file()), None)
        )
        if not self._source.has_indices:
            problem = (
                f"{self.path} does not contain the indices of its molecules. The 3,054 molecules "
                "whose bonds changed on relaxation cannot be identified and are kept"
            )
            if given is not None:
                raise DatasetError(
                    f"{problem}. Give the archive of QM9, or remove the option uncharacterized."
                )
            self.notes.append(problem)
        elif file is None:
            self.notes.append(
                "uncharacterized.txt is missing next to the data: the 3,054 molecules whose bonds "
                "changed on relaxation are kept. Download it, or give its path, "
                f"{options.as_flag('uncharacterized', '...')}."
            )
        else:
            self._list, self._excluded = file, _read_list(file)


def _read_list(path: Path) -> frozenset[int]:
    """Return the indices in a list of uncharacterized molecules."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{path}: the list of uncharacterized molecules cannot be read ({error})"
        ) from error
    # A row has five columns. Sentences in the header and footer can also begin with a number.
    rows = [words for words in map(str.split, lines) if len(words) == 5 and words[0].isdecimal()]
    if not rows:
        raise DatasetError(
            f"{path}: contains no rows of index, three SMILES and a number, as in "
            "uncharacterized.txt"
        )
    return frozenset(int(words[0]) for words in rows)


def _check_energy(energy: float, numbers: np.ndarray, source: str) -> None:
    """Raise DatasetError if U0 does not fit the energies of the isolated atoms."""
    binding = binding_energy(energy, numbers)
    if np.isfinite(binding) and not BINDING[0] < binding < BINDING[1]:
        raise DatasetError(
            f"{source}: U0 of {energy:.6g} eV is {binding:.4g} eV per atom relative to the "
            f"isolated atoms, expected {BINDING[0]} to {BINDING[1]}: it has another unit than the "
            "rest of the file, or is not a total energy"
        )
