"""Structures from lists of ASE's Atoms, with the same labels as from a file."""

from __future__ import annotations

import filecmp
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from mlip_jax.datasets.formats.ase_frames import FileFrames, MemoryFrames, has_labels
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.readers import ase
from mlip_jax.structure import Structure
from mlip_jax.workdir import atomic_path

NAME = "structures"
# Reader options for files that `write_trajectory` has written.
TRAJECTORY_OPTIONS = "molecule_key=molecule"


class AtomsListReader(ase.Reader):
    """Reader of ASE's Atoms in memory.

    Args:
      atoms: Structures, with labels in `info`, `arrays` or the results of a calculator.
      options: Options of the reader of files, see `readers.ase.Reader`.
    """

    FROM_FILE = False

    def __init__(self, atoms: Sequence[Atoms], **options):
        self._atoms = atoms
        super().__init__(NAME, **options)

    def _open(self, format: str) -> FileFrames:
        return MemoryFrames(self._atoms)


def from_atoms(atoms: Sequence[Atoms], **options) -> tuple[list[Structure], bool]:
    """Convert ASE's Atoms to structures with their labels.

    Energies and forces are read from the results of a calculator, if they belong to the present
    positions, or from `info["energy"]` and `arrays["forces"]`. No calculator is run.

    Args:
      atoms: Structures.
      options: Options of `readers.ase.Reader`, such as `energy_key="dft_energy"`.

    Returns:
      The structures, and whether there are labels. If nothing looks like a label, energies and
      forces are unknown (NaN).

    Raises:
      DatasetError: There are no structures, or their labels are unclear.
    """
    atoms = list(atoms)
    if not atoms:
        raise DatasetError("expected at least one structure, received none")
    labelled = has_labels(MemoryFrames(atoms))
    if not labelled:
        options = {"energy_key": "", "forces_key": ""} | options
    report = ReadReport()
    reader = AtomsListReader(atoms, **options)
    structures = list(reader.read(range(len(atoms)), report))
    if report.skipped:
        reason, name = report.identities[0]
        raise DatasetError(f"{name}: {reason}; remove such structures")
    return structures, labelled


def write_trajectory(path: Path, structures: Sequence[Structure]) -> None:
    """Write structures with their labels as an ASE trajectory, atomically.

    Read it with the reader options `TRAJECTORY_OPTIONS`. A file with the same content keeps its
    modification time, so its store remains valid.
    """
    from ase.io.trajectory import Trajectory

    with atomic_path(path) as temporary:
        with Trajectory(str(temporary), "w") as file:
            for s in structures:
                atoms = Atoms(
                    s.numbers, s.positions, cell=s.cell, pbc=False if s.pbc is None else s.pbc
                )
                atoms.info = {"charge": s.charge, "molecule": s.molecule}
                atoms.info |= {"num_unpaired_electrons": s.spin} if s.spin else {}
                atoms.info |= {"smiles": s.smiles} if s.smiles else {}
                atoms.info |= {"config_type": s.subset} if s.subset else {}
                # Trajectories do not store arrays with other names. The stress is one of these labels; as a
                # result of the calculator as well, it would occur twice.
                labels = {**s.properties, **s.atom_properties}
                atoms.info |= {name: np.asarray(value).tolist() for name, value in labels.items()}
                labels = {} if math.isnan(s.energy) else {"energy": s.energy}
                labels |= {} if s.forces is None else {"forces": s.forces}
                atoms.calc = SinglePointCalculator(atoms, **labels)
                file.write(atoms)
        if path.exists() and filecmp.cmp(path, temporary, shallow=False):
            status = path.stat()
            os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))


def as_list(structures: Sequence[Atoms] | Atoms) -> list[Atoms]:
    """Return a list of Atoms.

    Raises:
      ValueError: An item is not Atoms.
    """
    items = [structures] if isinstance(structures, Atoms) else list(structures)
    for k, item in enumerate(items):
        if not isinstance(item, Atoms):
            raise ValueError(
                f"structures: expected ase.Atoms or the path of a file, received {item!r} at {k}"
            )
    return items
