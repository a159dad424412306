"""Initial geometries of molecules for the evaluation of relaxations.

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
from ase.data import chemical_symbols
from rich.progress import track

from mlip_jax import workers
from mlip_jax.config import unknown_name
from mlip_jax.datasets.molecules import embedding, files
from mlip_jax.datasets.molecules import entries as molecule_entries
from mlip_jax.datasets.molecules.connectivity import Description, IdentityQuery, describe
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection import diversity
from mlip_jax.datasets.selection.held_out import entries, first_of_each
from mlip_jax.datasets.store.store import Store

SMILES_FILES = ("smi", "csv")  # kinds of files, as from molecules.files.kind_of
PERIODIC = "it is periodic, and this is of molecules"
SELECTIONS = ("maxmin", "random", "all")
SEEN = "it is in the training or validation part of a force field"
_FEW = 20  # maximum number of molecules that are embedded without worker processes


@dataclasses.dataclass(frozen=True)
class Start:
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
    def from_json(cls, values: dict[str, Any]) -> Start:
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


class StoreStarts:
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
        self.first = first_of_each(store, self._of_stage(indices, stage))
        self.last = None
        if reference_stage:
            last = first_of_each(store, self._of_stage(indices, reference_stage), last=True)
            molecule = store.index("molecule")
            self.first = self.first[np.isin(molecule[self.first], molecule[last])]
            place = {m: s for m, s in zip(molecule[last].tolist(), last.tolist())}
            self.last = np.array([place[m] for m in molecule[self.first].tolist()], np.int64)
        if not len(self.first):
            raise DatasetError(
                f"{store.path}: no molecule has a snapshot to start from (stage {stage!r}, reference "
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
        self, places: Sequence[int], num_processes: int | None = None
    ) -> tuple[list[Start], dict[str, str]]:
        """Return the starts `places`, and the reasons of unusable molecules by name."""
        columns = self.store.take(self.first[places])
        last = None if self.last is None else self.store.take(self.last[places])
        starts, problems = [], {}
        for place, s in enumerate(columns):
            end = None if last is None else last[place]
            if end is not None and not np.array_equal(s.numbers, end.numbers):
                problems[s.molecule] = (
                    f"its reference geometry ({end.source}) has other atoms or another order of them"
                )
                continue
            if s.pbc is not None and s.pbc.any():
                problems[s.molecule] = PERIODIC
                continue
            if np.isinf(s.charge):
                problems[s.molecule] = f"its charge is {s.charge}"
                continue
            atoms = Atoms(
                s.numbers, s.positions, info={} if np.isnan(s.charge) else {"charge": s.charge}
            )
            starts.append(
                Start(s.molecule, s.smiles, s.source, atoms, None if end is None else end.positions)
            )
        return starts, problems

    def _of_stage(self, indices, stage):
        if stage is None:
            return indices
        codes, stages = self.store.texts("subset")
        if stage not in stages:
            raise DatasetError(unknown_name("stage (subset of the data)", stage, stages))
        return indices[codes[indices] == stages.index(stage)]


class SmilesStarts:
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
        found = molecule_entries.read_entries(
            path, files.kind_of(path), molecule_entries.CsvColumns()
        )
        self._molecules = list({entry.smiles: entry for entry in reversed(list(found))}.values())[
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
        self, places: Sequence[int], num_processes: int | None = None
    ) -> tuple[list[Start], dict[str, str]]:
        """Return the starts `places`, and the reasons of failed embeddings by name."""
        jobs = ((self._molecules[place], self._options) for place in places)
        done = workers.stream(
            embedding.make,
            jobs,
            num_processes if len(places) > _FEW else 1,
            on_death=embedding.gave_up,
        )
        starts, problems = [], {}
        for place, (record, *_) in track(
            zip(places, done), "embedding", len(places), disable=len(places) <= _FEW
        ):
            name, where = self._names[place], self._molecules[place].where
            if record.atoms is None:
                problems[name] = record.failure
            else:
                starts.append(Start(name, record.smiles, where, record.atoms))
        return starts, problems


class FileStarts:
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
        self, places: Sequence[int], num_processes: int | None = None
    ) -> tuple[list[Start], dict[str, str]]:
        """Return the starts `places`, and the reasons of unusable molecules by name."""
        starts, problems = [], {}
        for name, r in ((self._names[place], self._records[place]) for place in places):
            if r.atoms is None or r.atoms.pbc.any():
                problems[name] = r.failure or PERIODIC
            else:
                starts.append(Start(name, r.smiles, f"{self._source} molecule {r.index}", r.atoms))
        return starts, problems


def _unique(names: list[tuple[str, str]]) -> list[str]:
    """Return unique names from (name, location). Missing or repeated names include the location."""
    times = collections.Counter(name for name, _ in names)
    return [
        name if name and times[name] == 1 else f"{name} ({where})".strip() for name, where in names
    ]


@dataclasses.dataclass(frozen=True)
class MoleculeSelection:
    """Selection of molecules from a pool.

    Attributes:
      count: Maximum number of molecules for "maxmin" and "random".
      selection: "maxmin" (diversity.py), "random" or "all".
      first: Name of the first pick of "maxmin"; None draws it with `seed`.
      seed: Seed of "random" and of the first pick of "maxmin".
      elements: Atomic numbers that all force fields support.
      seen: Skeletons (connectivity.py) of the molecules that a force field was trained on.
      allow_seen: Whether to include molecules that a force field was trained on.

    Raises:
      ValueError: The selection is unknown, or the count is below 1.
    """

    count: int
    selection: str = "maxmin"
    first: str | None = None
    seed: int = 0
    elements: frozenset[int] = frozenset()
    seen: frozenset[str] = frozenset()
    allow_seen: bool = False

    def __post_init__(self):
        if self.selection not in SELECTIONS:
            raise ValueError(unknown_name("data.selection", self.selection, SELECTIONS))
        if self.count < 1:
            raise ValueError(f"data.num_molecules must be at least 1, received {self.count}")


def choose(
    pool: StoreStarts | SmilesStarts | FileStarts,
    choice: MoleculeSelection,
    num_processes: int | None = None,
) -> tuple[list[Start], dict[str, str]]:
    """Select molecules from a pool.

    Returns:
      The starts in the order of picking, and the reasons for exclusion by name.

    Raises:
      DatasetError: No molecule is left, or `choice.first` is not in the pool.
      ImportError: RDKit is missing.
    """
    names = pool.names()
    maxmin = choice.selection == "maxmin"
    found = describe(pool.entries(), len(pool), fingerprints=maxmin, num_processes=num_processes)
    left_out, usable, seen = {}, [], set()
    for place, (name, description) in enumerate(zip(names, found)):
        reason = _reason(description, choice)
        if reason == SEEN and choice.allow_seen:
            seen.add(name)
        elif reason:
            left_out[name] = reason
            continue
        usable.append(place)
    if not usable:
        counts = ", ".join(
            f"{n} × {reason}" for reason, n in collections.Counter(left_out.values()).most_common(5)
        )
        raise DatasetError(
            f"none of {len(names)} molecules can be used to judge the force fields: {counts}. Give "
            "other molecules as config.data.path."
        )
    picked = [
        usable[p] for p in _pick([names[p] for p in usable], [found[p] for p in usable], choice)
    ]
    starts, problems = pool.make(picked, num_processes)
    return [dataclasses.replace(s, seen=s.name in seen) for s in starts], left_out | problems


def _reason(description: Description | None, choice: MoleculeSelection) -> str:
    if description is None:
        return "RDKit cannot read it"
    if description.skeleton in choice.seen:
        return SEEN
    unknown = sorted(set(description.elements) - choice.elements)
    return (
        f"a force field does not know {', '.join(chemical_symbols[z] for z in unknown)}"
        if unknown
        else ""
    )


def _pick(names: list[str], found: list[Description], choice: MoleculeSelection) -> np.ndarray:
    if choice.first is not None and choice.selection == "maxmin" and choice.first not in names:
        raise DatasetError(
            unknown_name("molecule to begin with (config.data.first)", choice.first, names[:1000])
        )
    if choice.selection == "all":
        return np.arange(len(names))
    if choice.selection == "random":
        return np.random.default_rng(choice.seed).permutation(len(names))[: choice.count]
    first = None if choice.first is None else names.index(choice.first)
    return diversity.maxmin(
        [d.fingerprint for d in found], choice.count, first=first, seed=choice.seed
    )
