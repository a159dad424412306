"""Molecules that a training run has seen, for excluding them from the evaluation of its model."""

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

SPLITS = "splits.npz"  # file in the workdir of a training run


@dataclasses.dataclass(frozen=True)
class RunData:
    """Data of a training run.

    Attributes:
      workdir: Workdir of the run.
      store: Store with the structures.
      parts: Indices in the store of the splits "train", "valid" and "test".
    """

    workdir: Path
    store: Store
    parts: dict[str, np.ndarray]

    @classmethod
    def load(cls, workdir: str | Path) -> RunData:
        """Load the data of a run from splits.npz in its workdir.

        Options of the force field may follow the workdir, as in "runs/a#dispersion=pbe".

        Raises:
          DatasetError: The workdir has no split, or the store does not exist anymore.
        """
        if not Path(workdir).exists():
            workdir = str(workdir).partition("#")[0]
        workdir = Path(workdir)
        if not (workdir / SPLITS).exists():
            raise DatasetError(
                f"{workdir}: is not the workdir of a training run ({SPLITS} is missing), so its "
                "training data are unknown."
            )
        parts, meta = load_split(workdir / SPLITS)
        store = Path(meta.get("store", ""))
        if not is_store(store):
            raise DatasetError(
                f"{workdir}: the store of its training data is missing at {store.absolute()}. Run "
                "the command in the folder in which the training ran, or restore the store."
            )
        return cls(workdir, Store(store), parts)

    def held_out(self) -> np.ndarray:
        """Return all structures of the molecules that occur only in the test split, (S,) int64."""
        molecule = self.store.index("molecule")
        test = np.setdiff1d(molecule[self.parts.get("test", [])], molecule[self.seen()])
        return np.flatnonzero(np.isin(molecule, test))

    def seen(self) -> np.ndarray:
        """Return the structures of the training and validation splits, (S,) int64.

        A run uses both to choose its parameters.
        """
        return np.concatenate(
            [self.parts.get(name, np.zeros(0, np.int64)) for name in ("train", "valid")]
        )

    def seen_skeletons(self, num_processes: int | None = None) -> tuple[set[str], int]:
        """Return the skeletons (connectivity.py) of the molecules that the run has seen.

        The second value is the number of molecules that RDKit cannot read.
        """
        first = first_per_molecule(self.store, self.seen())
        descriptions = describe(
            entries(self.store, first),
            len(first),
            num_processes=num_processes,
            label=f"molecules of {self.workdir.name}",
        )
        return {d.skeleton for d in descriptions if d is not None}, sum(
            d is None for d in descriptions
        )


def first_per_molecule(store: Store, indices: np.ndarray, last: bool = False) -> np.ndarray:
    """Return one index per molecule, ascending: the first structure by record and conformer.

    Args:
      store: Store with the structures.
      indices: Indices of the structures to choose from.
      last: Whether to return the last structure of each molecule instead.
    """
    keys = [store.index(name)[indices] for name in ("conformer", "record", "molecule")]
    order = np.lexsort(keys)
    molecule = keys[2][order]
    # Last position of each molecule in the sorted order, except the very last one.
    edge = np.flatnonzero(molecule[1:] != molecule[:-1])
    edge = np.append(edge, len(order) - 1) if last else np.append(0, edge + 1)
    return np.sort(indices[order[edge]]) if len(order) else indices[:0]


def entries(store: Store, indices: np.ndarray, use_smiles: bool = True) -> Iterator[IdentityQuery]:
    """Yield a query per structure: its SMILES (if known and `use_smiles`), or else its geometry."""
    for _, columns in store.chunks(indices):
        for structure in columns:
            smiles = structure.smiles if use_smiles else ""
            yield (
                IdentityQuery(smiles)
                if smiles
                else IdentityQuery("", structure.numbers, structure.positions)
            )
