"""Loading of the data of a run: from config.data to a store and the indices of its splits.

1. `locate` finds the data: data.path, a SPICE file in data.directory, or generated data.
2. `open_store` opens a store, or converts the file to one the first time.
3. `select` applies the filters.
4. `split` selects the structures for training, validation and test.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from mlip_jax.config import ConfigError, unknown_name
from mlip_jax.datasets.quality.filters import Filters, count_reasons, identities
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.readers import spice
from mlip_jax.datasets.selection import diversity, scaffolds, split_files, splits, subsets
from mlip_jax.datasets.selection.held_out import first_of_each
from mlip_jax.datasets.statistics import NUM_ELEMENTS, isolated_from_formation
from mlip_jax.datasets.store.conversion import ConversionSpec, convert, identify
from mlip_jax.datasets.store.store import Store, is_store
from mlip_jax.workdir import atomic_open

log = logging.getLogger(__name__)

SPICE_LEVEL = spice.Reader.LEVEL_OF_THEORY
HOW_TO_GET_SPICE = (
    "For the real data set download SPICE-2.0.1.hdf5 (or SPICE-1.1.4.hdf5) of the SPICE dataset by Eastman et al. from "
    "Zenodo (linked from github.com/openmm/spice-dataset), put it into the folder data/ or name it as "
    "--config.data.path."
)
# Bytes. Checksums of larger stores would delay the start of a run by more than some seconds.
_VERIFY_UP_TO = 4 * 2**30
Embed = Callable[[Store, np.ndarray], np.ndarray]
_FILTERS = [field.name for field in dataclasses.fields(Filters)]


@dataclasses.dataclass(frozen=True)
class LoadedData:
    """Selected structures of a store, with metadata of the data set.

    Attributes:
      store: Store with the structures.
      indices: Indices of the selected structures in the store, ascending, (S,) int64.
      reasons: Reason for the exclusion of each structure of the store, (len(store),) int8. The
        codes are those of filters.REASONS; 0 for selected structures.
      name: Name of the data set.
      level_of_theory: Level of theory of the labels.
      notes: Remarks that a reader of the results has to know.
      counts: Numbers of structures read, skipped and removed by filters.
    """

    store: Store
    indices: np.ndarray
    reasons: np.ndarray
    name: str
    level_of_theory: str
    notes: list[str]
    counts: dict[str, Any]


def locate(data: Any) -> str:
    """Return the path of the data.

    This is data.path if it is set, or else a SPICE file in data.directory, or else the built-in
    data set, which is generated if necessary.
    """
    if data.path:
        return str(data.path)
    directory = Path(data.directory)
    found = sorted((p for p in directory.glob("SPICE*.hdf5") if p.is_file()), reverse=True)
    if found:
        log.info("found %s", found[0])
        return str(found[0])
    path = directory / f"embedded_gfn2_{data.num_generated}.hdf5"
    if not path.exists():
        log.warning(
            "no SPICE file in %s/: making %d conformations of built-in molecules with GFN2-xTB labels (NOT "
            "SPICE's %s). %s",
            directory,
            data.num_generated,
            SPICE_LEVEL,
            HOW_TO_GET_SPICE,
        )
    from mlip_jax.datasets.builtin import generate_embedded

    return str(generate_embedded(path, num_conformations=data.num_generated))


def open_store(data: Any) -> Store:
    """Open the store at data.path, or convert the file at data.path to a store first.

    The converted store is saved in the folder stores/ of data.directory and reused by later runs.

    Raises:
      DatasetError: The file cannot be read, or the checks of the data reject it.
    """
    path = locate(data)
    if is_store(path):
        store = Store(path)
        if _to_verify(store, data.verify):
            store.verify()
        return store
    recipe = ConversionSpec(path, data.reader, reader_options(data.reader_options))
    with recipe.open() as source:
        identity = json.dumps(
            [dataclasses.asdict(recipe) | {"path": ""}, identify(source)], sort_keys=True
        )
    key = hashlib.sha256(identity.encode()).hexdigest()[:10]
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(path).stem)[:60]
    folder = Path(data.directory) / "stores" / f"{stem}-{key}"
    if not is_store(folder):
        log.info("converting %s once, into the store %s", path, folder)
    if not _is_sound(folder, data.verify):
        convert(recipe, folder, refuse=data.refuse)  # verifies and repairs an existing store
    store = Store(folder)
    errors = [p["message"] for p in store.manifest["problems"] if p["severity"] == "error"]
    if errors and data.refuse:  # the store was converted earlier with refuse=False
        raise DatasetError(
            f"{path}: refused by the checks of the data:\n  - "
            + "\n  - ".join(errors)
            + "\nIf it is right all the same, give --config.data.refuse=False."
        )
    return store


def _is_sound(folder: Path, verify: bool | None) -> bool:
    """Return whether the folder has a store whose checksums need not be verified."""
    try:
        return is_store(folder) and not _to_verify(Store(folder), verify)
    except DatasetError as error:
        log.warning("%s", error)
        return False


def _to_verify(store: Store, wanted: bool | None) -> bool:
    size = sum(s["bytes"] for s in store.manifest["shards"])
    return size <= _VERIFY_UP_TO if wanted is None else wanted


def reader_options(text: str) -> dict[str, Any]:
    """Parse config.data.reader_options. Values that are not Python literals are strings.

    >>> reader_options("stages=('pm3', 'DFT_1st'); stride=4; level_of_theory=PBE0")
    {'stages': ['pm3', 'DFT_1st'], 'stride': 4, 'level_of_theory': 'PBE0'}
    """
    options = {}
    for part in filter(None, (p.strip() for p in text.split(";"))):
        name, equals, value = (p.strip() for p in part.partition("="))
        if not equals or not name.isidentifier():
            raise ConfigError(
                f"data.reader_options: expected 'name=value; name=value', received {text!r}"
            )
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    try:
        return json.loads(json.dumps(options))
    except TypeError as error:
        raise ConfigError(f"data.reader_options: {error}; received {text!r}") from error


def load(data: Any) -> LoadedData:
    """Open the data of config.data and apply its filters.

    Raises:
      DatasetError: The data cannot be read, or no structure passes the filters.
    """
    store = open_store(data)
    name = Path(data.path or locate(data)).name
    reasons = select(store, filters_of(data))
    indices = np.flatnonzero(reasons == 0)
    made = store.manifest["counts"]
    counts = {
        "structures read": made["read"],
        "skipped by the reader": made["skipped"],
        "in the store": len(store),
        "left out": count_reasons(reasons),
        "used": len(indices),
    }
    if not len(indices):
        raise DatasetError(
            f"{name}: none of {len(store)} structures passes the selection (left out: {count_reasons(reasons)}; "
            f"skipped when read: {made['skipped'] or 'none'}). Change data.elements, data.charge, data.max_atoms or "
            "another filter of config.data."
        )
    log.info(
        "%s: %d structures used of %d; left out: %s",
        name,
        len(indices),
        len(store),
        count_reasons(reasons) or "none",
    )
    level = store.level_of_theory
    notes = list(store.manifest["notes"]) + [p["message"] for p in store.manifest["problems"]]
    if "xtb" in level.lower():
        note = f"The labels of this run are {level}: a fast semi-empirical method"
        in_place_of_spice = not data.path or store.manifest["source"]["reader"] == "spice"
        notes.append(
            f"{note}, not SPICE's {SPICE_LEVEL}. {HOW_TO_GET_SPICE}"
            if in_place_of_spice
            else f"{note}."
        )
    for note in notes:
        log.warning(note)
    return LoadedData(store, indices, reasons, name, level, notes, counts)


def filters_of(data: Any) -> Filters:
    """Return the filters of config.data."""
    return Filters(**{f: data[f] for f in _FILTERS})


def select(store: Store, filters: Filters) -> np.ndarray:
    """Return why each structure is excluded, (S,) int8: a code of filters.REASONS, or 0 if kept."""
    reasons = np.zeros(len(store), np.int8)
    for here, columns in store.chunks(labels_only=True):
        reasons[here] = filters.reasons(columns, shortest=store.index("shortest_distance")[here])
    if filters.compares_conformations:
        kept = np.flatnonzero(reasons == 0)
        reasons[kept] = filters.molecule_outliers(
            *(store.index(n)[kept] for n in ("molecule", "energy", "force_rms", "n_atoms"))
        )
    return reasons


def write_left_out(path: Path, data: LoadedData) -> None:
    """Write a CSV file of the structures that the filters removed: identity and reason."""
    with atomic_open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["structure", "reason"])
        for here, columns in data.store.chunks(np.flatnonzero(data.reasons)):
            writer.writerows(identities(columns, data.reasons[here]))


def split(data: LoadedData, options: Any, embed: Embed | None = None) -> dict[str, np.ndarray]:
    """Return the indices in the store of the splits "train", "valid" and "test".

    Args:
      data: Loaded data.
      options: config.data.
      embed: Function that returns features (I, F) of the structures (I,) of a store. Required if
        data.selection is "embedding".

    Raises:
      ValueError, DatasetError: The data cannot be split in this way.
    """
    store, indices = data.store, data.indices
    extra: dict[str, Any] = {}
    by = "official" if options.split_files else options.split
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
        molecule=np.asarray(store.index("molecule")[indices]),
        **extra,
    )
    parts = {name: indices[places] for name, places in parts.items()}
    if options.held_out:
        parts = _without_held_out(parts, store, options.held_out)
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
    asked = options.get("fewer_conformers", "exclude")  # missing in configs of older versions
    if asked not in ("exclude", "last"):
        raise ValueError(unknown_name("data.fewer_conformers", asked, ("exclude", "last")))
    if asked == "last" and options.get("selection", "random") != "random":
        raise ValueError(
            "data.fewer_conformers='last' draws molecules in an order of its own, so that "
            f"data.selection must be 'random'; received {options.selection!r}"
        )
    return asked == "last"


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
    how = dict(seed=options.split_seed, least=options.min_conformers or options.num_conformers)
    if selection == "maxmin":
        codes, smiles = store.texts("smiles")
        return diversity.maxmin_rank(
            molecule, [smiles[code] for code in codes[train]], count, **how
        )
    if embed is None:
        raise ValueError(
            "data.selection='embedding' needs the features of a trained force field: "
            "--config.data.selection_force_field=WORKDIR"
        )
    # Embed the molecules of all splits. Runs with other splits can then reuse the features, and the
    # batches are the same. With other batches, rounding could swap two picks.
    ids = np.asarray(store.index("molecule"))
    first = first_of_each(store, subsets.with_min_conformers(ids, data.indices, how["least"]))
    return diversity.farthest_rank(molecule, ids[first], embed(store, first), count, **how)


def _without_held_out(parts, store: Store, files: str) -> dict[str, np.ndarray]:
    """Remove the molecules in the test split of any of `files` from the splits train and valid."""
    records = store.manifest["source"]["records"]
    test = [
        split_files.read_split_file(path.strip(), records).get("test") for path in files.split(",")
    ]
    if any(t is None for t in test):
        raise DatasetError(
            f"data.held_out: {files} has no test part, which it is to keep out of training"
        )
    molecule = np.asarray(store.index("molecule"))
    # Remove whole molecules: the split in the file may omit some of their records.
    held = np.isin(molecule, molecule[np.isin(store.index("record"), np.concatenate(test))])
    kept = {
        name: indices if name == "test" else indices[~held[indices]]
        for name, indices in parts.items()
    }
    log.info(
        "held out for the tests of other runs: %d structures of training, %d of validation",
        *(len(parts[name]) - len(kept[name]) for name in ("train", "valid")),
    )
    if not len(kept["train"]):
        raise DatasetError(f"data.held_out: {files} leaves no structure to train on")
    return kept


def _scaffolds(store: Store) -> np.ndarray:
    codes, smiles = store.texts("smiles")
    if smiles == [""]:
        raise DatasetError(
            f"{store.path}: a split by scaffold needs SMILES, and this data set has none. Choose "
            "another data.split."
        )
    return scaffolds.scaffold_index(smiles)[1][codes]


def isolated_atoms(data: LoadedData) -> np.ndarray | None:
    """Return the energies of isolated atoms (eV), (119,), that the data set states or implies.

    Unknown elements are NaN. The result is None if the data set has neither energies of isolated
    atoms nor formation energies.
    """
    stated = data.store.manifest["atom_energies"]
    if stated:
        energies = np.full(NUM_ELEMENTS, np.nan)
        for symbol, energy in stated.items():
            energies[atomic_numbers[symbol]] = energy
        return energies
    if "formation_energy" not in data.store.manifest["properties"]:
        return None
    return isolated_from_formation(
        (columns, columns.properties["formation_energy"])
        for _, columns in data.store.chunks(data.indices)
    )


def parse_reference(text: str) -> str | dict[str, float]:
    """Parse config.data.reference_energies: the name of a method, or "H=-13.6,C=-1029.4" in eV.

    >>> parse_reference("least_squares"), parse_reference("H=-13.6, C=-1029.4")
    ('least_squares', {'H': -13.6, 'C': -1029.4})
    """
    if "=" not in text:
        return text
    try:
        return {k.strip(): float(v) for k, v in (pair.split("=") for pair in text.split(","))}
    except ValueError as error:
        raise ValueError(
            f"data.reference_energies: expected 'H=-13.6,C=-1029.4,...' in eV, received {text!r}"
        ) from error
