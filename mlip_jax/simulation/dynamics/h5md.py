"""Trajectories in HDF5, in the layout of H5MD 1.1.

de Buyl, Colberg, Höfling, Comput. Phys. Commun. 185, 1546, 2014.

    particles/all/position, velocity    value (K, n, 3) float32 in Å and Å/fs, step (K,), time (K,)
                                        in fs; positions far from the origin are float64
    particles/all/box/edges             value (K, 3, 3) in Å, only for cells
    particles/all/species, mass         atomic numbers (n,), amu (n,)
    observables/all/potential_energy    value (K,) in eV

The attribute "unit" contains the unit. Files are appended to in HDF5's mode for a single writer and
multiple readers (SWMR), which orders the writes so that the file remains readable wherever the
writer is killed. Such a file is still marked as open for writing: `read` ignores the mark, other
programs may require `h5clear -s FILE`, and `cut` removes it.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator

from mlip_jax import __version__
from mlip_jax.datasets import hdf5
from mlip_jax.datasets.isolation.files import check_hdf5
from mlip_jax.datasets.near_origin import is_far
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.files import open_in_place
from mlip_jax.workdir import atomic_path

_ATOMS = "particles/all"
_POSITION, _VELOCITY, _EDGES = f"{_ATOMS}/position", f"{_ATOMS}/velocity", f"{_ATOMS}/box/edges"
_ENERGY = "observables/all/potential_energy"
_UNITS = {_POSITION: "Angstrom", _VELOCITY: "Angstrom fs-1", _EDGES: "Angstrom", _ENERGY: "eV"}
_LIBRARY = "v110"  # HDF5 1.10 is the first version with SWMR, and all later ones read its files
_CHUNK_BYTES = 1 << 14  # approximate size of a chunk
_BLOCK = 256  # frames that are copied at a time
_SIGNATURE = b"\x89HDF\r\n\x1a\n\x03"  # with the version of the header
_HEADER = struct.Struct("<9s19xQ")  # signature and length of the file
# Size and times of the files that this process has written or checked, by device and inode. A new file
# often gets the inode of a removed one.
_harmless: dict[tuple[int, int], tuple[int, int, int]] = {}


def append(path: Path, frames: Sequence[Atoms]) -> None:
    """Append frames of one molecule with energies, momenta, info["step"] and info["time_fs"].

    The file is created if it is missing; the other entries of the info of its first frame become
    attributes.

    Raises:
      OSError: If the file cannot be written.
    """
    if not path.exists():  # atomic: the first writes to a file are in no safe order
        with atomic_path(path) as temporary:
            _create(temporary, frames[0])
        _remember(path)
    _check_once(path)
    open_in_place(path, "r+b").close()  # HDF5 would follow a symbolic link
    with _appending(path) as file:
        count = _count(file)
        for name, values in _columns(frames).items():
            data = file[name]
            data.resize(count + len(values), axis=0)
            data[count:] = values
    _remember(path)


def read(path: Path, frames: slice = slice(None)) -> list[Atoms]:
    """Read frames as they were appended, also from a file that is being written.

    Positions near the origin and momenta are rounded to float32.

    Args:
      path: File to read.
      frames: Slice of the frames.

    Raises:
      OSError: If the file is missing or corrupted.
      ValueError: If the file contains something else.
    """
    _check_once(path)
    with _reading(path) as file:
        indices = range(_count(file))[frames]
        if not len(indices):
            return []
        first, last = min(indices), max(indices) + 1
        columns = {name: file[name][first:last] for name in dataset_names(file)}
        info, pbc = (
            dict(file[_ATOMS].attrs),
            np.asarray(file[f"{_ATOMS}/box"].attrs["boundary"]) == b"periodic",
        )
        numbers, masses = file[f"{_ATOMS}/species"][:], file[f"{_ATOMS}/mass"][:]
    return [
        _atoms(
            Atoms(numbers, masses=masses, pbc=pbc),
            info,
            {name: values[k - first] for name, values in columns.items()},
        )
        for k in indices
    ]


def size(path: Path) -> int:
    """Sync the file and return its number of frames; 0 if it does not exist.

    Raises:
      OSError: If the file is corrupted.
      ValueError: If the file contains something else.
    """
    if not path.exists():
        return 0
    _sync(path)
    _check_length(path)
    _check_once(path)
    with _reading(path) as file:
        return _count(file)


def truncate(path: Path, count: int) -> None:
    """Keep only the first `count` frames, atomically, in a file that is not marked as open.

    Raises:
      OSError: If the file is corrupted or cannot be written.
      ValueError: If the file contains something else.
    """
    if not count:
        path.unlink(missing_ok=True)
    elif size(path) != count or not _is_closed(path):
        with atomic_path(path) as temporary:
            _create(temporary, *read(path, slice(0, 1)))
            for start in range(0, count, _BLOCK):
                append(temporary, read(path, slice(start, min(start + _BLOCK, count))))


def _check_length(path: Path) -> None:
    """Raise OSError if a file without a writer is shorter than its header states.

    HDF5 would wait for the rest, for minutes or more, because it could still be written.
    """
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
        length = os.fstat(file.fileno()).st_size
    if len(header) == _HEADER.size:
        signature, end = _HEADER.unpack(header)
        if signature == _SIGNATURE and length < end:
            raise OSError(f"{path}: truncated to {length} of {end} bytes")


def _check_once(path: Path) -> None:
    """Raise OSError if HDF5 crashes on a file that this process has not written or checked."""
    if not path.is_file():
        return
    file, state = _identity(path)
    if _harmless.get(file) == state:
        return
    try:
        check_hdf5(path, growing=True)
    except DatasetError as error:
        raise OSError(str(error)) from error
    _harmless[file] = state


def _remember(path: Path) -> None:
    """Remember that this process has written the content of a file."""
    file, state = _identity(path)
    _harmless[file] = state


def _identity(path: Path) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Return device and inode of a file, and size and times that change with its content."""
    status = os.stat(path)
    state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return (status.st_dev, status.st_ino), state


