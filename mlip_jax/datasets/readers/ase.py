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

The total charge is the label `charge_key`, or one of its usual names. If a frame lacks it, the
charge of its SMILES is used. Without SMILES, it is the sum of ASE's initial charges if that is an
integer within 0.001, otherwise 0: initial charges are often partial charges, whose sum is not a total charge.

Extended XYZ, databases and trajectories can be read from any frame. Other formats must be read from
the first frame on (`sequential`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlip_jax.datasets import file_units, options, reader
from mlip_jax.datasets.charges import total_charge, whole_charge
from mlip_jax.datasets.formats.ase_database import is_ase_database
from mlip_jax.datasets.formats.ase_frames import FileFrames, Frame, is_trajectory, open_frames
from mlip_jax.datasets.formats.elements import validate_numbers
from mlip_jax.datasets.formats.frame_labels import (
    label_names,
    label_of,
    numbers_of,
    plain,
    similar_to_forces,
    text_of,
    unread_labels,
    value_of,
)
from mlip_jax.datasets.formats.xyz import is_xyz
from mlip_jax.datasets.identity import molecule_identity
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.stress import (
    NO_STRESS,
    STRESS,
    StressConversion,
    check_property_names,
    common_stress,
    same_stress,
    stress_names,
)
from mlip_jax.state_labels import (
    ElectronicStateError,
    charge_names,
    find_charge,
    find_unpaired,
    spin_names,
    unpaired_of_moments,
)
from mlip_jax.structure import Structure, cell_problem, hill_formula

_FIRST = 10  # number of frames whose labels an error lists
_SAMPLED = 32  # number of further frames, at regular distances, that are searched for a stress


class Reader(reader.Reader):
    """Reader of files that ASE supports. A record is a frame or a row.

    Args:
      path: Path of the file.
      energy_key: Name of the energy; "" for none. A file without this label is rejected with a list
        of its labels. "energy" includes the energy (hartree) that CREST, xtb and ORCA write into
        the comment line without a name.
      forces_key: Name of the forces; "" for none. Frames without anything like forces are read
        without them.
      charge_key: Name of the total charge. "charge" includes other usual names, such as
        total_charge. "" takes it from the SMILES or the initial charges.
      spin_key: Name of the number of unpaired electrons or of the multiplicity. "spin" includes
        other usual names and the initial magnetic moments of molecules. "" reads none.
      stress_key: Name of the stress or virial of structures that are periodic in three directions.
        "stress" includes other usual names, such as virial and REF_stress. "none" or "" ignores
        them.
      molecule_key: Name of the text or number that identifies the molecule. "" uses the SMILES if
        present (identity.py), otherwise the chemical formula; isomers then count as one molecule.
      smiles_key: Name of the SMILES. Frames may lack it.
      property_keys: Names of additional labels per structure.
      atom_property_keys: Names of additional labels per atom.
      energy_unit: Energy unit: eV, meV, hartree (Ha), rydberg (Ry), kcal/mol or kJ/mol. "" means
        hartree for energies without a name in the comment line, and eV for all others.
      length_unit: Length unit: Ang, bohr, nm or pm.
      forces_unit: Force unit, e.g. "hartree/bohr". "" means energy_unit/length_unit.
      forces_are_gradients: Whether the file has the gradient, whose sign is then changed.
      stress_unit: Unit of the stress: GPa, kbar or e.g. "eV/Ang^3". "" means
        energy_unit/length_unit³. Virials are in energy_unit.
      stress_sign_reversed: Whether the stress or virial has the opposite sign of ASE's, whose stress is
        positive under tension.
      format: ASE's name of the file format; "" detects it.
      level_of_theory: Description of the level of theory of the labels.
    """

    LEVEL_OF_THEORY = "unknown"
    UNITS = file_units.READER_UNITS
    GENERAL = True
    UNREAD_REMEDY = (
        "To read one, give its name as energy_key, forces_key, charge_key, stress_key, "
        f"property_keys or atom_property_keys, e.g. {options.as_flag('property_keys', 'NAME')}."
    )
    PROBLEM_OPTIONS = file_units.READER_PROBLEM_OPTIONS

    def __init__(
        self,
        path: str | Path,
        *,
        energy_key: str = "energy",
        forces_key: str = "forces",
        charge_key: str = "charge",
        spin_key: str = "spin",
        stress_key: str = STRESS,
        molecule_key: str = "",
        smiles_key: str = "smiles",
        property_keys: tuple[str, ...] = (),
        atom_property_keys: tuple[str, ...] = (),
        energy_unit: str = "",
        length_unit: str = "Ang",
        forces_unit: str = "",
        forces_are_gradients: bool = False,
        stress_unit: str = "",
        stress_sign_reversed: bool = False,
        format: str = "",
        level_of_theory: str = "",
    ):
        super().__init__(path)
        self.level_of_theory = (
            options.text("level_of_theory", level_of_theory) or self.LEVEL_OF_THEORY
        )
        self._keys = options.keys(
            energy=energy_key,
            forces=forces_key,
            charge=charge_key,
            spin=spin_key,
            stress="" if stress_key == NO_STRESS else stress_key,
            molecule=molecule_key,
            smiles=smiles_key,
        )
        property_keys = options.texts("property_keys", property_keys)
        check_property_names(property_keys)
        atom_property_keys = options.texts("atom_property_keys", atom_property_keys)
        self._units = file_units.FileUnits.from_options(
            energy_unit or "eV", length_unit, forces_unit, forces_are_gradients
        )
        self._comment_energy = file_units.energy_unit(energy_unit or "hartree")
        self._stress = StressConversion.from_options(
            stress_unit, stress_sign_reversed, self._units.energy, self._units.length
        )
        self._frames = self._open(options.text("format", format))
        self.sequential = self._frames.sequential
        try:
            if not len(self._frames):
                raise DatasetError(f"{self.path}: the file contains no frames")
            # Report typos in options on opening.
            self._check_keys()
            self._reads_stress = self._has_stress()
            self._property_shapes = self._shapes(property_keys, "property_keys", False)
            self._atom_shapes = self._shapes(atom_property_keys, "atom_property_keys", True)
            self._read = {k for k in self._keys.values() if k} | {"config_type"}
            self._read |= {*property_keys, *atom_property_keys}
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

        Frames without atoms, with positions that are not finite or with an invalid cell are
        skipped.
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
            if problem := cell_problem(frame.cell, frame.pbc):
                report.skip(problem, source)
                continue
            validate_numbers(frame.numbers, source)
            self._check_forces(frame, source)
            report.structures += 1
            yield self._structure(frame, record, source, report)
            read = {*self._state_names(frame)}
            read |= {*self._stress_names(frame)} if self._reads_stress else set()
            report.add_unread(unread_labels(frame, self._read | read))

    def _structure(self, frame: Frame, record: int, source: str, report: ReadReport) -> Structure:
        """Convert a frame to a structure in eV and Å."""
        n, periodic = len(frame.numbers), bool(np.any(frame.pbc))
        forces = (
            label_of(frame, self._keys["forces"], (n, 3), True, source)
            if self._keys["forces"]
            else None
        )
        smiles = text_of(frame, self._keys["smiles"])
        return Structure(
            numbers=frame.numbers,
            positions=frame.positions * self._units.length,
            energy=self._total_energy(frame, source, report),
            forces=None if forces is None else forces * self._units.forces,
            **self._electronic_state(frame, smiles, source, report),
            cell=frame.cell * self._units.length if periodic else None,
            pbc=frame.pbc if periodic else None,
            molecule=self._molecule(frame, smiles, source),
            smiles=smiles,
            record=record,
            source=source,
            subset=text_of(frame, "config_type"),
            properties={
                k: plain(label_of(frame, k, shape, False, source))
                for k, shape in self._property_shapes.items()
            }
            | ({STRESS: self._stress_of(frame, source)} if self._reads_stress else {}),
            atom_properties={
                k: label_of(frame, k, (n, *shape), True, source)
                for k, shape in self._atom_shapes.items()
            },
        )

    def _total_energy(self, frame: Frame, source: str, report: ReadReport) -> float:
        """Return the total energy of a frame (eV), NaN if it is missing."""
        key = self._keys["energy"]
        if key == "energy" and not frame.has(key) and frame.comment_energy is not None:
            report.remark(
                f"{self.path.name}: the energy is the number in the comment line, as written by "
                f"CREST, xtb and ORCA, in units of {self._comment_energy:.6g} eV"
            )
            return frame.comment_energy * self._comment_energy
        return float(label_of(frame, key, (), False, source)) * self._units.energy

    def _has_stress(self) -> bool:
        """Return whether the file has stresses. Structures without one then get NaN.

        A file may begin with molecules, so the index of an XYZ file, or a sample of another file,
        is searched. `_check_keys` has found a name that the user gives.
        """
        if self._keys["stress"] not in ("", STRESS):
            return True
        frames, chosen = self._frames, {*range(min(_FIRST, len(self._frames)))}
        if frames.first is not None:
            chosen |= {frames.first[name] for name in stress_names(frames.first)}
        elif not frames.sequential:
            chosen |= {*np.linspace(0, len(frames) - 1, _SAMPLED).astype(int).tolist()}
        return any(
            self._stress_names(frame)
            for k in sorted(chosen)
            for frame in frames.read(range(k, k + 1))
        )

    def _stress_names(self, frame: Frame) -> list[str]:
        """Return the names of the labels of a frame that contain its stress."""
        key, names = self._keys["stress"], (*frame.labels, *frame.results)
        if not np.all(frame.pbc):
            return []
        return stress_names(names) if key == STRESS else [name for name in names if name == key]

    def _stress_of(self, frame: Frame, source: str) -> np.ndarray:
        """Return the stress of a frame (eV/Å³), (3, 3); NaN if it is missing."""
        cell = frame.cell * self._units.length
        stresses = {}
        for name in self._stress_names(frame):
            value = value_of(frame, name, source, functools.partial(same_stress, name, source))
            stresses[name] = self._stress.convert(value, name, cell, source)
        return common_stress(stresses, source)

    def _check_forces(self, frame: Frame, source: str) -> None:
        """Raise DatasetError if a frame has forces under another name than the requested one."""
        key = self._keys["forces"]
        if key and not frame.has(key) and (similar := similar_to_forces(frame)):
            raise DatasetError(
                f"{source}: {key!r} is missing, but {', '.join(similar)} looks like forces. Give "
                f"the name, {options.as_flag('forces_key', similar[0])}, or none, "
                f"{options.as_flag('forces_key', repr(''))}."
            )

    def _state_names(self, frame: Frame) -> list[str]:
        """Return the names of the labels of a frame that contain its total charge and spin."""
        names = (*frame.labels, *frame.arrays, *frame.results)
        charge, spin = self._keys["charge"], self._keys["spin"]
        return [
            *(charge_names(names) if charge == "charge" else [n for n in names if n == charge]),
            *(spin_names(names) if spin == "spin" else [n for n in names if n == spin]),
        ]

    def _electronic_state(
        self, frame: Frame, smiles: str, source: str, report: ReadReport
    ) -> dict[str, float]:
        """Return the total charge (e) and the number of unpaired electrons of a frame."""
        labels = {name: value_of(frame, name, source) for name in self._state_names(frame)}
        charge_key, spin_key = self._keys["charge"], self._keys["spin"]
        try:
            known = find_charge(labels, None if charge_key == "charge" else [charge_key])
            charge = total_charge(known, smiles, frame.charge)
            names = None if spin_key == "spin" else [spin_key]
            unpaired = find_unpaired(labels, frame.numbers, charge, names)
            if unpaired is None and spin_key == "spin":
                unpaired = unpaired_of_moments(frame.moments, frame.numbers, charge, frame.pbc)
        except ElectronicStateError as error:
            raise DatasetError(f"{source}: {error}") from error
        if known is None and not smiles and whole_charge(frame.charge) is None:
            report.remark(
                f"{self.path.name}: the initial charges of the atoms do not add up to an integer, "
                "so they are not a total charge, and the structure is treated as neutral. If there "
                f"is a label of the total charge, set it, {options.as_flag('charge_key', 'NAME')}"
            )
        return {"charge": charge, "spin": unpaired or 0.0}

    def _molecule(self, frame: Frame, smiles: str, source: str) -> str:
        """Return the identity of the molecule of a frame."""
        key = self._keys["molecule"]
        name = (
            text_of(frame, key) if key else molecule_identity(smiles) or hill_formula(frame.numbers)
        )
        if not name:
            raise DatasetError(
                f"{source}: has no {key!r} to identify its molecule; found: "
                f"{label_names([frame])}. Change or remove molecule_key."
            )
        return name

    def _check_keys(self) -> None:
        """Raise DatasetError if no frame has a requested label.

        The default names of charge, SMILES and forces may be missing.
        """
        for option in ("energy", "molecule"):
            if self._keys[option]:
                self._require(self._keys[option], f"{option}_key")
        for option in ("charge", "spin", "smiles", "forces", "stress"):
            if self._keys[option] not in ("", option):
                self._require(self._keys[option], f"{option}_key")
        # Every frame is checked when it is read; the first ones also before a conversion starts.
        for i, frame in enumerate(self._frames.read(range(min(_FIRST, len(self._frames))))):
            self._check_forces(frame, f"{self.path}:{i}")

    def _require(self, key: str, option: str) -> Frame:
        """Return the first frame with the label `key`. Raise DatasetError if there is none."""
        first = next(self._frames.read(range(1)))
        if first.has(key) or key == "energy" and first.comment_energy is not None:
            return first
        frame = self._frames.first_with(key)
        if frame is None:
            frames = list(self._frames.read(range(min(_FIRST, len(self._frames)))))
            raise DatasetError(
                f"{self.path}: {key!r} is in none of the {len(self._frames)} frames; found in the "
                f"first {len(frames)}: {label_names(frames)}. Give the name, "
                f"{options.as_flag(option, 'NAME')}"
                + (
                    "."
                    if option == "molecule_key"
                    else ", or none, " + options.as_flag(option, "''") + "."
                )
            )
        return frame

    def _shapes(self, keys: tuple[str, ...], option: str, atoms: bool) -> dict[str, tuple]:
        """Return the shape of each label, without the axis of the atoms if `atoms` is set."""
        shapes = {}
        for key in keys:
            frame = self._require(key, option)
            shapes[key] = np.shape(
                numbers_of(value_of(frame, key, str(self.path)), key, str(self.path))
            )
            shapes[key] = shapes[key][1:] if atoms else () if shapes[key] == (1,) else shapes[key]
        return shapes
