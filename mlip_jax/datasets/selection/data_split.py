"""Split of loaded data into training, validation and test as set in config.data."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from mlip_jax.config import unknown_name
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection import (
    diversity,
    scaffolds,
    split_choice,
    split_files,
    splits,
    subsets,
)
from mlip_jax.datasets.selection.held_out import first_per_molecule
from mlip_jax.datasets.source import LoadedData
from mlip_jax.datasets.store.store import Store

log = logging.getLogger(__name__)

# Function that returns features (I, F) of the structures (I,) of a store.
Embed = Callable[[Store, np.ndarray], np.ndarray]


def split_data(data: LoadedData, options: Any, embed: Embed | None = None) -> dict[str, np.ndarray]:
    """Return the indices in the store of the splits "train", "valid" and "test".

    Args:
      data: Loaded data.
      options: config.data.
      embed: Function that returns the features of structures. Required if data.selection is
        "embedding".

    Raises:
      ValueError, DatasetError: The data cannot be split in this way.
    """
    store, indices = data.store, data.indices
    extra: dict[str, Any] = {}
    by = "official" if options.split_files else options.split
    molecule = np.asarray(store.index("molecule")[indices])
    if by == "auto":
        by = split_choice.choose(molecule)
    if by.startswith("scaffold"):
        extra["scaffold"] = _scaffolds(store)[indices]
    elif by == "size":
        extra["n_atoms"] = np.asarray(store.index("n_atoms")[indices])
    elif by == "official":
        records = store.manifest["source"]["records"]
        extra["official"] = (
            split_files.read_split_files(options.split_files, records)
            if options.split_files
            else store.official_split()
        )
        extra["record"] = np.asarray(store.index("record")[indices])
    parts = splits.split(
        by,
        (options.num_train, options.num_valid, options.num_test),
        seed=options.split_seed,
        molecule=molecule,
        **extra,
    )
    parts = {name: indices[rows] for name, rows in parts.items()}
    if options.held_out:
        parts = _remove_held_out(parts, store, options.held_out)
    if options.num_molecules:
        train = parts["train"]
        molecule, conformer = (np.asarray(store.index(n)[train]) for n in ("molecule", "conformer"))
        parts["train"] = np.sort(
            train[
                subsets.nested_subset(
                    molecule,
                    conformer,
                    options.num_molecules,
                    options.num_conformers,
                    seed=options.split_seed,
                    min_conformers=options.min_conformers,
                    fewer_last=_fewer_last(options),
                    rank=_rank(data, train, molecule, options, embed),
                )
            ]
        )
    return parts


def _fewer_last(options: Any) -> bool:
    """Return whether molecules with fewer than data.min_conformers conformers are drawn last.

    Otherwise they are excluded.
    """
    policy = options.get("below_min_conformers", "exclude")  # missing in configs of older versions
    if policy not in ("exclude", "last"):
        raise ValueError(unknown_name("data.below_min_conformers", policy, ("exclude", "last")))
    if policy == "last" and options.get("selection", "random") != "random":
        raise ValueError(
            "data.below_min_conformers='last' determines the order of the molecules and requires "
            f"data.selection='random'; received {options.selection!r}"
        )
    return policy == "last"


def _rank(
    data: LoadedData, train: np.ndarray, molecule: np.ndarray, options: Any, embed: Embed | None
) -> np.ndarray | None:
    """Return the rank of each molecule in the selection for training; None for random selection."""
    selection = options.get("selection", "random")  # missing in configs of older versions
    if selection not in subsets.SELECTIONS:
        raise ValueError(unknown_name("data.selection", selection, subsets.SELECTIONS))
    if selection == "random":
        return None
    count, store = options.num_molecules, data.store
    settings = dict(
        seed=options.split_seed, min_conformers=options.min_conformers or options.num_conformers
    )
    if selection == "maxmin":
        codes, smiles = store.texts("smiles")
        return diversity.maxmin_rank(
            molecule, [smiles[code] for code in codes[train]], count, **settings
        )
    if embed is None:
        raise ValueError(
            "data.selection='embedding' requires the features of a trained force field: "
            "--config.data.selection_force_field=WORKDIR"
        )
    # Embed the molecules of all splits. Runs with other splits can then reuse the features, and the
    # batches are the same. With other batches, rounding could swap two picks.
    ids = np.asarray(store.index("molecule"))
    first = first_per_molecule(
        store, subsets.with_min_conformers(ids, data.indices, settings["min_conformers"])
    )
    return diversity.farthest_rank(molecule, ids[first], embed(store, first), count, **settings)


def _remove_held_out(parts, store: Store, files: str) -> dict[str, np.ndarray]:
    """Remove the molecules in the test split of any of `files` from the splits train and valid."""
    records = store.manifest["source"]["records"]
    test = [
        split_files.read_split_file(path.strip(), records).get("test") for path in files.split(",")
    ]
    if any(t is None for t in test):
        raise DatasetError(
            f"data.held_out: {files} contains no test split to hold out from training"
        )
    molecule = np.asarray(store.index("molecule"))
    # Remove whole molecules: the split in the file may omit some of their records.
    held = np.isin(molecule, molecule[np.isin(store.index("record"), np.concatenate(test))])
    kept = {
        name: indices if name == "test" else indices[~held[indices]]
        for name, indices in parts.items()
    }
    log.info(
        "held out for the tests of other runs: %d training and %d validation structures",
        *(len(parts[name]) - len(kept[name]) for name in ("train", "valid")),
    )
    if not len(kept["train"]):
        raise DatasetError(f"data.held_out: {files} leaves no training structures")
    return kept


def _scaffolds(store: Store) -> np.ndarray:
    """Return the scaffold index of each structure of a store, (len(store),) int32."""
    codes, smiles = store.texts("smiles")
    if smiles == [""]:
        raise DatasetError(
            f"{store.path}: a split by scaffold requires SMILES, which this data set lacks. Choose "
            "another data.split."
        )
    return scaffolds.scaffold_index(smiles)[1][codes]
