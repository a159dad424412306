"""Structures of an evaluation: a data set, a file without labels, or Atoms in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from mlip_jax.config import ConfigError
from mlip_jax.datasets import atoms_list, readers, source
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.formats.ase_frames import has_labels, open_frames
from mlip_jax.datasets.molecules.files import read_molecules
from mlip_jax.datasets.quality.filters import count_reasons
from mlip_jax.datasets.quality.problems import Problem
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.store.finalize import reject_if_invalid
from mlip_jax.datasets.store.store import Store
from mlip_jax.structure import from_ase

log = logging.getLogger(__name__)

NO_LABELS = "no energies and no forces: predictions only"


@dataclasses.dataclass(frozen=True)
class EvaluationData:
    """Structures to evaluate.

    Attributes:
      rows: Structures, of which `indices` are evaluated.
      indices: Indices in `rows`, ascending, (S,).
      name: Name of the data.
      level_of_theory: Level of theory of the labels.
      notes: Remarks for the reader of the report.
      counts: Numbers of structures that were read, skipped and removed, by description.
      unusable: (name, reason) of molecules that have no structure.
    """

    rows: Store | Columns
    indices: np.ndarray
    name: str
    level_of_theory: str
    notes: tuple[str, ...] = ()
    counts: dict[str, Any] = dataclasses.field(default_factory=dict)
    unusable: tuple[tuple[str, str], ...] = ()

    def digest(self) -> str:
        """Return a digest of the structures and their labels."""
        if isinstance(self.rows, Store):
            return self.rows.digest()
        content = hashlib.sha256()
        rows = self.rows
        for values in (rows.numbers, rows.positions, rows.charge, rows.energy, rows.forces):
            content.update(np.ascontiguousarray(values).tobytes())
        for name in ("cell", "pbc", "spin"):
            if (values := getattr(rows, name)) is not None:
                content.update(name.encode() + np.ascontiguousarray(values).tobytes())
        return content.hexdigest()[:12]

    def limited(self, count: int | None, seed: int) -> EvaluationData:
        """Return the data with at most `count` structures, drawn at random; None keeps all."""
        if count is None or count >= len(self.indices):
            return self
        chosen = np.random.default_rng(seed).choice(self.indices, count, replace=False)
        note = f"{count:,} of {len(self.indices):,} structures, drawn at random, are evaluated."
        return dataclasses.replace(self, indices=np.sort(chosen), notes=(*self.notes, note))


def from_config(data: Any, seed: int) -> EvaluationData:
    """Open the structures of a config.

    Args:
      data: Part "data" of the config.
      seed: Seed of the embedding of SMILES.

    Raises:
      ConfigError, DatasetError: The message explains how to fix the problem.
    """
    if not data.path:
        raise ConfigError("data.path is required, e.g. --config.data.path=molecules.xyz")
    if _is_molecule_file(data):
        return _from_molecules(data, seed)
    loaded = _load_unlabelled(data) if _lacks_labels(data) else source.load(data)
    return EvaluationData(
        loaded.store,
        loaded.indices,
        loaded.name,
        loaded.level_of_theory,
        tuple(loaded.notes),
        loaded.counts,
    )


def from_atoms(atoms: Sequence[Atoms], options: dict[str, Any]) -> EvaluationData:
    """Convert Atoms in memory; see `datasets.atoms_list.from_atoms`."""
    structures, labelled = atoms_list.from_atoms(atoms, **options)
    columns = Columns.from_structures(structures)
    level = str(options.get("level_of_theory", "unknown")) if labelled else "none"
    return EvaluationData(columns, np.arange(len(columns)), atoms_list.NAME, level)


def _is_molecule_file(data) -> bool:
    """Return whether the path is a file of molecules without energies and forces.

    No reader of data sets recognizes it, except that of tables of SMILES and properties.
    """
    path = Path(data.path)
    if data.reader != "auto" or not path.is_file():
        return False
    others = (name for name in readers.names() if name != "smiles_table")
    return not any(readers.get(name).matches(path) for name in others)


def _lacks_labels(data) -> bool:
    """Return whether the path is a file of ASE without anything like energies or forces."""
    path, options = Path(data.path), source.reader_options(data.reader_options)
    if data.reader not in ("auto", "ase") or not path.is_file() or "energy_key" in options:
        return False
    if data.reader == "auto" and readers.detect(path) != "ase":
        return False
    frames = open_frames(path, str(options.get("format", "")))
    try:
        return not has_labels(frames)
    finally:
        frames.close()


def _load_unlabelled(data) -> source.LoadedData:
    """Load a file without labels. The checks reject it for other problems only."""
    log.warning("%s: %s", data.path, NO_LABELS)
    options = filter(None, (data.reader_options, "energy_key=''", "forces_key=''"))
    settings = data.copy_and_resolve_references()
    settings.reader_options = "; ".join(options)
    settings.reject_invalid = False
    loaded = source.load(settings)
    if data.reject_invalid:
        problems = [Problem(**p) for p in loaded.store.manifest["problems"]]
        reject_if_invalid([p for p in problems if p.what != "no labels"], data.path)
    return loaded


def _from_molecules(data, seed: int) -> EvaluationData:
    """Read the molecules of a file, which has no labels, and apply the filters."""
    records = list(read_molecules(data.path, seed=seed))
    usable = [r for r in records if r.atoms is not None]
    if not usable:
        reason = f": {records[0].failure}" if records else ""
        raise DatasetError(f"{data.path}: contains no usable molecules{reason}")
    columns = Columns.from_structures(
        from_ase(
            r.atoms,
            molecule=r.display_name,
            smiles=r.smiles,
            record=r.index,
            source=f"{Path(data.path).name}:{r.index}",
        )
        for r in usable
    )
    reasons = source.filters_of(data).reasons(columns)
    if not (reasons == 0).any():
        raise DatasetError(
            f"{data.path}: no molecule passes the filters: {count_reasons(reasons)}. Change the "
            "filters of config.data."
        )
    log.warning("%s: %s", data.path, NO_LABELS)
    return EvaluationData(
        columns,
        np.flatnonzero(reasons == 0),
        Path(data.path).name,
        "none",
        counts={"molecules read": len(records), "left out": count_reasons(reasons)},
        unusable=tuple((r.name or r.smiles, r.failure) for r in records if r.atoms is None),
    )