def _sync(path: Path) -> None:
    """Write the file's data to disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _is_closed(path: Path) -> bool:
    """Return whether the file is not marked as open for writing."""
    try:
        h5py.File(path, "r", locking=False).close()
    except OSError:
        return False
    return True


def _create(path: Path, atoms: Atoms) -> None:
    """Create a file without frames."""
    with h5py.File(path, "w", libver=(_LIBRARY, _LIBRARY), locking=False) as file:
        file.create_group("h5md").attrs["version"] = [1, 1]
        file["h5md"].create_group("author").attrs["name"] = ""
        file["h5md"].create_group("creator").attrs.update(name="mlip_jax", version=__version__)
        file["h5md"].create_group("modules/units").attrs["version"] = [1, 0]
        box = file.create_group(f"{_ATOMS}/box")
        box.attrs["dimension"] = 3
        box.attrs["boundary"] = np.array([b"periodic" if p else b"none" for p in atoms.pbc])
        file[_ATOMS].attrs.update(
            {k: v for k, v in atoms.info.items() if k not in ("step", "time_fs")}
        )
        file[f"{_ATOMS}/species"] = atoms.numbers.astype(np.int32)
        file[f"{_ATOMS}/mass"] = atoms.get_masses()
        file[f"{_ATOMS}/mass"].attrs["unit"] = "u"
        for name, values in _columns([atoms]).items():
            row = values[0]
            rows = int(np.clip(_CHUNK_BYTES // max(row.nbytes, 1), 1, 256))
            data = file.create_dataset(
                name,
                (0, *row.shape),
                row.dtype,
                maxshape=(None, *row.shape),
                chunks=(rows, *row.shape),
            )
            if name.removesuffix("/value") in _UNITS:
                data.attrs["unit"] = _UNITS[name.removesuffix("/value")]
        file[f"{_POSITION}/time"].attrs["unit"] = "fs"
        for name in (_VELOCITY, _EDGES, _ENERGY):
            if name in file:  # hard links: all data sets have the same steps
                file[f"{name}/step"], file[f"{name}/time"] = (
                    file[f"{_POSITION}/step"],
                    file[f"{_POSITION}/time"],
                )


def _columns(frames: Sequence[Atoms]) -> dict[str, np.ndarray]:
    """Return the values of the data sets by name, one row per frame."""
    dtype = np.float64 if is_far(frames[0].positions) else np.float32
    values_by_name = {
        f"{_POSITION}/value": np.array([a.positions for a in frames], dtype),
        f"{_VELOCITY}/value": np.array([a.get_velocities() * units.fs for a in frames], np.float32),
        f"{_ENERGY}/value": np.array([a.get_potential_energy() for a in frames], np.float64),
        f"{_POSITION}/time": np.array([a.info["time_fs"] for a in frames], np.float64),
        f"{_POSITION}/step": np.array([a.info["step"] for a in frames], np.int64),
    }
    if frames[0].pbc.any():
        values_by_name[f"{_EDGES}/value"] = np.array([a.cell.array for a in frames], np.float64)
    return values_by_name


def dataset_names(file: Mapping[str, object]) -> list[str]:
    """Return the names of the data sets with one row per frame."""
    values = [_POSITION, _VELOCITY, _ENERGY] + ([_EDGES] if _EDGES in file else [])
    return [*(f"{name}/value" for name in values), f"{_POSITION}/time", f"{_POSITION}/step"]


def _count(file: h5py.File) -> int:
    """Return the number of complete frames.

    A writer that was killed may have left some data sets longer than others.
    """
    return min(len(file[name]) for name in dataset_names(file))


def _atoms(atoms: Atoms, info: Mapping[str, object], row: Mapping[str, np.ndarray]) -> Atoms:
    """Return the frame of a row. `atoms` is modified; its positions are not set."""
    atoms.positions = row[f"{_POSITION}/value"]
    atoms.set_velocities(row[f"{_VELOCITY}/value"].astype(np.float64) / units.fs)
    if f"{_EDGES}/value" in row:
        atoms.set_cell(row[f"{_EDGES}/value"])
    atoms.info = {
        "step": int(row[f"{_POSITION}/step"]),
        "time_fs": float(row[f"{_POSITION}/time"]),
        **{k: v.item() if isinstance(v, np.generic) else v for k, v in info.items()},
    }
    atoms.calc = SinglePointCalculator(atoms, energy=float(row[f"{_ENERGY}/value"]))
    return atoms


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading while it may be written. Raise ValueError if it has no trajectory."""
    # no locks: a reader must not stop a run
    with (
        _report_corruption(path),
        h5py.File(path, "r", libver="latest", swmr=True, locking=False) as file,
    ):
        _check(file, path)
        yield file


