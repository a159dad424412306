"""Output files of molecular dynamics, and the restart file that ties them to a step.

    thermo.csv                  one line per recorded step and molecule
    trajectories/NUMBER.xyz     frames of a molecule in extended XYZ: energy (eV), forces (eV/Å),
                                momenta (ASE's unit)
    trajectories/NUMBER.h5      or in HDF5, see h5md.py: energy, positions, velocities
    restart.npz                 everything needed to resume, and the sizes of the files above

The restart file is replaced atomically after the other files have been synced. On resuming, the
other files are truncated to the sizes it contains.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms

from mlip_jax.files import NUMPY_ERRORS, make_subfolder, open_in_place, write_text
from mlip_jax.foreign_files.archives import open_npz
from mlip_jax.simulation.dynamics.results import FramesOfBatches, Thermo
from mlip_jax.simulation.dynamics.trajectories import EXTXYZ, FORMS, TrajectoryFormat
from mlip_jax.structure import electronic_state
from mlip_jax.workdir import atomic_open

THERMO, TRAJECTORIES, RESTART = "thermo.csv", "trajectories", "restart.npz"
COLUMNS = (
    "step",
    "time_fs",
    "molecule",
    "potential_ev",
    "kinetic_ev",
    "total_ev",
    "temperature_k",
    "conserved_ev",
    "volume_ang3",
    "pressure_bar",
)
# _METADATA: key of JSON metadata in the restart file; not the name of an array of a snapshot
_METADATA = "about_files"


class OutputError(RuntimeError):
    """Files of a run cannot be written or read."""


class DynamicsOutputs:
    """Output files of a run."""

    def __init__(self, workdir: str | Path, names: Sequence[str], trajectory_format: str = EXTXYZ):
        """Create the outputs without touching any file.

        Args:
          workdir: Folder for the files.
          names: Names of the molecules, which their frames contain; "" for none.
          trajectory_format: One of trajectories.FORMS.
        """
        self._workdir, self._names, self._form = Path(workdir), names, FORMS[trajectory_format]

    def name(self, molecule: int) -> str:
        """Return the name of a molecule, "" for none."""
        return self._names[molecule]

    def trajectory(self, molecule: int) -> Path:
        """Return the trajectory file of a molecule."""
        number = f"{molecule:0{len(str(len(self._names) - 1))}d}"
        return self._workdir / TRAJECTORIES / f"{number}{self._form.suffix}"

    @property
    def _files(self) -> list[tuple[Path, TrajectoryFormat]]:
        """Return all files that grow, with the format that measures their size.

        The table is measured like text.
        """
        trajectories = (self.trajectory(m) for m in range(len(self._names)))
        return [
            (self._workdir / THERMO, FORMS[EXTXYZ]),
            *((path, self._form) for path in trajectories),
        ]

    def begin(self) -> None:
        """Remove earlier files and start an empty table.

        Raises:
          OutputError: If the files cannot be written.
        """
        try:
            make_subfolder(self._workdir / TRAJECTORIES)
            for path, _ in self._files:
                path.unlink(missing_ok=True)
            write_text(self._workdir / THERMO, ",".join(COLUMNS) + "\n")
        except OSError as error:
            raise OutputError(f"{self._workdir}: cannot be written: {error}") from error

    def write(self, thermo: Thermo, frames: FramesOfBatches, timestep: float) -> None:
        """Append energies and frames.

        Args:
          thermo: Energies and temperatures.
          frames: Frames.
          timestep: Time step (fs).

        Raises:
          OutputError: If the files cannot be written.
        """
        by_molecule: dict[int, list[Atoms]] = {}
        for step, m, atoms in frames:
            info = {"step": step, "time_fs": step * timestep, "molecule": m}
            info |= {"name": self._names[m]} if self._names[m] else {}
            atoms.info = info | electronic_state(atoms)
            by_molecule.setdefault(m, []).append(atoms)
        try:
            with open_in_place(self._workdir / THERMO, "a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(_rows(thermo))
            for m, atoms_of_molecule in by_molecule.items():
                self._form.append(self.trajectory(m), atoms_of_molecule)
        except OSError as error:
            raise OutputError(
                f"{self._workdir}: cannot be written: {error}. Fix the cause and rerun the "
                f"same command to resume from {RESTART}."
            ) from error

    def save(self, snapshot: Mapping[str, np.ndarray], seconds: float) -> None:
        """Write the restart file.

        Args:
          snapshot: Snapshot of the dynamics.
          seconds: Duration of the run so far.

        Raises:
          OutputError: If the file cannot be written; the previous one still exists.
        """
        path = self._workdir / RESTART
        try:
            sizes = [form.size(file) for file, form in self._files]
            metadata = json.dumps({"sizes": sizes, "seconds": seconds})
            with atomic_open(path) as file:
                np.savez(file, **snapshot, **{_METADATA: np.array(metadata)})
        except (OSError, ValueError) as error:
            raise OutputError(f"{path}: cannot be written: {error}") from error

    def load(self) -> tuple[dict[str, np.ndarray], float] | None:
        """Read the restart file, and truncate the other files to their sizes at that time.

        Returns:
          The snapshot and the duration of the run until then (seconds); None if there is no restart
          file.

        Raises:
          OutputError: If the restart file is corrupted, or one of the other files is too short.
        """
        path = self._workdir / RESTART
        if not path.exists():
            return None
        try:
            with open_npz(path) as file:
                snapshot = {name: file[name] for name in file.files}
            metadata = json.loads(str(snapshot.pop(_METADATA)))
            sizes, seconds = [int(size) for size in metadata["sizes"]], float(metadata["seconds"])
        except NUMPY_ERRORS as error:
            raise OutputError(
                f"{path}: corrupted ({error}). Remove it to start over, or give another --workdir."
            ) from error
        if len(sizes) != len(self._files):
            raise OutputError(
                f"{path}: belongs to a run of {len(sizes) - 1} molecules, this run has "
                f"{len(self._names)}. Give another --workdir."
            )
        for (file, form), size in zip(self._files, sizes):
            self._truncate(file, form, size)
        return snapshot, seconds

    @staticmethod
    def _truncate(file: Path, form: TrajectoryFormat, size: int) -> None:
        """Truncate a file to its size when the restart file was written."""
        remedy = f"Restore it, or remove {RESTART} to start over."
        try:
            actual = form.size(file)
            if actual >= size:
                form.truncate(file, size)
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{file}: cannot be read or truncated to {size} {form.unit}: {error}. {remedy}"
            ) from error
        if actual < size:
            raise OutputError(
                f"{file}: contains {actual} {form.unit}, but contained {size} when {RESTART} "
                f"was written. {remedy}"
            )


def _rows(thermo: Thermo):
    """Yield the rows of the table."""
    columns = (
        thermo.potential,
        thermo.kinetic,
        thermo.total,
        thermo.temperature,
        thermo.conserved,
        thermo.volume,
        thermo.pressure,
    )
    for k, (step, time) in enumerate(zip(thermo.step.tolist(), thermo.time.tolist())):
        for m, values in enumerate(zip(*(column[k].tolist() for column in columns))):
            if values[0] == values[0]:  # skip molecules that broke earlier
                yield [step, time, m, *("" if v != v else v for v in values)]
