"""File formats of trajectories: extended XYZ and HDF5. `read_trajectory` reads both."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ase import Atoms
from ase.io import read
from ase.io.extxyz import write_extxyz

from mlip_jax.files import open_in_place
from mlip_jax.simulation.dynamics import h5md


@dataclasses.dataclass(frozen=True)
class TrajectoryFormat:
    """Format of the frames of one molecule in one file.

    Attributes:
      suffix: Suffix of the file.
      unit: Unit of its size.
      append: Function (path, frames) that appends frames, see h5md.append.
      size: Function (path) that syncs the file and returns its size; 0 without a file.
      truncate: Function (path, size) that truncates the file.
      read: Function (path, slice) that returns some of the frames.
    """

    suffix: str
    unit: str
    append: Callable[[Path, Sequence[Atoms]], None]
    size: Callable[[Path], int]
    truncate: Callable[[Path, int], None]
    read: Callable[[Path, slice], list[Atoms]]


def read_trajectory(path: str | Path, frames: slice = slice(None)) -> list[Atoms]:
    """Read frames of a file of the task `md`, .xyz or .h5.

    Frames have positions (Å), energies (eV) and momenta; those of .xyz also have forces (eV/Å).
    `atoms.info` contains "step", "time_fs", "molecule" and, if known, "name", "charge" (e) and
    "num_unpaired_electrons".

    Args:
      path: File to read.
      frames: Slice of the frames; slice(-1, None) is the last one.

    Raises:
      OSError: If the file is missing or corrupted.
      ValueError: If the file has another format.
    """
    path = Path(path)
    form = next((form for form in FORMS.values() if form.suffix == path.suffix), None)
    if form is None:
        raise ValueError(
            f"{path}: unknown format of a trajectory; its name must end with "
            f"{' or '.join(f.suffix for f in FORMS.values())}"
        )
    return form.read(path, frames)


def _append_text(path: Path, frames: Sequence[Atoms]) -> None:
    """Append frames to a file of extended XYZ."""
    with open_in_place(path, "a") as file:
        for atoms in frames:
            buffer = io.StringIO()
            write_extxyz(buffer, [atoms], write_results=True)
            file.write(buffer.getvalue())


def _size_of_text(path: Path) -> int:
    """Sync a text file and return its size in bytes, 0 if it does not exist."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _truncate_text(path: Path, size: int) -> None:
    """Truncate a text file to `size` bytes."""
    if path.exists() and path.stat().st_size > size:
        with open_in_place(path, "r+b") as file:
            file.truncate(size)


def _read_text(path: Path, frames: slice) -> list[Atoms]:
    """Read frames from a file of extended XYZ."""
    return read(path, frames, format="extxyz")


EXTXYZ, HDF5 = "extxyz", "hdf5"
FORMS = {
    EXTXYZ: TrajectoryFormat(
        ".xyz", "bytes", _append_text, _size_of_text, _truncate_text, _read_text
    ),
    HDF5: TrajectoryFormat(".h5", "frames", h5md.append, h5md.size, h5md.truncate, h5md.read),
}
