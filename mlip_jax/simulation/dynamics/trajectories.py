"""The forms that trajectories have on disk: extended XYZ and HDF5. `read_trajectory` reads both."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ase import Atoms
from ase.io import read
from ase.io.extxyz import write_extxyz

from mlip_jax.simulation.dynamics import h5md


@dataclasses.dataclass(frozen=True)
class TrajectoryFormat:
    """How the frames of a molecule are kept in a file of its own.

    Attributes:
      suffix: Of the file. unit: In which its size is counted.
      append: Add frames at the end, (path, frames); see h5md.append.
      size: How much there is, all of it on disk then; 0 without a file.
      cut: Leave so much, (path, size).
      read: Some of the frames, (path, slice).
    """

    suffix: str
    unit: str
    append: Callable[[Path, Sequence[Atoms]], None]
    size: Callable[[Path], int]
    cut: Callable[[Path, int], None]
    read: Callable[[Path, slice], list[Atoms]]


def read_trajectory(path: str | Path, frames: slice = slice(None)) -> list[Atoms]:
    """Frames of a file of the task `md`, .xyz or .h5, with energies (eV) and momenta; of .xyz also forces (eV/Å).

    `atoms.info` has "step", "time_fs", "molecule" and, where they are known, "name", "charge" (e) and
    "num_unpaired_electrons". Positions are in Å.

    Args:
      frames: Which of them; slice(-1, None) is the last.

    Raises:
      OSError: The file is missing or damaged.
      ValueError: It is of another kind.
    """
    path = Path(path)
    form = next((form for form in FORMS.values() if form.suffix == path.suffix), None)
    if form is None:
        raise ValueError(f"{path}: a trajectory ends with {' or '.join(f.suffix for f in FORMS.values())}")
    return form.read(path, frames)


def _append_text(path: Path, frames: Sequence[Atoms]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        for atoms in frames:
            buffer = io.StringIO()
            write_extxyz(buffer, [atoms], write_results=True)
            file.write(buffer.getvalue())


def _size_of_text(path: Path) -> int:
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _cut_text(path: Path, size: int) -> None:
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)


def _read_text(path: Path, frames: slice) -> list[Atoms]:
    return read(path, frames, format="extxyz")


EXTXYZ, HDF5 = "extxyz", "hdf5"
FORMS = {EXTXYZ: TrajectoryFormat(".xyz", "bytes", _append_text, _size_of_text, _cut_text, _read_text),
         HDF5: TrajectoryFormat(".h5", "frames", h5md.append, h5md.size, h5md.cut, h5md.read)}
