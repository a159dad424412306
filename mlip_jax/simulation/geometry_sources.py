"""Sources of geometries for a property data set, other than the labeled structures.

Users seldom have the geometry for which a property was computed. A source is identified by a
string:

    labels             the structure with the property
    STAGE, STAGE:first the last, or the first, snapshot of a subset (a stage of a relaxation) of the
                       same record
    etkdg              RDKit's ETKDGv3 from SMILES
    etkdg:mmff         the same, relaxed with MMFF94
    etkdg:10           10 conformers of each molecule; also etkdg:mmff:10
    relaxed(SOURCE)    another source, relaxed with a force field in batches (relax.py)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ase import Atoms
from rich.progress import track

from mlip_jax import workers
from mlip_jax.config import ConfigError
from mlip_jax.datasets.columns import Columns, Rows
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.smiles import embedding
from mlip_jax.datasets.store.store import Store
from mlip_jax.files import make_subfolder
from mlip_jax.foreign_files.archives import open_npz
from mlip_jax.potential import Potential
from mlip_jax.simulation.relaxation.relax import Relaxer
from mlip_jax.structure import Structure
from mlip_jax.workdir import atomic_open

log = logging.getLogger(__name__)

LABELS = "labels"
_RELAXED = re.compile(r"relaxed\((.+)\)")


@dataclasses.dataclass(frozen=True)
class Geometries:
    """Geometries of some samples.

    Attributes:
      rows: Structures that contain the geometries.
      index: Indices of the geometries in `rows`, (K,) int64.
      samples: Samples of the geometries, (K,) int64, ascending. Samples without a geometry are
        skipped; those with several conformers are repeated.
    """

    rows: Rows
    index: np.ndarray
    samples: np.ndarray


@dataclasses.dataclass(frozen=True)
class Sources:
    """Finds or generates geometries of the structures `index` of a store.

    Attributes:
      store: Store that contains the samples.
      index: Indices of the samples in the store.
      cache: Folder for generated geometries.
      force_field: Function that loads the force field for relaxations, or None.
      seed: Seed of the embedding.
      num_processes: Number of processes for the embedding; None for one per core.
      fmax: Largest force of a relaxed geometry (eV/Å).
      max_steps: Maximum number of steps per relaxation.
    """

    store: Store
    index: np.ndarray
    cache: Path
    force_field: Callable[[], Potential] | None = None
    seed: int = 0
    num_processes: int | None = None
    fmax: float = 0.05
    max_steps: int = 500

    def get(self, source: str, samples: np.ndarray) -> Geometries:
        """Return the geometries of samples from a source.

        Args:
          source: Source, see the module.
          samples: Numbers in `index`.

        Raises:
          ConfigError: If there is no such source, or no force field for the relaxation.
          DatasetError: If the data have no such stage or no SMILES, or if no sample has a geometry.
        """
        if source == LABELS or not len(samples):
            return Geometries(self.store, self.index[samples], samples)
        relaxed = _RELAXED.fullmatch(source)
        if relaxed:
            geometries = self._relax(relaxed[1], samples)
        elif source.partition(":")[0] == "etkdg":
            geometries = self._embed(source, samples)
        else:
            geometries = self._snapshots(source, samples)
        if not len(geometries.samples):
            raise DatasetError(f"{source}: none of {len(samples)} samples has such a geometry")
        available = len(np.unique(geometries.samples))
        if available < len(samples):
            log.warning(
                "%s: skipping %d of %d samples without such a geometry",
                source,
                len(samples) - available,
                len(samples),
            )
        return geometries

    def frames(self, stages: str, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return all snapshots of some stages.

        Args:
          stages: Names of the stages, separated by commas.
          samples: Numbers in `index`.

        Returns:
          (first, indices in the store); those of sample samples[s] are first[s]:first[s + 1].
        """
        in_stages = np.zeros(len(self.store), bool)
        for stage in stages.split(","):
            in_stages |= self._is_in_stage(stage.strip())
        record = np.asarray(self.store.index("record"))
        candidates = np.flatnonzero(in_stages)
        order = np.argsort(record[candidates], kind="stable")
        candidates = candidates[order]
        records = record[self.index[samples]]
        begin, end = (
            np.searchsorted(record[candidates], records, side) for side in ("left", "right")
        )
        first = np.concatenate([[0], np.cumsum(end - begin)])
        numbers = [candidates[a:b] for a, b in zip(begin, end)]
        return first, np.concatenate(numbers) if numbers else np.zeros(0, np.int64)

    def _is_in_stage(self, stage: str) -> np.ndarray:
        """Return whether each structure of the store belongs to a stage."""
        codes, names = self.store.texts("subset")
        if stage not in names:
            raise ConfigError(
                f"unknown geometry {stage!r}: the data have the stages "
                f"{', '.join(sorted(n for n in names if n)) or '(none)'}; other sources are "
                "labels, etkdg, etkdg:mmff and relaxed(SOURCE)"
            )
        return codes == names.index(stage)

    def _snapshots(self, source: str, samples: np.ndarray) -> Geometries:
        """Return the first or the last snapshot of a stage for each sample."""
        stage, _, snapshot = source.partition(":")
        if snapshot not in ("", "first", "last"):
            raise ConfigError(f"geometry {source!r}: expected 'first' or 'last' after the stage")
        first, numbers = self.frames(stage, samples)
        has = np.flatnonzero(np.diff(first))
        conformer = np.asarray(self.store.index("conformer"))
        pick = np.argmin if snapshot == "first" else np.argmax
        picked = [
            (snapshots := numbers[first[s] : first[s + 1]])[pick(conformer[snapshots])] for s in has
        ]
        return Geometries(self.store, np.array(picked, np.int64), samples[has])

    def _embed(self, source: str, samples: np.ndarray) -> Geometries:
        """Return geometries that RDKit embeds."""
        mmff, num_conformers = _embedding(source)
        codes, texts = self.store.texts("smiles")
        smiles = [texts[code] for code in codes[self.index[samples]]]
        if not any(smiles):
            raise DatasetError(
                f"{self.store.path}: etkdg embeds SMILES, and these data contain none"
            )
        options = embedding.EmbeddingOptions(num_conformers, mmff, self.seed)

        def make():
            jobs = [
                (embedding.Entry(i, f"sample {i}", "", s), options) for i, s in enumerate(smiles)
            ]
            records = workers.stream(
                embedding.embed_entry, jobs, self.num_processes, on_death=embedding.failed_records
            )
            return [
                record.atoms
                for conformers in track(records, source, total=len(jobs))
                for record in conformers
            ]

        samples = np.repeat(samples, num_conformers)
        return self._load_or_make([source, self.seed, smiles], make, samples)

    def _relax(self, source: str, samples: np.ndarray) -> Geometries:
        """Return geometries of another source, relaxed with the force field."""
        if self.force_field is None:
            raise ConfigError(
                "geometries 'relaxed(...)' require a force field: set data.force_field to its "
                "workdir"
            )
        start, potential = self.get(source, samples), self.force_field()
        columns = start.rows.take(start.index, labels_only=True)
        starts = [
            Atoms(
                s.numbers,
                s.positions,
                info={"charge": s.charge, "num_unpaired_electrons": int(s.spin)},
            )
            for s in columns
        ]

        def make():
            relaxer = Relaxer(
                potential, fmax=self.fmax, max_steps=self.max_steps, molecules_only=True
            )
            stream = relaxer.stream(enumerate(starts))
            results = dict(track(stream, f"relaxing {source}", total=len(starts)))
            lost = [k for k, r in results.items() if r.status not in ("converged", "step limit")]
            if lost:
                log.warning(
                    "%d of %d molecules could not be relaxed; the first reason: %s",
                    len(lost),
                    len(starts),
                    results[lost[0]].reason,
                )
            return [None if k in lost else results[k].atoms for k in range(len(starts))]

        content = hashlib.sha256(columns.positions.tobytes() + columns.numbers.tobytes())
        # without ions and radicals: earlier keys
        for name, values in ((b"charge", columns.charge), (b"", columns.spin)):
            if values is not None and values.any():
                content.update(name + values.tobytes())
        settings = [potential.digest(), self.fmax, self.max_steps, content.hexdigest()]
        return self._load_or_make(["relaxed", *settings], make, start.samples)

    def _load_or_make(
        self, identity: list, make: Callable[[], list[Atoms | None]], samples: np.ndarray
    ) -> Geometries:
        """Return cached geometries with this identity, or call `make` and cache its result."""
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        path = self.cache / f"{key}.npz"
        if not path.exists():
            geometries = make()
            present = np.array([atoms is not None for atoms in geometries])
            atoms = [a for a in geometries if a is not None]
            make_subfolder(self.cache)
            with atomic_open(path, shared=True) as file:
                np.savez(
                    file,
                    present=present,
                    count=np.array([len(a) for a in atoms], np.int64),
                    charge=np.array([a.info.get("charge", 0.0) for a in atoms]),
                    spin=np.array([a.info.get("num_unpaired_electrons", 0.0) for a in atoms]),
                    numbers=np.concatenate([a.numbers for a in atoms] or [np.zeros(0, int)]),
                    positions=np.concatenate([a.positions for a in atoms] or [np.zeros((0, 3))]),
                )
        with open_npz(path) as stored:
            ends = np.cumsum(stored["count"])[:-1]
            parts = zip(
                np.split(stored["numbers"], ends),
                np.split(stored["positions"], ends),
                stored["charge"].tolist(),
                # files of earlier versions have no spins
                stored["spin"].tolist() if "spin" in stored else [0.0] * len(stored["count"]),
            )
            columns = Columns.from_structures(
                Structure(n.astype(np.int32), x, charge=q, spin=u) for n, x, q, u in parts if len(n)
            )
            return Geometries(columns, np.arange(len(columns)), samples[stored["present"]])


def _embedding(source: str) -> tuple[bool, int]:
    """Return whether a source "etkdg..." uses MMFF94, and its number of conformers."""
    parts = source.split(":")[1:]
    mmff = parts[:1] == ["mmff"]
    rest = parts[mmff:]
    if len(rest) > 1 or (rest and not (rest[0].isdecimal() and int(rest[0]) > 0)):
        raise ConfigError(
            f"geometry {source!r}: expected etkdg, etkdg:mmff, etkdg:10 or etkdg:mmff:10"
        )
    return mmff, int(rest[0]) if rest else 1


def num_conformers(source: str) -> int:
    """Return the number of geometries per sample of a source, 1 for most.

    >>> num_conformers("relaxed(etkdg:mmff:10)"), num_conformers("pm3:first")
    (10, 1)
    """
    relaxed = _RELAXED.fullmatch(source)
    if relaxed:
        return num_conformers(relaxed[1])
    return _embedding(source)[1] if source.partition(":")[0] == "etkdg" else 1
