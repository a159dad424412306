"""Choice of the molecules that the task `force2geo_eval` relaxes."""

from __future__ import annotations

import collections
import logging
from collections.abc import Mapping
from pathlib import Path

import ml_collections
import numpy as np

from mlip_jax.datasets import readers, source
from mlip_jax.datasets.molecules import files
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection import initial_geometries
from mlip_jax.datasets.selection.geometry_pools import (
    FilePool,
    InitialGeometry,
    SmilesPool,
    StorePool,
)
from mlip_jax.datasets.selection.held_out import RunData
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.potential import Potential
from mlip_jax.workdir import write_json

log = logging.getLogger(__name__)


def choose_starts(
    config: ml_collections.ConfigDict,
    folder: Path,
    paths: Mapping[str, str],
    potentials: Mapping[str, Potential],
) -> tuple[list[InitialGeometry], list[str]]:
    """Return the molecules of this run and notes about them for the report.

    They are chosen once and stored in starts.json.

    Args:
      config: Config of the task.
      folder: Workdir of the run.
      paths: Path of each force field by name.
      potentials: Force fields by name.
    """
    path = folder / "starts.json"
    if path.exists():
        values = parse_json(read_bytes(path))
        return [InitialGeometry.from_json(v) for v in values["molecules"]], values["notes"]
    notes: list[str] = []
    processes = config.oracle.num_processes or None
    runs = _runs(paths, config.data, notes)
    selection = initial_geometries.MoleculeSelection(
        count=config.data.num_molecules,
        selection=config.data.selection,
        first=config.data.first,
        seed=config.seed,
        elements=frozenset.intersection(*(frozenset(p.elements) for p in potentials.values())),
        seen=_seen(runs, notes, processes),
        allow_seen=config.data.allow_seen,
    )
    starts, left_out = initial_geometries.choose(_pool(config, runs), selection, processes)
    for reason, count in collections.Counter(left_out.values()).most_common(10):
        notes.append(f"Molecules skipped because {reason}: {count:,}.")
    seen = sum(s.seen for s in starts)
    if seen:
        notes.insert(
            0,
            f"{seen:,} of {len(starts):,} molecules were in the training or validation split of a "
            "force field (data.allow_seen): the molecules of this evaluation are not all unseen.",
        )
    if len(starts) < config.data.num_molecules and config.data.selection != "all":
        notes.append(
            f"There are only {len(starts):,} molecules; data.num_molecules is "
            f"{config.data.num_molecules:,}."
        )
    for note in notes:
        log.warning("%s", note)
    write_json(folder / "left_out.json", left_out)
    write_json(path, {"molecules": [s.to_json() for s in starts], "notes": notes})
    return [InitialGeometry.from_json(s.to_json()) for s in starts], notes


def _runs(paths, data, notes) -> dict[str, RunData]:
    """Return the training data of each force field by name.

    Add a note if the data of a force field cannot be found; raise DatasetError if its test split is
    required.
    """
    runs = {}
    for name, path in paths.items():
        try:
            runs[name] = RunData.load(path)
        except DatasetError as error:
            if not data.path and not runs:
                raise DatasetError(
                    f"{error} Or set config.data.path to a file of molecules."
                ) from error
            notes.append(
                f"The training data of {name} are unknown and may contain these molecules: {error}"
            )
    return runs


def _seen(runs: dict[str, RunData], notes, num_processes) -> frozenset[str]:
    """Return skeletons of all molecules in training and validation splits of the force fields."""
    skeletons: set[str] = set()
    for name, data in runs.items():
        log.info("%s: comparing with its training molecules", name)
        seen, unread = data.seen_skeletons(num_processes)
        skeletons |= seen
        if unread:
            notes.append(
                f"RDKit cannot read {unread:,} training molecules of {name}, which may be among "
                "these molecules."
            )
    return frozenset(skeletons)


def _pool(config, runs: dict[str, RunData]) -> StorePool | SmilesPool | FilePool:
    """Return the source of molecules: a file, a data set, or the test split of a force field."""
    data = config.data.copy_and_resolve_references()
    reference_stage = data.reference_stage if data.reference == "data" else None
    if data.path and not data.stage and not reference_stage and _is_plain(data):
        is_smiles = files.kind_of(data.path) in initial_geometries.SMILES_FILES
        return (SmilesPool if is_smiles else FilePool)(data.path, config.seed)
    if data.path:
        loaded = source.load(data)
        return StorePool(loaded.store, loaded.indices, data.stage, reference_stage)
    run = next(iter(runs.values()))
    data.path = str(run.store.path)
    loaded = source.load(data)
    held_out = np.intersect1d(loaded.indices, run.held_out())
    if not len(held_out):
        raise DatasetError(
            f"{run.workdir}: its data contain no molecule that is only in the test split. Set "
            "config.data.path to a file of molecules."
        )
    return StorePool(loaded.store, held_out, data.stage, reference_stage)


def _is_plain(data) -> bool:
    """Return whether data.path is a plain file of molecules, not a data set with conformers."""
    path = Path(data.path)
    if data.reader != "auto" or data.reader_options or not path.is_file():
        return False
    if files.kind_of(path) in (*initial_geometries.SMILES_FILES, "sdf"):
        return True
    return readers.detect(path) == "ase"
