"""Zero-padded .npz file of QM7-X, described in readers/qm7x.py, and energies of isolated atoms."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlip_jax.datasets.formats import npz
from mlip_jax.datasets.formats.elements import validate_numbers
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.structure import Structure, hill_formula

# Energies of isolated atoms (eV), PBE0, as published in the script of the data set.
ATOM_ENERGIES = {
    1: -13.641404161,
    6: -1027.592489146,
    7: -1484.274819088,
    8: -2039.734879322,
    16: -10828.707468187,
    17: -12516.444619523,
}
BINDING = (-9.0, -0.5)  # eV per atom; QM7-X has -6 to -3
_BLOCK = 512  # rows of an .npz file read at once


class PaddedFile:
    """Rows of the zero-padded .npz file."""

    def __init__(self, path: Path):
        self.paths = [path]
        self._file = npz.NpzFile(path)
        try:
            self._check()
        except DatasetError:
            self.close()
            raise

    def __len__(self) -> int:
        return self._file.members["R"].shape[0]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, records: range, report: ReadReport) -> Iterator[Structure]:
        """Yield the structures of the records."""
        for at in range(0, len(records), _BLOCK):
            block = records[at : at + _BLOCK]
            start, stop = block[0], block[-1] + 1
            # Arrays of the block: (b, N), (b, N, 3), (b, 1) and (b, N, 3).
            z, R, E, F = (self._file.rows(k, start, stop) for k in "zREF")
            for record in block:
                i = record - start
                report.records += 1
                structure = self._structure(record, z[i], R[i], E[i], F[i])
                if not np.isfinite(structure.positions).all():
                    report.skip("positions not finite", structure.source)
                    continue
                report.structures += 1
                report.add_unread(k for k in self._file.members if k not in "zREF")
                yield structure

    def _structure(self, record, z, R, E, F) -> Structure:
        """Convert a row to a structure without padding."""
        real = z > 0  # padding has atomic number 0
        source = f"{self.paths[0].name}:{record}"
        numbers = validate_numbers(z[real], source)
        energy = float(E.reshape(-1)[0])
        if not len(numbers) or (z < 0).any():
            raise DatasetError(
                f"{source}: invalid atomic numbers {z.tolist()}: expected positive integers, "
                "padded with zeros"
            )
        check_energy(energy, numbers, source)
        return Structure(
            numbers=numbers,
            positions=R[real].astype(np.float64),
            energy=energy,
            forces=F[real].astype(np.float64),
            molecule=hill_formula(numbers),
            record=record,
            source=source,
        )

    def _check(self) -> None:
        """Raise DatasetError if arrays are missing or have inconsistent shapes."""
        members, path = self._file.members, self.paths[0]
        missing = [k for k in "zREF" if k not in members]
        if missing:
            raise DatasetError(
                f"{path}: expected the arrays z, R, E, F of the padded format of QM7-X; {missing} "
                f"missing, found {sorted(members)}"
            )
        shape = members["z"].shape
        if len(shape) != 2 or not shape[0]:
            raise DatasetError(
                f"{path}: z has shape {shape}, expected (structures, largest number of atoms)"
            )
        expected = {"R": [(*shape, 3)], "E": [(shape[0],), (shape[0], 1)], "F": [(*shape, 3)]}
        for k, shapes in expected.items():
            if members[k].shape not in shapes:
                raise DatasetError(
                    f"{path}: {k} has shape {members[k].shape}, expected {shapes[-1]}"
                )


def check_energy(energy: float, numbers: np.ndarray, source: str) -> None:
    """Raise DatasetError unless the energy is a few eV per atom below that of isolated atoms."""
    binding = binding_energy(energy, numbers)
    if np.isfinite(binding) and not BINDING[0] < binding < BINDING[1]:
        raise DatasetError(
            f"{source}: the energy {energy:.6f} is {binding:.3f} eV per atom relative to the "
            f"isolated atoms, expected {BINDING[0]} to {BINDING[1]}: not a total PBE0 energy in "
            "eV. Is this a QM7-X file?"
        )


def binding_energy(energy: float, numbers: np.ndarray) -> float:
    """Return the energy minus that of the isolated atoms, per atom (eV)."""
    return (energy - sum(ATOM_ENERGIES.get(z, np.nan) for z in numbers.tolist())) / max(
        1, len(numbers)
    )


def is_padded(path: Path) -> bool:
    """Return whether an .npz file is the padded form of QM7-X, judged by its first energy."""
    members = npz.members(path)
    if not {"z", "R", "E", "F"} <= set(members) or len(members["z"].shape) != 2:
        return False
    try:
        with npz.NpzFile(path) as file:
            z, energy = file.rows("z", 0, 1)[0], file.rows("E", 0, 1).reshape(-1)[0]
        return BINDING[0] < binding_energy(float(energy), z[z > 0]) < BINDING[1]
    except (DatasetError, IndexError, ValueError, TypeError):
        return False
