"""Which molecules a training run has seen, so that a force field is not judged by them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlip_jax.datasets.molecules.connectivity import IdentityQuery, describe
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection.split_files import load_split
from mlip_jax.datasets.store.store import Store, is_store

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunData:
    """The data of a training run. store: its structures; parts: numbers there of "train", "valid" and "test"."""

    workdir: Path
    store: Store
    parts: dict[str, np.ndarray]

    @classmethod
    def load(cls, workdir: str | Path) -> RunData:
        """Of a workdir, from its splits.npz.

        Raises:
          DatasetError: There is no split, or the store that it is of is gone.
        """
        workdir = Path(workdir)
        parts, meta = load_split(workdir / "splits.npz")
        store = Path(meta.get("store", ""))
        if not is_store(store):
            raise DatasetError(f"{workdir}: the data that it was trained on are not at {store.absolute()}. Run the "
                               "command where the training ran, or put the store back.")
        return cls(workdir, Store(store), parts)

    def held_out(self) -> np.ndarray:
        """All structures of the molecules that are in the test part, and in no other, (S,) int64."""
        molecule = self.store.index("molecule")
        test = np.setdiff1d(molecule[self.parts.get("test", [])], molecule[self.seen()])
        return np.flatnonzero(np.isin(molecule, test))

    def seen(self) -> np.ndarray:
        """Structures of the training and the validation part, by which a run chooses its parameters, (S,) int64."""
        return np.concatenate([self.parts.get(name, np.zeros(0, np.int64)) for name in ("train", "valid")])

    def seen_skeletons(self, num_processes: int | None = None) -> tuple[set[str], int]:
        """Skeletons (connectivity.py) of the molecules seen, and the number of those that RDKit cannot read."""
        first = first_of_each(self.store, self.seen())
        found = describe(entries(self.store, first), len(first), num_processes=num_processes,
                         label=f"molecules of {self.workdir.name}")
        return {d.skeleton for d in found if d is not None}, sum(d is None for d in found)


def first_of_each(store: Store, indices: np.ndarray, last: bool = False) -> np.ndarray:
    """Of `indices`, the structure of each molecule that comes first (or last) by record and conformer, ascending."""
    keys = [store.index(name)[indices] for name in ("conformer", "record", "molecule")]
    order = np.lexsort(keys)
    molecule = keys[2][order]
    edge = np.flatnonzero(molecule[1:] != molecule[:-1])
    edge = np.append(edge, len(order) - 1) if last else np.append(0, edge + 1)
    return np.sort(indices[order[edge]]) if len(order) else indices[:0]


def entries(store: Store, indices: np.ndarray, use_smiles: bool = True) -> Iterator[IdentityQuery]:
    """Structures of a store to describe: by their SMILES where they have one, else by their geometries."""
    for _, columns in store.chunks(indices):
        for structure in columns:
            smiles = structure.smiles if use_smiles else ""
            yield IdentityQuery(smiles) if smiles else IdentityQuery("", structure.numbers, structure.positions)
