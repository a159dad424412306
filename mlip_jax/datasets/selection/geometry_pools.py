"""Pools of molecules with initial geometries, for the evaluation of relaxations.

Sources are a store (first snapshot of each molecule), a file of SMILES (embedded by RDKit) or a
file of geometries.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from rich.progress import track

from mlip_jax import workers
from mlip_jax.config import unknown_name
from mlip_jax.datasets.molecules import files
from mlip_jax.datasets.molecules.connectivity import IdentityQuery
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection.held_out import entries, first_per_molecule
from mlip_jax.datasets.smiles import embedding
from mlip_jax.datasets.smiles import entries as molecule_entries
from mlip_jax.datasets.store.store import Store

PERIODIC = "it is periodic; only molecules are supported"
_MAX_SERIAL = 20  # maximum number of molecules that are embedded without worker processes


@dataclasses.dataclass(frozen=True)
class InitialGeometry:
    """Initial geometry of a molecule.

    Attributes:
      name: Unique name of the molecule.
      smiles: SMILES, "" if unknown.
      source: File and record.
      atoms: Atoms with positions (Å), and info["charge"] (e) and info["num_unpaired_electrons"] if
        known.
      reference: Positions of the minimum in the data set (Å), (n_atoms, 3), or None.
      seen: Whether a force field was trained on the molecule.
    """

    name: str
    smiles: str
    source: str
    atoms: Atoms
    reference: np.ndarray | None = None
    seen: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON-compatible values, with positions in full precision."""
        return {
            "name": self.name,
            "smiles": self.smiles,
            "source": self.source,
            "seen": self.seen,
            "numbers": self.atoms.numbers.tolist(),
            "positions": self.atoms.positions.tolist(),
            "reference": None if self.reference is None else self.reference.tolist(),
            "info": self.atoms.info,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> InitialGeometry:
        """Create a start from the result of `to_json`."""
        reference = values["reference"]
        return cls(
            values["name"],
            values["smiles"],
            values["source"],
            Atoms(values["numbers"], np.reshape(values["positions"], (-1, 3)), info=values["info"]),
            None if reference is None else np.reshape(reference, (-1, 3)),
            values["seen"],
        )


class StorePool:
    """Pool of the molecules of a store. The initial geometry is the first snapshot of a molecule.

    Args:
      store: Store with the structures.
      indices: Indices of the structures to choose from, (S,) int64.
      stage: Subset that the first snapshot is taken from; None for any.
      reference_stage: Subset whose last snapshot is the reference geometry of a molecule; None for
        no reference geometry.

    Raises:
      DatasetError: The subset does not exist or has no snapshot.
    """

    def __init__(
        self,
        store: Store,
        indices: np.ndarray,
        stage: str | None = None,
        reference_stage: str | None = None,
    ):
        self.store = store
        self.first = first_per_molecule(store, self._in_stage(indices, stage))
        self.last = None
        if reference_stage:
            last = first_per_molecule(store, self._in_stage(indices, reference_stage), last=True)
            molecule = store.index("molecule")
            # Only molecules with both an initial and a reference geometry.
            self.first = self.first[np.isin(molecule[self.first], molecule[last])]
            last_of = {m: s for m, s in zip(molecule[last].tolist(), last.tolist())}
            self.last = np.array([last_of[m] for m in molecule[self.first].tolist()], np.int64)
        if not len(self.first):
            raise DatasetError(
                f"{store.path}: no molecule has an initial snapshot (stage {stage!r}, reference "
                f"{reference_stage!r})"
            )

    def __len__(self) -> int:
        return len(self.first)

    def names(self) -> list[str]:
        """Return the unique names of the molecules."""
        codes, names = self.store.texts("molecule")
        return [names[c] for c in codes[self.first]]

    def entries(self) -> Iterator[IdentityQuery]:
        """Yield a query for each molecule: its SMILES if all have one, or else its geometry."""
        codes, smiles = self.store.texts("smiles")
        return entries(
            self.store, self.first, use_smiles=all(smiles[c] for c in np.unique(codes[self.first]))
        )

    def make(
        self, indices: Sequence[int], num_processes: int | None = None
    ) -> tuple[list[InitialGeometry], dict[str, str]]:
        """Return the starts `indices`, and the reasons of unusable molecules by name."""
        columns = self.store.take(self.first[indices])
        last = None if self.last is None else self.store.take(self.last[indices])
        starts, problems = [], {}
        for row, s in enumerate(columns):
            end = None if last is None else last[row]
            if end is not None and not np.array_equal(s.numbers, end.numbers):
                problems[s.molecule] = (
                    f"its reference geometry ({end.source}) has other atoms or another order"
                )
                continue
            if s.pbc is not None and s.pbc.any():
                problems[s.molecule] = PERIODIC
                continue
            if np.isinf(s.charge):
                problems[s.molecule] = f"its charge is {s.charge}"
                continue
            info = {} if np.isnan(s.charge) else {"charge": s.charge}
            info |= {"num_unpaired_electrons": int(s.spin)} if s.spin else {}
            atoms = Atoms(s.numbers, s.positions, info=info)
            starts.append(
                InitialGeometry(
                    s.molecule, s.smiles, s.source, atoms, None if end is None else end.positions
                )
            )
        return starts, problems

    def _in_stage(self, indices, stage):
        """Return the indices of the structures in a stage (subset of the data); all for None."""
        if stage is None:
            return indices
        codes, stages = self.store.texts("subset")
        if stage not in stages:
            raise DatasetError(unknown_name("stage (subset of the data)", stage, stages))
        return indices[codes[indices] == stages.index(stage)]


class SmilesPool:
    """Pool of the distinct SMILES of a file (.smi, .csv, see molecules/files.py), for ETKDG.

    Args:
      path: Path of the file.
      seed: Seed of the embedding.

    Raises:
      DatasetError: The file cannot be read or has no molecule.
    """

    def __init__(self, path: str | Path, seed: int = 0):
        path = Path(path)
        self._options = embedding.EmbeddingOptions(seed=seed)
        entries = molecule_entries.read_entries(
            path, files.kind_of(path), molecule_entries.CsvColumns()
        )
        self._molecules = list({entry.smiles: entry for entry in reversed(list(entries))}.values())[
            ::-1
        ]
        if not self._molecules:
            raise DatasetError(f"{path}: no molecule; expected a SMILES string per line")
        self._names = _unique([(m.name, m.where) for m in self._molecules])

    def __len__(self) -> int:
        return len(self._molecules)

    def names(self) -> list[str]:
        """Return the unique names of the molecules."""
        return self._names

    def entries(self) -> Iterator[IdentityQuery]:
        """Yield a query for each molecule, by its SMILES."""
        return (IdentityQuery(m.smiles) for m in self._molecules)

    def make(
        self, indices: Sequence[int], num_processes: int | None = None
    ) -> tuple[list[InitialGeometry], dict[str, str]]:
        """Return the starts `indices`, and the reasons of failed embeddings by name."""
        jobs = ((self._molecules[index], self._options) for index in indices)
        done = workers.stream(
            embedding.embed_entry,
            jobs,
            num_processes if len(indices) > _MAX_SERIAL else 1,
            on_death=embedding.failed_records,
        )
        starts, problems = [], {}
        for index, (record, *_) in track(
            zip(indices, done), "embedding", len(indices), disable=len(indices) <= _MAX_SERIAL
        ):
            name, where = self._names[index], self._molecules[index].where
            if record.atoms is None:
                problems[name] = record.failure
            else:
                starts.append(InitialGeometry(name, record.smiles, where, record.atoms))
        return starts, problems


class FilePool:
    """Pool of the geometries of a file (.xyz, .sdf, .db, see molecules/files.py).

    Args:
      path: Path of the file.
      seed: Seed of the embedding of mol blocks without three-dimensional positions.

    Raises:
      DatasetError: The file cannot be read or has no molecule.
    """

    def __init__(self, path: str | Path, seed: int = 0):
        path = Path(path)
        self._source = path.name
        self._records = list(files.read_molecules(path, seed=seed, num_processes=1))
        if not self._records:
            raise DatasetError(f"{path}: no molecule")
        self._names = _unique([(r.name, f"{path.name} molecule {r.index}") for r in self._records])

    def __len__(self) -> int:
        return len(self._records)

    def names(self) -> list[str]:
        """Return the unique names of the molecules."""
        return self._names

    def entries(self) -> Iterator[IdentityQuery]:
        """Yield a query for each molecule: its SMILES if all have one, or else its geometry.

        Queries of molecules that could not be read are empty.
        """
        sound = [r.atoms is not None for r in self._records]
        use_smiles = all(r.smiles for r, good in zip(self._records, sound) if good)
        for record, good in zip(self._records, sound):
            if not good:
                yield IdentityQuery("")
            else:
                atoms = record.atoms
                yield (
                    IdentityQuery(record.smiles)
                    if use_smiles
                    else IdentityQuery("", atoms.numbers, atoms.positions)
                )

    def make(
        self, indices: Sequence[int], num_processes: int | None = None
    ) -> tuple[list[InitialGeometry], dict[str, str]]:
        """Return the starts `indices`, and the reasons of unusable molecules by name."""
        starts, problems = [], {}
        for name, r in ((self._names[index], self._records[index]) for index in indices):
            if r.atoms is None or r.atoms.pbc.any():
                problems[name] = r.failure or PERIODIC
            else:
                starts.append(
                    InitialGeometry(name, r.smiles, f"{self._source} molecule {r.index}", r.atoms)
                )
        return starts, problems


def _unique(names: list[tuple[str, str]]) -> list[str]:
    """Return unique names from (name, location). Missing or repeated names include the location."""
    times = collections.Counter(name for name, _ in names)
    return [
        name if name and times[name] == 1 else f"{name} ({where})".strip() for name, where in names
    ]
