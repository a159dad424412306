"""From config.data to the structures of a run: the file that is given, found, or made."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.datasets import spice
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.selection import Selection
from mlip_jax.datasets.statistics import isolated_from_formation

log = logging.getLogger(__name__)

SPICE_LEVEL = "ωB97M-D3(BJ)/def2-TZVPPD"
HOW_TO_GET_SPICE = (
    "For the real data set download SPICE-2.0.1.hdf5 (or SPICE-1.1.4.hdf5) of the SPICE dataset by Eastman et al. from "
    "Zenodo (linked from github.com/openmm/spice-dataset), put it into the folder data/ or name it as "
    "--config.data.path.")


@dataclasses.dataclass(frozen=True)
class LoadedData:
    """The selected structures of one file, and what is known of it.

    Attributes:
      columns: The structures.
      path: The file. level_of_theory: Of its labels. notes: What a reader of results must know.
      isolated_atoms: (119,) eV or None. counts: What was read, skipped and left out.
    """

    columns: Columns
    path: Path
    level_of_theory: str
    notes: list[str]
    isolated_atoms: np.ndarray | None
    counts: dict[str, Any]


def locate(data: Any) -> Path:
    """The HDF5 file: data.path, else a SPICE file in data.directory, else the embedded data set, made if needed."""
    if data.path:
        return Path(data.path)
    directory = Path(data.directory)
    found = sorted((p for p in directory.glob("SPICE*.hdf5") if p.is_file()), reverse=True)
    if found:
        log.info("found %s", found[0])
        return found[0]
    path = directory / f"embedded_gfn2_{data.num_generated}.hdf5"
    if not path.exists():
        log.warning("no SPICE file in %s/: making %d conformations of built-in molecules with GFN2-xTB labels (NOT "
                    "SPICE's %s). %s", directory, data.num_generated, SPICE_LEVEL, HOW_TO_GET_SPICE)
    from mlip_jax.datasets.embedded import generate_embedded
    return generate_embedded(path, num_conformations=data.num_generated)


def load(data: Any) -> LoadedData:
    """Read and select the structures of config.data.

    Raises:
      DatasetError: The file cannot be read, or nothing in it passes the selection.
    """
    path = locate(data)
    report = spice.ReadReport()
    selection = Selection(data.elements, data.charge, data.max_atoms, data.max_force)
    formation = []

    def noted():
        for s in selection.filter(spice.read(path, report=report)):
            formation.append(s.properties["formation_energy"])
            yield s

    columns = Columns.from_structures(noted())
    counts = {"records": report.records, "records and conformations skipped": report.skipped,
              "conformations read": report.structures, "left out": selection.removed, "used": selection.kept}
    if not len(columns):
        raise spice.DatasetError(
            f"{path}: none of {report.structures} conformations passes the selection (left out: {selection.removed}, "
            f"skipped: {report.skipped}). Change data.elements, data.charge, data.max_atoms or data.max_force.")
    if report.skipped:
        log.warning("%s: skipped %s", path, report.skipped)
    log.info("%s: %d conformations used of %d; left out: %s", path.name, len(columns), report.structures,
             selection.removed or "none")
    level = level_of_theory(path)
    notes = []
    if "xtb" in level.lower():
        notes.append(f"The labels of this run are {level}: a fast semi-empirical method, not SPICE's {SPICE_LEVEL}. "
                     + HOW_TO_GET_SPICE)
    for note in notes:
        log.warning(note)
    return LoadedData(columns, path, level, notes, isolated_from_formation(columns, np.array(formation)), counts)


def level_of_theory(path: Path) -> str:
    """What the file says of its labels; SPICE's own files say nothing and are taken as SPICE."""
    with spice.open_hdf5(path) as file:
        return str(file.attrs.get("level_of_theory", SPICE_LEVEL))


def parse_reference(text: str) -> str | dict[str, float]:
    """config.data.reference_energies: a method's name, or "H=-13.6,C=-1029.4" as a mapping.

    >>> parse_reference("least_squares"), parse_reference("H=-13.6, C=-1029.4")
    ('least_squares', {'H': -13.6, 'C': -1029.4})
    """
    if "=" not in text:
        return text
    try:
        return {k.strip(): float(v) for k, v in (pair.split("=") for pair in text.split(","))}
    except ValueError as error:
        raise ValueError(
            f"data.reference_energies: expected 'H=-13.6,C=-1029.4,...' in eV, received {text!r}") from error
