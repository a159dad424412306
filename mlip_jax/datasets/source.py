"""Loading of the data of a run: from config.data to a store and the indices of its splits.

1. `locate` finds the data: data.path, a SPICE file in data.directory, or generated data.
2. `open_store` opens a store, or converts the file to one the first time.
3. `select` applies the filters.

selection/data_split.py then selects the structures for training, validation and test.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from mlip_jax.config import ConfigError
from mlip_jax.datasets.exclusions import warn_of_filters
from mlip_jax.datasets.identity import method
from mlip_jax.datasets.quality.filters import Filters, count_reasons, identities
from mlip_jax.datasets.quality.problems import UNCONFIRMED, Problem
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.readers import spice
from mlip_jax.datasets.statistics import (
    NUM_ELEMENTS,
    isolated_from_formation,
    isolated_from_structures,
)
from mlip_jax.datasets.store.conversion import convert
from mlip_jax.datasets.store.conversion_plan import ConversionSpec, identify
from mlip_jax.datasets.store.finalize import reject_if_invalid
from mlip_jax.datasets.store.store import Store, is_store
from mlip_jax.foreign_text import TableWriter
from mlip_jax.wording import count_of
from mlip_jax.workdir import atomic_open

log = logging.getLogger(__name__)

SPICE_LEVEL = spice.Reader.LEVEL_OF_THEORY
HOW_TO_GET_SPICE = (
    "For the real data set, download SPICE-2.0.1.hdf5 (or SPICE-1.1.4.hdf5) of the SPICE dataset "
    "by Eastman et al. from Zenodo (linked from github.com/openmm/spice-dataset), and put it into "
    "the folder data/ or set --config.data.path."
)
# Bytes. Checksums of larger stores would delay the start of a run by more than some seconds.
_VERIFY_UP_TO = 4 * 2**30
_FILTERS = [field.name for field in dataclasses.fields(Filters)]


@dataclasses.dataclass(frozen=True)
class LoadedData:
    """Selected structures of a store, with metadata of the data set.

    Attributes:
      store: Store with the structures.
      indices: Indices of the selected structures in the store, ascending, (S,) int64.
      reasons: Reason for the exclusion of each structure of the store, (len(store),) int8. The
        codes are those of filters.REASONS; 0 for selected structures.
      name: Name of the data set.
      level_of_theory: Level of theory of the labels.
      notes: Remarks that a reader of the results has to know.
      counts: Numbers of structures read, skipped and removed by filters.
    """

    store: Store
    indices: np.ndarray
    reasons: np.ndarray
    name: str
    level_of_theory: str
    notes: list[str]
    counts: dict[str, Any]


def locate(data: Any) -> str:
    """Return the path of the data.

    This is data.path if it is set, or else a SPICE file in data.directory, or else the built-in
    data set, which is generated if necessary.
    """
    if data.path:
        return str(data.path)
    directory = Path(data.directory)
    files = sorted((p for p in directory.glob("SPICE*.hdf5") if p.is_file()), reverse=True)
    if files:
        log.info("using %s", files[0])
        return str(files[0])
    path = directory / f"embedded_gfn2_{data.num_generated}.hdf5"
    if not path.exists():
        # `load` says how to get the real data set
        log.info(
            "no SPICE file in %s/: generating %d conformations of built-in molecules with GFN2-xTB "
            "labels (NOT SPICE's %s)",
            directory,
            data.num_generated,
            SPICE_LEVEL,
        )
    from mlip_jax.datasets.builtin import generate_embedded

    return str(generate_embedded(path, num_conformations=data.num_generated))


def open_store(data: Any) -> Store:
    """Open the store at data.path, or convert the file at data.path to a store first.

    The converted store is saved in the folder stores/ of data.directory and reused by later runs.

    Raises:
      DatasetError: The file cannot be read, or the checks of the data reject it.
    """
    path = locate(data)
    if is_store(path):
        store = Store(path)
        if _needs_verification(store, data.verify):
            store.verify()
        return store
    spec = ConversionSpec(path, data.reader, reader_options(data.reader_options))
    with spec.open() as source:
        identity = json.dumps(
            [dataclasses.asdict(spec) | {"path": ""}, identify(source), method()], sort_keys=True
        )
    # The name depends on settings and content, so that changed files get a new store.
    key = hashlib.sha256(identity.encode()).hexdigest()[:10]
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(path).stem)[:60]
    folder = Path(data.directory) / "stores" / f"{stem}-{key}"
    if not is_store(folder):
        log.info("converting %s to the store %s", path, folder)
    if not _is_intact(folder, data.verify):
        # Verifies and repairs an existing store.
        convert(
            spec,
            folder,
            reject_invalid=data.reject_invalid,
            confirm_units=data.get("confirm_units", False),  # missing in older configs
        )
    store = Store(folder)
    if data.reject_invalid:  # the store may have been converted with reject_invalid=False
        problems = [Problem(**p) for p in store.manifest["problems"]]
        reject_if_invalid(problems, path, data.get("confirm_units", False))
    return store


def _is_intact(folder: Path, verify: bool | None) -> bool:
    """Return whether the folder has a store whose checksums need not be verified."""
    try:
        return is_store(folder) and not _needs_verification(Store(folder), verify)
    except DatasetError as error:
        log.warning("%s", error)
        return False


def _needs_verification(store: Store, wanted: bool | None) -> bool:
    """Return whether the checksums of a store are verified: as requested, or if it is small."""
    size = sum(s["bytes"] for s in store.manifest["shards"])
    return size <= _VERIFY_UP_TO if wanted is None else wanted


def reader_options(text: str) -> dict[str, Any]:
    """Parse config.data.reader_options. Values that are not Python literals are strings.

    >>> reader_options("stages=('pm3', 'DFT_1st'); stride=4; level_of_theory=PBE0")
    {'stages': ['pm3', 'DFT_1st'], 'stride': 4, 'level_of_theory': 'PBE0'}
    """
    options = {}
    for part in filter(None, (p.strip() for p in text.split(";"))):
        name, equals, value = (p.strip() for p in part.partition("="))
        if not equals or not name.isidentifier():
            raise ConfigError(
                f"data.reader_options: expected 'name=value; name=value', received {text!r}"
            )
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    try:
        return json.loads(json.dumps(options))
    except TypeError as error:
        raise ConfigError(f"data.reader_options: {error}; received {text!r}") from error


def load(data: Any) -> LoadedData:
    """Open the data of config.data and apply its filters.

    Raises:
      DatasetError: The data cannot be read, or no structure passes the filters.
    """
    store = open_store(data)
    name = Path(data.path or locate(data)).name
    reasons = select(store, filters_of(data))
    indices = np.flatnonzero(reasons == 0)
    manifest_counts = store.manifest["counts"]
    counts = {
        "structures read": manifest_counts["read"],
        "skipped by the reader": manifest_counts["skipped"],
        "in the store": len(store),
        "left out": count_reasons(reasons),
        "used": len(indices),
    }
    if not len(indices):
        problems = " ".join(p["message"] for p in store.manifest["problems"])
        raise DatasetError(
            f"{name}: none of {len(store)} structures passes the filters (excluded: "
            f"{count_reasons(reasons)}; skipped when read: "
            f"{manifest_counts['skipped'] or 'none'}). Change data.elements, data.charge, "
            f"data.max_atoms or another filter of config.data. {problems}".rstrip()
        )
    log.info(
        "%s: using %d of %s; excluded: %s",
        name,
        len(indices),
        count_of(len(store), "structure"),
        count_reasons(reasons) or "none",
    )
    if data.path:
        warn_of_filters(store, reasons, data.elements or ())
    level = store.level_of_theory
    problems = [
        p
        for p in store.manifest["problems"]
        # missing energies and forces do not matter for properties
        if not (data.require == "none" and p["what"] == "no labels")
        and not (data.get("confirm_units", False) and p["what"] == UNCONFIRMED)
        # copies matter for splits that are drawn
        and not (data.get("split_files") and p["what"] == "duplicates")
    ]
    notes = list(store.manifest["notes"]) + [p["message"] for p in problems]
    if "xtb" in level.lower():
        note = f"The labels of this run are {level}: a fast semi-empirical method"
        notes.append(
            f"{note}." if data.path else f"{note}, not SPICE's {SPICE_LEVEL}. {HOW_TO_GET_SPICE}"
        )
    for note in notes:
        log.warning(note)
    return LoadedData(store, indices, reasons, name, level, notes, counts)


def filters_of(data: Any) -> Filters:
    """Return the filters of config.data."""
    return Filters(**{f: data[f] for f in _FILTERS})


def select(store: Store, filters: Filters) -> np.ndarray:
    """Return why each structure is excluded, (S,) int8: a code of filters.REASONS, or 0 if kept."""
    reasons = np.zeros(len(store), np.int8)
    for block, columns in store.chunks(labels_only=True):
        reasons[block] = filters.reasons(columns, shortest=store.index("shortest_distance")[block])
    # Outliers are determined among the structures that pass the other filters.
    if filters.compares_conformations:
        rows = np.flatnonzero(reasons == 0)
        reasons[rows] = filters.molecule_outliers(
            *(store.index(n)[rows] for n in ("molecule", "energy", "force_rms", "n_atoms"))
        )
    return reasons


def write_excluded(path: Path, data: LoadedData) -> None:
    """Write a CSV file of the structures that the filters removed: identity and reason."""
    with atomic_open(path, "w", newline="") as file:
        writer = TableWriter(file)
        writer.writerow(["structure", "reason"])
        for block, columns in data.store.chunks(np.flatnonzero(data.reasons)):
            writer.writerows(identities(columns, data.reasons[block]))


def isolated_atoms(data: LoadedData) -> np.ndarray | None:
    """Return the energies of isolated atoms (eV), (119,), that the data set states or implies.

    The energies that the reader states take precedence over single atoms among the structures, and
    these over formation energies. Unknown elements are NaN. The result is None if there is none of
    the three.
    """
    store = data.store
    single = np.flatnonzero(store.index("n_atoms") == 1)
    sources = []
    if stated := store.manifest["atom_energies"]:
        energies = np.full(NUM_ELEMENTS, np.nan)
        for symbol, energy in stated.items():
            energies[atomic_numbers[symbol]] = energy
        sources.append(energies)
    if len(single):
        blocks = (columns for _, columns in store.chunks(single, labels_only=True))
        sources.append(isolated_from_structures(blocks))
    if not stated and "formation_energy" in store.manifest["properties"]:
        sources.append(
            isolated_from_formation(
                (columns, columns.properties["formation_energy"])
                for _, columns in store.chunks(data.indices)
            )
        )
    known = [energies for energies in sources if energies is not None]
    if not known:
        return None
    combined = known[0]
    for energies in known[1:]:
        combined = np.where(np.isfinite(combined), combined, energies)
    return combined


def parse_reference(text: str) -> str | dict[str, float]:
    """Parse config.data.reference_energies: the name of a method, or "H=-13.6,C=-1029.4" in eV.

    >>> parse_reference("least_squares"), parse_reference("H=-13.6, C=-1029.4")
    ('least_squares', {'H': -13.6, 'C': -1029.4})
    """
    if "=" not in text:
        return text
    try:
        return {k.strip(): float(v) for k, v in (pair.split("=") for pair in text.split(","))}
    except ValueError as error:
        raise ValueError(
            f"data.reference_energies: expected 'H=-13.6,C=-1029.4,...' in eV, received {text!r}"
        ) from error
