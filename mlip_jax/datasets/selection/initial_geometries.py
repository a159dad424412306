"""Selection of molecules with initial geometries for the evaluation of relaxations."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
from ase.data import chemical_symbols

from mlip_jax.config import unknown_name
from mlip_jax.datasets.molecules.connectivity import Description, describe
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection import diversity
from mlip_jax.datasets.selection.geometry_pools import (
    FilePool,
    InitialGeometry,
    SmilesPool,
    StorePool,
)

SMILES_FILES = ("smi", "csv")  # kinds of files, as from molecules.files.kind_of
SELECTIONS = ("maxmin", "random", "all")
SEEN = "it is in the training or validation split of a force field"


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
    pool: StorePool | SmilesPool | FilePool,
    choice: MoleculeSelection,
    num_processes: int | None = None,
) -> tuple[list[InitialGeometry], dict[str, str]]:
    """Select molecules from a pool.

    Returns:
      The starts in the order of picking, and the reasons for exclusion by name.

    Raises:
      DatasetError: No molecule is left, or `choice.first` is not in the pool.
      ImportError: RDKit is missing.
    """
    names = pool.names()
    maxmin = choice.selection == "maxmin"
    descriptions = describe(
        pool.entries(), len(pool), fingerprints=maxmin, num_processes=num_processes
    )
    left_out, usable, seen = {}, [], set()
    for index, (name, description) in enumerate(zip(names, descriptions)):
        reason = _reason(description, choice)
        if reason == SEEN and choice.allow_seen:
            seen.add(name)
        elif reason:
            left_out[name] = reason
            continue
        usable.append(index)
    if not usable:
        counts = ", ".join(
            f"{n} × {reason}" for reason, n in collections.Counter(left_out.values()).most_common(5)
        )
        raise DatasetError(
            f"none of {len(names)} molecules is usable: {counts}. Set config.data.path to other "
            "molecules."
        )
    # Indices among the usable molecules, converted to indices in the pool.
    picked = [
        usable[p]
        for p in _pick([names[p] for p in usable], [descriptions[p] for p in usable], choice)
    ]
    starts, problems = pool.make(picked, num_processes)
    return [dataclasses.replace(s, seen=s.name in seen) for s in starts], left_out | problems


def _reason(description: Description | None, choice: MoleculeSelection) -> str:
    """Return the reason for excluding a molecule, "" if it is usable."""
    if description is None:
        return "RDKit cannot read it"
    unknown = sorted(set(description.elements) - choice.elements)
    if unknown:
        return f"a force field does not support {', '.join(chemical_symbols[z] for z in unknown)}"
    return SEEN if description.skeleton in choice.seen else ""


def _pick(
    names: list[str], descriptions: list[Description], choice: MoleculeSelection
) -> np.ndarray:
    """Return the indices of the selected molecules in the order of picking."""
    if choice.first is not None and choice.selection == "maxmin" and choice.first not in names:
        raise DatasetError(
            unknown_name("first molecule (config.data.first)", choice.first, names[:1000])
        )
    if choice.selection == "all":
        return np.arange(len(names))
    if choice.selection == "random":
        return np.random.default_rng(choice.seed).permutation(len(names))[: choice.count]
    first = None if choice.first is None else names.index(choice.first)
    return diversity.maxmin(
        [d.fingerprint for d in descriptions], choice.count, first=first, seed=choice.seed
    )
