"""Reader of .npz files of any author: one row per structure, with names and units as options.

Layout for m structures of at most n atoms. Names are options; without them, usual names are found:

    numbers    (n,) for one molecule, or (m, n) padded with zeros or -1
    positions  (m, n, 3)
    energy     (m,) or (m, 1)         optional
    forces     (m, n, 3)              optional
    charge     (m,), (m, 1) or ()     optional
    spin       (m,), (m, 1) or ()     optional; unpaired electrons, multiplicity or spin
    cell       (m, 3, 3) or (3, 3)    optional; structures with a cell are periodic along each vector
    stress     (m, 3, 3), (m, 9), (m, 6)   optional, only with a cell; or virial

Such files are written with numpy.savez. They do not state their units, which are options with eV
and Å as defaults. md17.py and qm7x.py read the published files of MD17, rMD17 and QM7-X.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlip_jax.datasets import file_units, options, reader
from mlip_jax.datasets.charges import total_charge
from mlip_jax.datasets.formats import npz
from mlip_jax.datasets.formats.elements import validate_numbers
from mlip_jax.datasets.identity import molecule_identity
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.stress import (
    NO_STRESS,
    STRESS,
    StressConversion,
    check_property_names,
    chosen_stress,
)
from mlip_jax.state_labels import (
    ElectronicStateError,
    charge_names,
    find_charge,
    find_unpaired,
    spin_names,
)
from mlip_jax.structure import Structure, cell_problem, hill_formula

# Usual names in lower case, the most specific first.
_USUAL = {
    "numbers": ("atomic_numbers", "numbers", "nuclear_charges", "charges_nuclear", "species", "z"),
    "positions": ("positions", "coordinates", "coords", "xyz", "pos", "r"),
    "energy": ("energy", "energies", "total_energy", "e"),
    "forces": ("forces", "force", "f"),
    "cell": ("cell", "cells", "lattice"),
    "stress": ("stress", "stresses", "virial", "virials"),
    "molecule": (),
    "smiles": ("smiles",),
}
_BLOCK = 512  # rows read at once
_TEXTS = "SU"


class Reader(reader.Reader):
    """Reader of .npz files with any names. A record is a row.

    Args:
      path: Path of the file.
      numbers_key: Name of the atomic numbers. "" finds a usual name, as for all names below.
      positions_key: Name of the positions.
      energy_key: Name of the energies.
      forces_key: Name of the forces.
      charge_key: Name of the total charges. Without them, charges are those of the SMILES, or 0.
      spin_key: Name of the numbers of unpaired electrons, multiplicities or spins.
      cell_key: Name of the lattice vectors.
      stress_key: Name of the stresses, or of virials if the name is virial or virials. "none"
        ignores them.
      smiles_key: Name of the SMILES, texts of shape (m,).
      molecule_key: Name of texts or numbers of shape (m,) that identify the molecules. "" uses the
        SMILES if present, otherwise the formula; isomers then count as one molecule.
      property_keys: Names of additional labels per structure, (m, ...).
      energy_unit: Energy unit: eV, meV, hartree (Ha), rydberg (Ry), kcal/mol or kJ/mol.
      length_unit: Length unit: Ang, bohr, nm or pm.
      forces_unit: Force unit, e.g. "hartree/bohr". "" means energy_unit/length_unit.
      forces_are_gradients: Whether the file has the gradient, whose sign is then changed.
      stress_unit: Unit of the stress: GPa, kbar or e.g. "eV/Ang^3". "" means
        energy_unit/length_unit³. Virials are in energy_unit.
      stress_sign_reversed: Whether the stress or virial has the opposite sign of ASE's, whose stress is
        positive under tension.
      level_of_theory: Description of the level of theory of the labels.
    """

    UNITS = file_units.READER_UNITS
    GENERAL = True
    UNREAD_REMEDY = (
        "To read one, give its name as energy_key, forces_key, charge_key, spin_key, cell_key or "
        f"property_keys, e.g. {options.as_flag('property_keys', 'NAME')}."
    )
    PROBLEM_OPTIONS = file_units.READER_PROBLEM_OPTIONS

    def __init__(
        self,
        path: str | Path,
        *,
        numbers_key: str = "",
        positions_key: str = "",
        energy_key: str = "",
        forces_key: str = "",
        charge_key: str = "",
        spin_key: str = "",
        cell_key: str = "",
        stress_key: str = "",
        smiles_key: str = "",
        molecule_key: str = "",
        property_keys: tuple[str, ...] = (),
        energy_unit: str = "eV",
        length_unit: str = "Ang",
        forces_unit: str = "",
        forces_are_gradients: bool = False,
        stress_unit: str = "",
        stress_sign_reversed: bool = False,
        level_of_theory: str = "",
    ):
        super().__init__(path)
        self.level_of_theory = (
            options.text("level_of_theory", level_of_theory) or self.LEVEL_OF_THEORY
        )
        requested = options.keys(
            numbers=numbers_key,
            positions=positions_key,
            energy=energy_key,
            forces=forces_key,
            charge=charge_key,
            spin=spin_key,
            cell=cell_key,
            stress=stress_key,
            smiles=smiles_key,
            molecule=molecule_key,
        )
        self._properties = options.texts("property_keys", property_keys)
        check_property_names(self._properties)
        self._units = file_units.FileUnits.from_options(
            energy_unit, length_unit, forces_unit, forces_are_gradients
        )
        self._stress = StressConversion.from_options(
            stress_unit, stress_sign_reversed, self._units.energy, self._units.length
        )
        self._file = npz.NpzFile(self.path)
        try:
            self._keys = _find_names(self._file.members, requested)
            self._check()
            if STRESS in self._keys and not stress_key:
                chosen_stress(_stress_names(self._file.members), str(self.path))
        except BaseException:
            self.close()
            raise
        names = {*self._keys.values(), *self._properties}
        self._unread = [
            name
            for name, member in self._file.members.items()
            if name not in names and member.dtype.kind in "iuf"
        ]
        self.sequential = any(self._file.streamed(name) for name in names)

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether an .npz file has positions and atomic numbers under usual names."""
        if path.suffix != ".npz":
            return False
        members = npz.members(path)
        keys = _find_names(members, {})
        return {"numbers", "positions"} <= keys.keys() and not _shape_problem(members, keys)

    def __len__(self) -> int:
        return self._file.members[self._keys["positions"]].shape[0]

    def close(self) -> None:
        self._file.close()

    def read(self, records: range, report: ReadReport) -> Iterator[Structure]:
        """Yield the structures of the records.

        Rows without atoms, with positions that are not finite or an invalid cell are skipped.
        """
        for at in range(0, len(records), _BLOCK):
            block = records[at : at + _BLOCK]
            rows = {k: self._rows(k, block[0], block[-1] + 1) for k in self._keys}
            properties = {
                name: self._file.rows(name, block[0], block[-1] + 1) for name in self._properties
            }
            for record in block:
                i = record - block[0]
                row = {k: v[i] for k, v in rows.items()}
                report.records += 1
                report.add_unread(self._unread)
                source = f"{self.path.name}:{record}"
                if structure := self._structure(row, record, source, report):
                    report.structures += 1
                    structure.properties.update(
                        (k, np.asarray(v[i], np.float64)) for k, v in properties.items()
                    )
                    yield structure

    def _structure(self, row, record: int, source: str, report: ReadReport) -> Structure | None:
        """Convert a row to a structure in eV and Å, or count why it is skipped."""
        real = row["numbers"] > 0  # padding has atomic number 0 or -1
        if not real.any():
            report.skip("no atoms", source)
            return None
        numbers = validate_numbers(row["numbers"][real], source)
        positions = row["positions"][real].astype(np.float64) * self._units.length
        if not np.isfinite(positions).all():
            report.skip("positions not finite", source)
            return None
        cell = np.asarray(row["cell"], np.float64) * self._units.length if "cell" in row else None
        pbc = None if cell is None else np.ones(3, bool)
        if problem := cell_problem(cell, pbc):
            report.skip(problem, source)
            return None
        smiles = _text(row["smiles"]) if "smiles" in row else ""
        named = _text(row["molecule"]) if "molecule" in row else molecule_identity(smiles)
        charge, unpaired = _electronic_state(row, self._keys, numbers, smiles, source)
        forces = (
            row["forces"][real].astype(np.float64) * self._units.forces if "forces" in row else None
        )
        return Structure(
            numbers=numbers,
            positions=positions,
            energy=float(np.ravel(row["energy"])[0]) * self._units.energy
            if "energy" in row
            else float("nan"),
            forces=forces,
            charge=charge,
            spin=unpaired,
            cell=cell,
            pbc=pbc,
            molecule=named or hill_formula(numbers),
            smiles=smiles,
            record=record,
            source=source,
            properties=self._stress_of(row, cell, source),
        )

    def _stress_of(self, row, cell, source: str) -> dict[str, np.ndarray]:
        """Return the stress of a row (eV/Å³) as a property; none if the file has no stresses."""
        if STRESS not in row:
            return {}
        return {STRESS: self._stress.convert(row[STRESS], self._keys[STRESS], cell, source)}

    def _rows(self, label: str, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) of a label; values common to all structures are repeated."""
        name = self._keys[label]
        shape = self._file.members[name].shape
        common = {"numbers": 1, "cell": 2, "charge": 0, "spin": 0}.get(label)  # number of axes
        if common is not None and len(shape) == common:
            return np.broadcast_to(self._file.whole(name), (stop - start, *shape))
        return self._file.rows(name, start, stop)

    def _check(self) -> None:
        """Raise DatasetError if an array is missing or has an unexpected shape."""
        members = self._file.members
        found = ", ".join(f"{name} {m.shape}" for name, m in members.items()) or "no arrays"
        for label in ("numbers", "positions"):
            if label not in self._keys:
                raise DatasetError(
                    f"{self.path}: no array is called {' or '.join(_USUAL[label])}; found {found}. "
                    f"Give its name, {options.as_flag(f'{label}_key', 'NAME')}."
                )
        for name in (*self._keys.values(), *self._properties):
            if name not in members:
                raise DatasetError(f"{self.path}: has no array {name!r}; found {found}")
            if members[name].dtype.hasobject:
                self._file.rows(name, 0, 1)  # raises DatasetError for pickled objects
        if problem := _shape_problem(members, self._keys):
            raise DatasetError(f"{self.path}: {problem}; found {found}")
        count = len(self)
        wrong = [n for n in self._properties if members[n].shape[:1] != (count,)]
        if wrong:
            raise DatasetError(
                f"{self.path}: {wrong[0]} has shape {members[wrong[0]].shape}, expected ({count}, "
                "...)"
            )
        if not count:
            raise DatasetError(f"{self.path}: the file contains no structures")


def _find_names(members: dict[str, npz.Member], requested: dict[str, str]) -> dict[str, str]:
    """Return the name of the array of each label: the requested one, or the first usual one."""
    lower = {name.lower(): name for name in members}
    keys = {label: name for label, name in requested.items() if name}
    for label, usual in _USUAL.items():
        name = next((lower[name] for name in usual if name in lower), None)
        if label not in keys and name is not None:
            keys[label] = name
    # Without a cell, an array of this name is another quantity.
    if requested.get(STRESS) == NO_STRESS:
        del keys[STRESS]
    elif not requested.get(STRESS) and (
        "cell" not in keys or STRESS in keys and not _is_stress(members, keys)
    ):
        keys.pop(STRESS, None)
    for label, names in (("charge", charge_names(members)), ("spin", spin_names(members))):
        if label not in keys and names:
            keys[label] = names[0]
    return keys


def _stress_names(members: dict[str, npz.Member]) -> list[str]:
    """Return the names of the arrays that contain a stress or virial."""
    names = (name for name in members if name.lower() in _USUAL[STRESS])
    return [name for name in names if _is_stress(members, {STRESS: name})]


def _electronic_state(
    row, keys: dict[str, str], numbers: np.ndarray, smiles: str, source: str
) -> tuple[float, float]:
    """Return the total charge (e) and the number of unpaired electrons of a row."""
    try:
        label = (
            find_charge({keys["charge"]: row["charge"]}, [keys["charge"]])
            if "charge" in row
            else None
        )
        charge = total_charge(label, smiles, 0.0)
        if "spin" not in row:
            return charge, 0.0
        return charge, find_unpaired(
            {keys["spin"]: row["spin"]}, numbers, charge, [keys["spin"]]
        ) or 0.0
    except ElectronicStateError as error:
        raise DatasetError(f"{source}: {error}") from error


def _is_stress(members: dict[str, npz.Member], keys: dict[str, str]) -> bool:
    """Return whether the array of the stress has six or nine numbers per structure."""
    return members[keys[STRESS]].shape[1:] in ((3, 3), (9,), (6,))


def _shape_problem(members: dict[str, npz.Member], keys: dict[str, str]) -> str:
    """Return the array with an unexpected shape or type, and the expectation; "" if none."""
    shapes = {label: members[name].shape for label, name in keys.items()}
    positions = shapes["positions"]
    if len(positions) != 3 or positions[2] != 3:
        return f"{keys['positions']} must have shape (structures, atoms, 3)"
    m, n = positions[:2]
    expected = {
        "numbers": [(n,), (m, n)],
        "energy": [(m,), (m, 1)],
        "forces": [positions],
        "charge": [(m,), (m, 1), ()],
        "spin": [(m,), (m, 1), ()],
        "cell": [(m, 3, 3), (3, 3)],
        "stress": [(m, 3, 3), (m, 9), (m, 6)] if "cell" in keys else [],
        "smiles": [(m,)],
        "molecule": [(m,)],
    }
    for label, allowed in expected.items():
        if label not in keys:
            continue
        kinds = {"smiles": _TEXTS, "molecule": _TEXTS + "iu"}.get(label, "iuf")
        if shapes[label] not in allowed or members[keys[label]].dtype.kind not in kinds:
            return f"{keys[label]} must have shape {' or '.join(map(str, allowed))}"
    return ""


def _text(value) -> str:
    """Return a text or number as text."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