@contextlib.contextmanager
def _appending(path: Path) -> Iterator[h5py.File]:
    """Open a file for appending directly in SWMR mode.

    If the mode were switched later, a kill in between would leave the file closed to all readers.
    """
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_file_locking(False, True)
    flags = h5py.h5f.ACC_RDWR | h5py.h5f.ACC_SWMR_WRITE
    with (
        _report_corruption(path),
        h5py.File(h5py.h5f.open(os.fsencode(path), flags, access)) as file,
    ):
        _check(file, path)
        yield file


def _check(file: h5py.File, path: Path) -> None:
    """Raise ValueError unless all arrays of a trajectory are in the file itself."""
    root = hdf5.Hdf5Group(file["/"].id, f"{path.name}:")
    if any(name not in root for name in (_POSITION, _VELOCITY, _ENERGY)):
        raise ValueError(
            f"{path}: not a trajectory; expected {_POSITION}, {_VELOCITY} and {_ENERGY}"
        )
    arrays = [f"{_ATOMS}/{name}" for name in ("species", "mass")]
    steps = [f"{name}/step" for name in (_POSITION, _VELOCITY, _ENERGY)]
    for name in (f"{_ATOMS}/box", *dataset_names(root), *steps, *arrays):
        root[name]


@contextlib.contextmanager
def _report_corruption(path: Path) -> Iterator[None]:
    """Raise OSError for the exceptions with which h5py reports corrupted or missing parts."""
    try:
        yield
    except (RuntimeError, KeyError) as error:
        raise OSError(f"{path}: corrupted: {error}") from error
