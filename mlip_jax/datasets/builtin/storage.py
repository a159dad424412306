"""Files of the generators: finished parts during a run, and one HDF5 file in the layout of SPICE.

All files are written to a temporary file next to their destination and then renamed, so an existing
file is always complete. Parts are npz archives, one per molecule, in `<path>.parts/`.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
from ase.data import chemical_symbols
from ase.units import Bohr, Hartree

from mlip_jax.datasets import hdf5
from mlip_jax.datasets.builtin.conformations import Conformations
from mlip_jax.datasets.builtin.labels import METHOD
from mlip_jax.datasets.builtin.molecules import Molecule
from mlip_jax.files import NUMPY_ERRORS, make_subfolder, open_lock
from mlip_jax.foreign_files.archives import open_npz
from mlip_jax.foreign_files.texts import parse_json
from mlip_jax.workdir import atomic_open

log = logging.getLogger(__name__)

NOTE = (
    "Labels are GFN2-xTB, a semi-empirical method, and not the wB97M-D3(BJ)/def2-TZVPPD of SPICE; "
    "only the layout and the names of the datasets are those of SPICE."
)


def write_atomically(path: Path, data: bytes) -> None:
    """Write bytes to `path` atomically. The caller must hold the lock of `Parts`.

    Raises:
      OSError: The file cannot be written. The message gives the cause and a remedy; the temporary
        file is removed.
    """
    try:
        with atomic_open(path) as file:
            file.write(data)
    except OSError as error:
        raise with_remedy(error, path, f"{len(data)} bytes") from error


def with_remedy(error: OSError, path: Path, content: str) -> OSError:
    """Return an OSError with the same errno, and a message with the failed file and a remedy."""
    return type(error)(
        error.errno,
        f"could not write {content} ({error.strerror or error}). Free disk space or choose a "
        "writable folder, then rerun. Finished parts are kept.",
        str(path),
    )


class Parts:
    """Finished molecules of a run, in a folder next to the HDF5 file that they are merged to.

    As a context manager it holds a lock. A second run for the same file waits and then finds the
    file.

    Args:
      path: Path of the HDF5 file.
      parameters: Parameters that determine the parts. Parts with other parameters are removed.

    Raises:
      OSError: The folder cannot be created or is not writable.
    """

    def __init__(self, path: str | Path, parameters: dict):
        self.path = Path(path)
        self.folder = self.path.with_name(self.path.name + ".parts")
        self._parameters = json.dumps(parameters, sort_keys=True)
        self._lock = None

    def __enter__(self):
        try:
            self._lock = self._acquire()
        except OSError as error:
            raise with_remedy(error, self.folder, "the folder for finished parts") from error
        try:
            self._adopt()
        except BaseException:
            # __exit__ is not called if __enter__ fails, and the next run would wait forever.
            self._lock.close()
            raise
        return self

    def __exit__(self, *_):
        self._lock.close()

    def _acquire(self):
        """Return an open, locked file in the folder.

        The folder may disappear while waiting, when another run finishes. The lock is then tried
        again in a new folder.
        """
        while True:
            make_subfolder(self.folder)
            try:
                lock = open_lock(self.folder / "lock")
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another process is generating %s; waiting for it", self.path)
                fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(lock.name), os.fstat(lock.fileno())):
                    return lock
            lock.close()

    def _adopt(self):
        """Keep existing parts with the same parameters and remove all others."""
        parameters_file = self.folder / "parameters.json"
        if (
            parameters_file.exists()
            and parameters_file.read_text(encoding="utf-8") == self._parameters
        ):
            return
        for entry in self.folder.iterdir():
            if entry.name != "lock":
                entry.unlink()
        write_atomically(parameters_file, self._parameters.encode())

    def _file(self, index):
        """Return the path of a part."""
        return self.folder / f"{index:06d}.npz"

    def save(self, index: int, part: Conformations) -> None:
        """Save the conformations of molecule number `index`."""
        texts = {
            "smiles": part.smiles,
            "force_field": part.force_field,
            "atom_energies": json.dumps(part.atom_energies),
            "dropped": json.dumps(part.dropped),
        }
        buffer = io.BytesIO()
        np.savez(
            buffer, **(part._asdict() | {name: np.array(text) for name, text in texts.items()})
        )
        write_atomically(self._file(index), buffer.getvalue())

    def load(self, index: int) -> Conformations | None:
        """Load the conformations of molecule number `index`; None if missing or corrupted."""
        try:
            with open_npz(self._file(index)) as archive:
                fields = {name: archive[name] for name in Conformations._fields}
            texts = {name: str(fields[name]) for name in ("smiles", "force_field")}
            texts |= {name: parse_json(str(fields[name])) for name in ("atom_energies", "dropped")}
        except FileNotFoundError:
            return None
        except NUMPY_ERRORS as error:
            log.warning("%s is corrupted (%s); regenerating it", self._file(index), error)
            return None
        return Conformations(**fields | texts)

    def merge(self, molecules: Sequence[Molecule], counts: Sequence[int], parameters: dict) -> None:
        """Merge all parts to the HDF5 file and remove the folder of parts."""
        # Built in memory, so that a full disk causes a plain write error and not a failure of HDF5
        # while it closes the file.
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            atom_energies, dropped, fallbacks = {}, Counter(), []
            for index, (molecule, count) in enumerate(zip(molecules, counts, strict=True)):
                if not count:
                    continue
                part = self.load(index)
                atom_energies |= part.atom_energies
                dropped.update(part.dropped)
                if part.force_field == "UFF":
                    fallbacks.append(molecule.name)
                if len(part.energies):
                    write_molecule(file, molecule, part)
            write_attributes(file, parameters, atom_energies, dropped, fallbacks)
        write_atomically(self.path, buffer.getvalue())
        shutil.rmtree(self.folder)


def write_molecule(file: h5py.File, molecule: Molecule, part: Conformations) -> None:
    """Write a group in the layout of SPICE: m conformations of n atoms, in bohr and hartree."""
    group = file.create_group(molecule.name)
    group["atomic_numbers"] = part.atomic_numbers
    text = h5py.string_dtype("ascii")
    group.create_dataset("smiles", data=[part.smiles], dtype=text)
    group.create_dataset("subset", data=[molecule.subset], dtype=text)
    for name, data, units in (
        ("conformations", part.conformations, "bohr"),
        ("dft_total_energy", part.energies, "hartree"),
        ("dft_total_gradient", part.gradients, "hartree/bohr"),
        ("formation_energy", part.formation_energies, "hartree"),
    ):
        group.create_dataset(name, data=data).attrs["units"] = units


def write_attributes(
    file: h5py.File,
    parameters: dict,
    atom_energies: dict[str, float],
    dropped: dict[str, int],
    fallbacks: list[str],
) -> None:
    """Write the metadata of the file: level of theory, parameters, atom energies and counts."""
    file.attrs["level_of_theory"] = f"{METHOD} (tblite {version('tblite')})"
    file.attrs["note"] = NOTE
    file.attrs["generator_parameters"] = json.dumps(parameters, sort_keys=True)
    file.attrs["energies_of_isolated_atoms"] = json.dumps(dict(sorted(atom_energies.items())))
    file.attrs["energies_of_isolated_atoms_units"] = "hartree"
    file.attrs["dropped_conformations"] = json.dumps(dict(sorted(dropped.items())))
    file.attrs["molecules_sampled_with_uff"] = json.dumps(fallbacks)


def stored_parameters(path: str | Path) -> dict | None:
    """Return the generator parameters in the file at `path`, or None if there is no file.

    Raises:
      FileExistsError: The file was not generated by this package and must not be overwritten.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        with hdf5.Hdf5File(path) as file:
            return parse_json(file.attribute("generator_parameters"))
    except ValueError as error:
        raise FileExistsError(
            f"{path} exists and was not created by generate_embedded ({error}). Move it or choose "
            "another path."
        ) from error


