"""Reader of files that ASE supports: extended XYZ, databases, trajectories and formats of `ase.io`.

ASE is documented at wiki.fysik.dtu.dk/ase. Labels are looked up by name in `atoms.info`,
`atoms.arrays` and the results of a calculator, in which ASE stores "energy", "forces", "dipole",
... of extended XYZ. A typical frame of extended XYZ:

    3
    Properties=species:S:1:pos:R:3:forces:R:3 energy=-14.3 charge=0 smiles=O pbc="F F F"
    O  0.0  0.0  0.119   0.01 0.02 -0.3
    ...

Such a file does not state its units. They are options, with eV and Å as defaults. `length_unit` is
the unit of positions and cell as ASE returns them. Additional labels (`property_keys`,
`atom_property_keys`) are not converted and should be in eV, Å and e.

The total charge is the label `charge_key`. If a frame lacks it, the charge of its SMILES is used.
Without SMILES, it is the sum of ASE's initial charges if that is an integer within 0.001, otherwise
0: initial charges are often partial charges, whose sum is not a total charge.

Extended XYZ, databases and trajectories can be read from any frame. Other formats must be read from
the first frame on (`sequential`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import units
from ase.data import chemical_symbols

from mlip_jax.config import ConfigError, unknown_name
from mlip_jax.datasets import options, reader
from mlip_jax.datasets.charges import total_charge, whole_charge
from mlip_jax.datasets.formats.ase_database import is_ase_database
from mlip_jax.datasets.formats.ase_frames import (
    FileFrames,
    Frame,
    is_trajectory,
    is_xyz,
    open_frames,
)
from mlip_jax.datasets.formats.elements import validate_numbers
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.structure import Structure

log = logging.getLogger(__name__)

ENERGY_UNITS = {
    "eV": 1.0,
    "meV": 1e-3,
    "hartree": units.Hartree,
    "Ha": units.Hartree,
    "Eh": units.Hartree,
    "rydberg": units.Rydberg,
    "Ry": units.Rydberg,
    "kcal/mol": units.kcal / units.mol,
    "kJ/mol": units.kJ / units.mol,
}
LENGTH_UNITS = {"Ang": 1.0, "angstrom": 1.0, "Å": 1.0, "bohr": units.Bohr, "nm": 10.0, "pm": 0.01}
_FIRST = 10  # number of frames that are searched for the requested labels


def _force_unit(text: str) -> float:
    """Return the value in eV/Å of a force unit, written as energy/length.

    >>> round(_force_unit("kcal/mol/Ang"), 6), round(_force_unit("hartree/bohr"), 4)
    (0.043364, 51.4221)
    """
    energy, _, length = text.rpartition("/")
    return _unit(energy, ENERGY_UNITS, "energy in forces_unit") / _unit(
        length, LENGTH_UNITS, "length in forces_unit"
    )


def _unit(text: str, table: Mapping[str, float], option: str) -> float:
    """Look up a unit in a table, ignoring case. Raise ConfigError if it is unknown."""
    for name, value in table.items():
        if name.lower() == text.strip().lower():
            return value
    raise ConfigError(unknown_name(option, text, list(table)))


class Reader(reader.Reader):
    """Reader of files that ASE supports. A record is a frame or a row.

    Args:
      path: Path of the file.
      energy_key: Name of the energy; "" for none. A file without this label is rejected with a list
        of its labels.
      forces_key: Name of the forces; "" for none. A file without anything like forces is read
        without them.
      charge_key: Name of the total charge. "" takes it from the SMILES or the initial charges.
      molecule_key: Name of the text or number that identifies the molecule. "" uses the SMILES if
        present, otherwise the chemical formula; isomers then count as one molecule.
      smiles_key: Name of the SMILES. Frames may lack it.
      property_keys: Names of additional labels per structure.
      atom_property_keys: Names of additional labels per atom.
      energy_unit: Energy unit: eV, meV, hartree (Ha), rydberg (Ry), kcal/mol or kJ/mol.
      length_unit: Length unit: Ang, bohr, nm or pm.
      forces_unit: Force unit, e.g. "hartree/bohr". "" means energy_unit/length_unit.
      forces_are_gradients: Whether the file has the gradient, whose sign is then changed.
      format: ASE's name of the file format; "" detects it.
      level_of_theory: Description of the level of theory of the labels.
    """

    LEVEL_OF_THEORY = "unknown"
    UNITS = {
        "positions": "length_unit (Å)",
        "energy": "energy_unit (eV)",
        "forces": "forces_unit (eV/Å)",
    }
    GENERAL = True

    def __init__(
        self,
        path: str | Path,
        *,
        energy_key: str = "energy",
        forces_key: str = "forces",
        charge_key: str = "charge",
        molecule_key: str = "",
        smiles_key: str = "smiles",
        property_keys: tuple[str, ...] = (),
        atom_property_keys: tuple[str, ...] = (),
        energy_unit: str = "eV",
        length_unit: str = "Ang",
        forces_unit: str = "",
        forces_are_gradients: bool = False,
        format: str = "",
        level_of_theory: str = "",
    ):
        super().__init__(path)
        self.level_of_theory = (
            options.text("level_of_theory", level_of_theory) or self.LEVEL_OF_THEORY
        )
        self._keys = {
            name: options.text(f"{name}_key", key)
            for name, key in (
                ("energy", energy_key),
                ("forces", forces_key),
                ("charge", charge_key),
                ("molecule", molecule_key),
                ("smiles", smiles_key),
            )
        }
        property_keys = options.texts("property_keys", property_keys)
        atom_property_keys = options.texts("atom_property_keys", atom_property_keys)
        self._energy = _unit(options.text("energy_unit", energy_unit), ENERGY_UNITS, "energy_unit")
        self._length = _unit(options.text("length_unit", length_unit), LENGTH_UNITS, "length_unit")
        forces_unit = options.text("forces_unit", forces_unit)
        self._force = _force_unit(forces_unit) if forces_unit else self._energy / self._length
        # Forces are minus the gradient.
        self._force *= -1 if options.flag("forces_are_gradients", forces_are_gradients) else 1
        self._frames = self._open(options.text("format", format))
        self.sequential = self._frames.sequential
        try:
            if not len(self._frames):
                raise DatasetError(f"{self.path}: the file contains no frames")
            # Check the options on the first frames, so that a typo is reported on opening.
            first = list(self._frames.read(range(min(_FIRST, len(self._frames)))))
            self._check_keys(first)
            self._property_shapes = self._shapes(first, property_keys, "property_keys", False)
            self._atom_shapes = self._shapes(first, atom_property_keys, "atom_property_keys", True)
            self._note_partial_charges(first)
        except BaseException:
            self._frames.close()
            raise

    def _open(self, format: str) -> FileFrames:
        """Open the frames in a format of ASE; "" detects it."""
        return open_frames(self.path, format)

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Return whether a file is an ASE database, an ASE trajectory or extended XYZ."""
        try:
            return path.is_file() and (is_ase_database(path) or is_trajectory(path) or is_xyz(path))
        except OSError:
            return False

    def __len__(self) -> int:
        return len(self._frames)

    def close(self) -> None:
        self._frames.close()

    def read(self, records: range, report: ReadReport) -> Iterator[Structure]:
        """Yield the structures of the records. Missing labels are NaN.

        Frames without atoms and frames with positions that are not finite are skipped.
        """
        for record, frame in zip(records, self._frames.read(records)):
            report.records += 1
            source = f"{self.path.name}:{record}"
            if not len(frame.numbers):
                report.skip("no atoms", source)
                continue
            if not np.isfinite(frame.positions).all():
                report.skip("positions not finite", source)
                continue
            validate_numbers(frame.numbers, source)
            report.structures += 1
            yield self._structure(frame, record, source)

    def _structure(self, frame: Frame, record: int, source: str) -> Structure:
        """Convert a frame to a structure in eV and Å."""
        n, periodic = len(frame.numbers), bool(np.any(frame.pbc))
        energy = _label(frame, self._keys["energy"], (), False, source)
        forces = (
            _label(frame, self._keys["forces"], (n, 3), True, source)
            if self._keys["forces"]
            else None
        )
        smiles = _text(frame, self._keys["smiles"])
        return Structure(
            numbers=frame.numbers,
            positions=frame.positions * self._length,
            energy=float(energy) * self._energy,
            forces=None if forces is None else forces * self._force,
            charge=self._charge(frame, smiles, source),
            cell=frame.cell * self._length if periodic else None,
            pbc=frame.pbc if periodic else None,
            molecule=self._molecule(frame, smiles, source),
            smiles=smiles,
            record=record,
            source=source,
            subset=_text(frame, "config_type"),
            properties={
                k: _plain(_label(frame, k, shape, False, source))
                for k, shape in self._property_shapes.items()
            },
            atom_properties={
                k: _label(frame, k, (n, *shape), True, source)
                for k, shape in self._atom_shapes.items()
            },
        )

    def _charge(self, frame: Frame, smiles: str, source: str) -> float:
        """Return the total charge of a frame (e)."""
        return total_charge(
            float(_label(frame, self._keys["charge"], (), False, source)), smiles, frame.charge
        )

    def _note_partial_charges(self, frames: list[Frame]) -> None:
        """Add a note if initial charges do not sum to an integer and no other charge is known."""
        for i, f in enumerate(frames):
            if (
                whole_charge(f.charge) is None
                and not _has(f, self._keys["charge"])
                and not _text(f, self._keys["smiles"])
            ):
                self.notes.append(
                    f"{self.path.name}:{i}: the initial charges of the atoms add up to "
                    f"{f.charge:.4g}, which is not a total charge. Frames without any other charge "
                    "are treated as neutral. If there is a label of the total charge, set it, "
                    f"{options.as_flag('charge_key', 'NAME')}"
                )
                return

    def _molecule(self, frame: Frame, smiles: str, source: str) -> str:
        """Return the identity of the molecule of a frame."""
        key = self._keys["molecule"]
        name = _text(frame, key) if key else smiles or _formula(frame.numbers)
        if not name:
            raise DatasetError(
                f"{source}: has no {key!r} to identify its molecule; found: "
                f"{_label_names([frame])}. Change or remove molecule_key."
            )
        return name

    def _check_keys(self, frames: list[Frame]) -> None:
        """Raise DatasetError if a requested label is missing in the first frames.

        The default names of charge, SMILES and forces may be missing. Missing forces are rejected
        if the file has labels that look like forces under another name.
        """
        for option in ("energy", "molecule"):
            if self._keys[option]:
                self._require(frames, self._keys[option], f"{option}_key")
        for option in ("charge", "smiles"):
            if self._keys[option] not in ("", option):
                self._require(frames, self._keys[option], f"{option}_key")
        key = self._keys["forces"]
        if key and not any(_has(f, key) for f in frames):
            similar = [
                k
                for f in frames
                for k in (*f.labels, *f.arrays, *f.results)
                if "force" in k.lower() or "grad" in k.lower()
            ]
            if key != "forces" or similar:
                self._require(frames, key, "forces_key")
            log.warning("%s: no forces in the first %d frames", self.path, len(frames))

    def _require(self, frames: list[Frame], key: str, option: str) -> None:
        """Raise DatasetError, with the labels found, if no frame has the label `key`."""
        if not any(_has(f, key) for f in frames):
            raise DatasetError(
                f"{self.path}: {key!r} is in none of the first {len(frames)} frames; found: "
                f"{_label_names(frames)}. Give the name, {options.as_flag(option, 'NAME')}"
                + (
                    "."
                    if option == "molecule_key"
                    else ", or none, " + options.as_flag(option, "''") + "."
                )
            )

    def _shapes(
        self, frames: list[Frame], keys: tuple[str, ...], option: str, atoms: bool
    ) -> dict[str, tuple]:
        """Return the shape of each label, without the axis of the atoms if `atoms` is set."""
        shapes = {}
        for key in keys:
            self._require(frames, key, option)
            frame = next(f for f in frames if _has(f, key))
            shapes[key] = np.shape(
                _numbers(_value(frame, key, str(self.path)), key, str(self.path))
            )
            shapes[key] = shapes[key][1:] if atoms else () if shapes[key] == (1,) else shapes[key]
        return shapes


