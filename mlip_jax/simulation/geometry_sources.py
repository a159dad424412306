"""Sources of geometries for a property data set, other than the labeled structures.

Users seldom have the geometry for which a property was computed. A source is identified by a
string:

    labels             the structure with the property
    STAGE, STAGE:first the last, or the first, snapshot of a subset (a stage of a relaxation) of the
                       same record
    etkdg              RDKit's ETKDGv3 from SMILES
    etkdg:mmff         the same, relaxed with MMFF94
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
from mlip_jax.datasets.molecules import embedding
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.store.store import Store
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
        skipped.
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
            found = self._relaxed(relaxed[1], samples)
        elif source.partition(":")[0] == "etkdg":
            found = self._embedded(source, samples)
        else:
            found = self._snapshots(source, samples)
        if not len(found.samples):
            raise DatasetError(f"{source}: none of {len(samples)} samples has such a geometry")
        if len(found.samples) < len(samples):
            log.warning(
                "%s: %d of %d samples have no such geometry and are left out",
                source,
                len(samples) - len(found.samples),
                len(samples),
            )
        return found

    def frames(self, stages: str, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return all snapshots of some stages.

        Args:
          stages: Names of the stages, separated by commas.
          samples: Numbers in `index`.

        Returns:
          (first, indices in the store); those of sample samples[s] are first[s]:first[s + 1].
        """
        wanted = np.zeros(len(self.store), bool)
        for stage in stages.split(","):
            wanted |= self._of_stage(stage.strip())
        record = np.asarray(self.store.index("record"))
        candidates = np.flatnonzero(wanted)
        order = np.argsort(record[candidates], kind="stable")
        candidates = candidates[order]
        own = record[self.index[samples]]
        begin, end = (np.searchsorted(record[candidates], own, side) for side in ("left", "right"))
        first = np.concatenate([[0], np.cumsum(end - begin)])
        numbers = [candidates[a:b] for a, b in zip(begin, end)]
        return first, np.concatenate(numbers) if numbers else np.zeros(0, np.int64)

    def _of_stage(self, stage: str) -> np.ndarray:
        """Return whether each structure of the store belongs to a stage."""
        codes, names = self.store.texts("subset")
        if stage not in names:
            raise ConfigError(
                f"there is no geometry {stage!r}: the data have the stages "
                f"{', '.join(sorted(n for n in names if n)) or '(none)'}; others are labels, etkdg, "
                "etkdg:mmff and relaxed(SOURCE)"
            )
        return codes == names.index(stage)

    def _snapshots(self, source: str, samples: np.ndarray) -> Geometries:
        """Return the first or the last snapshot of a stage for each sample."""
        stage, _, which = source.partition(":")
        if which not in ("", "first", "last"):
            raise ConfigError(f"geometry {source!r}: after the stage comes first or last")
        first, numbers = self.frames(stage, samples)
        has = np.flatnonzero(np.diff(first))
        conformer = np.asarray(self.store.index("conformer"))
        pick = np.argmin if which == "first" else np.argmax
        chosen = [(own := numbers[first[s] : first[s + 1]])[pick(conformer[own])] for s in has]
        return Geometries(self.store, np.array(chosen, np.int64), samples[has])

    def _embedded(self, source: str, samples: np.ndarray) -> Geometries:
        """Return geometries that RDKit embeds."""
        if source not in ("etkdg", "etkdg:mmff"):
            raise ConfigError(f"geometry {source!r}: expected etkdg or etkdg:mmff")
        codes, texts = self.store.texts("smiles")
        smiles = [texts[code] for code in codes[self.index[samples]]]
        if not any(smiles):
            raise DatasetError(
                f"{self.store.path}: etkdg makes geometries of SMILES, and these data have none"
            )
        options = embedding.EmbeddingOptions(mmff=source.endswith("mmff"), seed=self.seed)

        def make():
            jobs = [
                (embedding.Entry(i, f"sample {i}", "", s), options) for i, s in enumerate(smiles)
            ]
            made = workers.stream(
                embedding.embed_entry, jobs, self.num_processes, on_death=embedding.failed_records
            )
            return [found[0].atoms for found in track(made, f"{source}", total=len(jobs))]

        return self._kept([source, self.seed, smiles], make, samples)

    def _relaxed(self, source: str, samples: np.ndarray) -> Geometries:
        """Return geometries of another source, relaxed with the force field."""
        if self.force_field is None:
            raise ConfigError(
                "geometries 'relaxed(...)' need a force field: set data.force_field to its workdir"
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
            relaxer = Relaxer(potential, fmax=self.fmax, max_steps=self.max_steps)
            found = {
                key: result
                for key, result in track(
                    relaxer.stream(enumerate(starts)), f"relaxing {source}", total=len(starts)
                )
            }
            lost = [k for k, r in found.items() if r.status not in ("converged", "step limit")]
            if lost:
                log.warning(
                    "%d of %d molecules could not be relaxed, the first because %s",
                    len(lost),
                    len(starts),
                    found[lost[0]].reason,
                )
            return [None if k in lost else found[k].atoms for k in range(len(starts))]

        content = hashlib.sha256(
            columns.positions.tobytes() + columns.numbers.tobytes()
        ).hexdigest()
        return self._kept(
            ["relaxed", potential.digest(), self.fmax, self.max_steps, content], make, start.samples
        )

    def _kept(
        self, identity: list, make: Callable[[], list[Atoms | None]], samples: np.ndarray
    ) -> Geometries:
        """Return cached geometries with this identity, or call `make` and cache its result."""
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        path = self.cache / f"{key}.npz"
        if not path.exists():
            made = make()
            present = np.array([atoms is not None for atoms in made])
            atoms = [a for a in made if a is not None]
            self.cache.mkdir(parents=True, exist_ok=True)
            with atomic_open(path, shared=True) as file:
                np.savez(
                    file,
                    present=present,
                    count=np.array([len(a) for a in atoms], np.int64),
                    charge=np.array([a.info.get("charge", 0.0) for a in atoms]),
                    numbers=np.concatenate([a.numbers for a in atoms] or [np.zeros(0, int)]),
                    positions=np.concatenate([a.positions for a in atoms] or [np.zeros((0, 3))]),
                )
        with np.load(path, allow_pickle=False) as kept:
            ends = np.cumsum(kept["count"])[:-1]
            parts = zip(
                np.split(kept["numbers"], ends),
                np.split(kept["positions"], ends),
                kept["charge"].tolist(),
            )
            columns = Columns.from_structures(
                Structure(n.astype(np.int32), x, charge=q) for n, x, q in parts if len(n)
            )
            return Geometries(columns, np.arange(len(columns)), samples[kept["present"]])