def summarize(path: str | Path) -> dict:
    """Compute counts and force statistics of a file in the layout of SPICE.

    Args:
      path: Path of the HDF5 file.

    Returns:
      Dictionary with `molecules`, `conformations`, `mean_atoms` (per conformation), `force_rms`
      (quantiles of the root mean square force component per conformation, eV/Å), `elements` and
      `subsets` (number of conformations with each), `dropped` (conformations by reason) and
      `level_of_theory`.
    """
    rms, atoms, elements, subsets = [], 0, Counter(), Counter()
    with hdf5.Hdf5File(path) as file:
        for group in file.values():
            gradients = group.array("dft_total_gradient").read(np.float64)
            rms.append(np.sqrt(np.mean(gradients**2, axis=(1, 2))) * Hartree / Bohr)
            count, size = gradients.shape[:2]
            atoms += count * size
            elements.update(
                {
                    chemical_symbols[number]: count
                    for number in set(group.array("atomic_numbers").read().tolist())
                }
            )
            subsets[group.array("subset").read()[0].decode()] += count
        molecules = len(file)
        dropped, level = (file.attribute(k) for k in ("dropped_conformations", "level_of_theory"))
    rms = np.concatenate(rms) if rms else np.zeros(0)
    quantiles = (
        {f"{q}%": float(np.quantile(rms, q / 100)) for q in (5, 25, 50, 75, 95)} if len(rms) else {}
    )
    return {
        "molecules": molecules,
        "conformations": len(rms),
        "mean_atoms": atoms / max(len(rms), 1),
        "force_rms": quantiles,
        "elements": dict(elements.most_common()),
        "subsets": dict(subsets.most_common()),
        "dropped": parse_json(dropped or "{}"),
        "level_of_theory": level,
    }