def _has(frame: Frame, key: str) -> bool:
    """Return whether a frame has a label."""
    return any(key in part for part in (frame.labels, frame.arrays, frame.results))


def _label_names(frames: list[Frame]) -> str:
    """Format the names of all labels for a message."""
    names = {k: None for f in frames for part in (f.labels, f.arrays, f.results) for k in part}
    return ", ".join(names) or "no labels"


def _value(frame: Frame, key: str, source: str) -> Any:
    """Return the label with this name, or None. Values stored in two places must be equal."""
    values = [
        part[key]
        for part in (frame.labels, frame.arrays, frame.results)
        if part.get(key) is not None
    ]
    if len(values) > 1 and not all(np.array_equal(values[0], v) for v in values[1:]):
        raise DatasetError(
            f"{source}: {key!r} occurs twice with different values, as a label of the file and as "
            "a calculator's result. Write the correct one under another name."
        )
    return values[0] if values else None


def _label(frame: Frame, key: str, shape: tuple[int, ...], atoms: bool, source: str) -> np.ndarray:
    """Return a label as float64 of the given shape, all NaN if the frame lacks it."""
    value = _value(frame, key, source) if key else None
    if value is None:
        return np.full(shape, np.nan)
    value = _numbers(value, key, source)
    if not shape and value.size == 1:
        value = value.reshape(())
    if value.shape != shape:
        raise DatasetError(
            f"{source}: {key!r} has shape {value.shape}, expected {shape}"
            + (f" for {len(frame.numbers)} atoms" if atoms else "")
        )
    return value


def _numbers(value: Any, key: str, source: str) -> np.ndarray:
    """Convert a label to float64. Raise DatasetError if it is not numeric."""
    try:
        return np.array(value, np.float64)
    except (TypeError, ValueError) as error:
        raise DatasetError(f"{source}: {key!r} is not numeric ({error})") from error


def _plain(value: np.ndarray) -> float | np.ndarray:
    """Return a scalar as float and other arrays unchanged."""
    return value if value.shape else float(value)


def _text(frame: Frame, key: str) -> str:
    """Return a label as text, "" if the frame lacks it or it is not a text or number."""
    value = frame.labels.get(key, frame.arrays.get(key)) if key else None
    return "" if value is None or isinstance(value, (bool, dict, list, np.ndarray)) else str(value)


def _formula(numbers: np.ndarray) -> str:
    """Return the formula with elements in the order of atomic numbers."""
    return "".join(
        f"{chemical_symbols[z]}{n}" for z, n in zip(*np.unique(numbers, return_counts=True))
    )
