"""Task `diversity`: train on n_s molecules with n_c conformers each and measure generalization."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.config import ConfigError
from mlip_jax.datasets import source
from mlip_jax.datasets.molecules.connectivity import describe
from mlip_jax.datasets.selection import data_split, generalization, splits, subsets
from mlip_jax.datasets.selection.held_out import RunData, entries, first_per_molecule
from mlip_jax.datasets.store.store import Store
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.potential import Potential
from mlip_jax.reports.diversity.fingerprint_map import unpack
from mlip_jax.reports.diversity.generalization import NAMES, Errors, by_distance, summary
from mlip_jax.reports.diversity.report import FINGERPRINTS, RESULT
from mlip_jax.simulation.energies import energies, energies_and_forces
from mlip_jax.tasks import train
from mlip_jax.tasks.force_field_training.preparation import energy_only
from mlip_jax.wording import count_of
from mlip_jax.workdir import atomic_open, write_json

log = logging.getLogger(__name__)

STRUCTURES = "diversity.npz"
_MAX_MAPPED = 500  # maximum number of molecules per set whose fingerprints are saved for a map


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Train by `config`, or resume a run in `workdir`, and evaluate; return the path of the result.

    The training is identical to task `train`. If a run of this config, or of the same config of
    task `train`, is complete in `workdir`, it is only evaluated. If it has been evaluated with the
    same options before, nothing is done.

    Raises:
      ConfigError, WorkdirError, DatasetError, TrainingError, CheckpointError, Stopped: The message
        explains how to fix the problem.
    """
    workdir = Path(workdir)
    given, config = copy.deepcopy(config), configs.complete(config, defaults.diversity_defaults())
    _check(config)
    given.unlock()
    given.task = "train"
    if "diversity" in given:
        del given.diversity
    training, options = configs.complete(given, defaults.train_defaults()), config.diversity
    if not _is_trained(workdir, training):
        train.run(given, workdir)
    path = workdir / RESULT
    if distributed.leader():
        relevant = _relevant_options(options)
        if path.exists() and parse_json(read_bytes(path))["asked"] == relevant:
            log.info("%s: already evaluated", workdir)
        else:
            write_json(path, {"asked": relevant} | evaluate(workdir, training, options))
    return path


def _check(config) -> None:
    """Raise ConfigError if the bins are not ascending, or the split is not by molecule."""
    bins = np.array(config.diversity.rmsd_bins, float)
    if len(bins) < 2 or not (np.diff(bins) > 0).all():
        raise ConfigError(
            "diversity.rmsd_bins must be at least two ascending numbers (Å), received "
            f"{bins.tolist()}"
        )
    if config.data.num_molecules and config.data.split != "molecule":
        raise ConfigError(
            "IID-S contains molecules that are not in the training split: data.split must be "
            f"'molecule', received {config.data.split!r}"
        )


def _is_trained(workdir: Path, training) -> bool:
    """Return whether `workdir` contains a completed run of this config."""
    try:
        identity = parse_json(read_bytes(workdir / "config.json"))
        parse_json(read_bytes(workdir / "metrics.json"))
    except (FileNotFoundError, ValueError):
        return False
    identity = configs.with_current_names(identity)
    return not configs.differences(identity, json.loads(json.dumps(configs.identity(training))))


def _relevant_options(options) -> dict[str, Any]:
    """Return the options that determine the result, as read back from JSON."""
    return {
        k: v
        for k, v in json.loads(json.dumps(configs.to_dict(options))).items()
        if k != "num_processes"
    }


def evaluate(
    workdir: str | Path, training: ml_collections.ConfigDict, options: ml_collections.ConfigDict
) -> dict[str, Any]:
    """Compute the four metrics of a completed training run (datasets/selection/generalization.py).

    This function writes two files to the workdir. diversity.npz has the errors of all structures:
    "set" (a key of NAMES), "structure" (index in its store), "molecule", "n_atoms", "energy" and
    "predicted" (eV), "rmsd" (Å, NaN except for conformers), and "force_error" (mean |error| of the
    components, eV/Å) if the run trained on forces. fingerprints.npz has Morgan fingerprints of some
    molecules of "train", "iid_s" and "ood_s" as packed bits (M, 256).

    Args:
      workdir: Workdir of the run.
      training: Config of the run.
      options: Options of the evaluation, config.diversity.

    Returns:
      Metrics, notes and settings, ready for JSON.

    Raises:
      DatasetError, CheckpointError: The data of the run, or its force field, do not exist.
    """
    workdir = Path(workdir)
    potential, data = Potential.load(workdir), RunData.load(workdir)
    seed, train_indices = training.seed, data.parts["train"]
    compute_errors = functools.partial(_errors, potential, with_forces=not energy_only(training))
    sets: dict[str, Errors] = {}
    indices, notes = {}, []  # indices of the structures of each set in their store
    indices["iid_s"] = _of_known_elements(
        _sample(_unseen_molecules(data, training), data.store, options, seed),
        data.store,
        potential,
        notes,
    )
    sets["iid_s"] = compute_errors(data.store, indices["iid_s"])
    conformers, distances = _conformers(data, training, options)
    unseen = compute_errors(data.store, conformers)
    members = {"unseen_c": np.arange(len(conformers))} | generalization.near_and_far(
        distances.rmsd, options.rmsd_threshold
    )
    for name, chosen in members.items():
        sets[name], indices[name] = unseen.take(chosen), conformers[chosen]
    notes += distances.notes
    mapped = {"train": (data.store, train_indices), "iid_s": (data.store, indices["iid_s"])}
    if options.ood_path:
        store, indices["ood_s"], ood_notes = _other_molecules(data, potential, training, options)
        sets["ood_s"] = compute_errors(store, indices["ood_s"])
        mapped["ood_s"] = (store, indices["ood_s"])
        notes += ood_notes
    rmsd = {name: distances.rmsd[chosen] for name, chosen in members.items()}
    _save(workdir / STRUCTURES, _arrays(sets, indices, rmsd))
    _save(
        workdir / FINGERPRINTS, {name: _fingerprints(*rows, seed) for name, rows in mapped.items()}
    )
    result = {
        "train": _training(data.store, train_indices, training),
        "notes": notes,
        "metrics": {name: summary(sets[name]) if name in sets else None for name in NAMES},
        "by_rmsd": by_distance(unseen, distances.rmsd, np.array(options.rmsd_bins, float)),
        "force_field": potential.digest(),
        "level_of_theory": potential.metadata.get("statistics", {}).get("level_of_theory", ""),
    }
    for name, metrics in result["metrics"].items():
        if metrics:
            shown = (
                "-" if metrics[k] is None else f"{metrics[k]:.2f}"
                for k in ("energy_mae_mev_per_atom", "force_mae_mev_per_ang")
            )
            log.info(
                "%s: %s meV/atom, %s meV/Å over %s of %s",
                NAMES[name],
                *shown,
                count_of(metrics["num_structures"], "structure"),
                count_of(metrics["num_molecules"], "molecule"),
            )
    return result


def _training(store: Store, indices: np.ndarray, training) -> dict[str, Any]:
    """Return the size and settings of the training set for the report."""
    molecules = splits.group(np.asarray(store.index("molecule")[indices]))[1]
    return {
        "num_structures": len(indices),
        "num_molecules": molecules,
        "num_conformers": training.data.num_conformers if training.data.num_molecules else None,
        "seed": training.seed,
        "split_seed": training.data.split_seed,
        "model": training.model.name,
        "selection": training.data.selection,
        "beta": training.loss.beta_end,
    }


def _unseen_molecules(data: RunData, training) -> np.ndarray:
    """Return the test structures of IID-S; their molecules have enough conformers for training."""
    test, draw = (
        np.asarray(data.parts.get("test", []), np.int64),
        generalization.draw_settings(training.data),
    )
    return (
        test
        if draw is None
        else subsets.with_min_conformers(np.asarray(data.store.index("molecule")), test, draw[0])
    )


def _of_known_elements(
    indices: np.ndarray, store: Store, potential: Potential, notes: list[str]
) -> np.ndarray:
    """Return the structures whose elements all occur in the training molecules.

    A small training set may lack a rare element.
    """
    known = np.zeros(119, bool)
    known[list(potential.elements)] = True
    kept = [
        rows[[bool(known[s.numbers].all()) for s in columns]]
        for rows, columns in store.chunks(indices, labels_only=True)
    ]
    kept = np.concatenate([*kept, indices[:0]])
    if len(kept) < len(indices):
        notes.append(
            f"IID-S: {len(indices) - len(kept)} of {len(indices)} structures are skipped, because "
            "they have elements that the training molecules of this run lack."
        )
        log.warning("%s", notes[-1])
    return kept


def _conformers(data: RunData, training, options) -> tuple[np.ndarray, generalization.Distances]:
    """Return unseen conformers of training molecules and their distances to training conformers."""
    draw, store, train_indices = (
        generalization.draw_settings(training.data),
        data.store,
        data.parts["train"],
    )
    if draw is None:
        log.warning(
            "IID-C and OOD-C are empty: training used all conformers of its molecules "
            "(data.num_molecules is not set)"
        )
        empty = np.zeros(0, np.int64)
        return empty, generalization.Distances(np.zeros(0), [])
    molecule, conformer = (np.asarray(store.index(name)) for name in ("molecule", "conformer"))
    conformers = generalization.unseen_conformers(
        molecule,
        conformer,
        train_indices,
        num_conformers=draw[0],
        seed=draw[1],
        max_molecules=options.max_molecules,
        among=np.flatnonzero(source.select(store, source.filters_of(training.data)) == 0),
    )
    conformers = _with_energy(conformers, store)
    log.info("%d unseen conformers of the training molecules", len(conformers))
    return conformers, generalization.distances_to_training(
        store, conformers, train_indices, num_processes=options.num_processes or None
    )


def _other_molecules(
    data: RunData, potential: Potential, training, options
) -> tuple[Store, np.ndarray, list[str]]:
    """Return store, structures and notes of OOD-S: unseen molecules of another data set.

    All elements of these molecules occur in the training data.
    """
    ood_data = training.data.copy_and_resolve_references()
    ood_data.unlock()
    ood_data.path, ood_data.reader = options.ood_path, options.ood_reader
    ood_data.reader_options = options.ood_reader_options
    ood_data.elements = None  # unknown elements are excluded below, with a note
    ood_data.require = "energy"  # without forces, energies can still be compared
    loaded = source.load(ood_data)
    store, indices = loaded.store, loaded.indices
    level = potential.metadata.get("statistics", {}).get("level_of_theory", "")
    notes = []
    if loaded.level_of_theory != level:
        notes.append(
            f"OOD-S: its labels are {loaded.level_of_theory}, but training used {level}. Its "
            "errors include the difference between the two."
        )
        log.warning("%s", notes[-1])
    first = first_per_molecule(store, indices)
    seen, _ = _with_whole_splits(data, training).seen_skeletons()
    descriptions = describe(entries(store, first), len(first))
    molecule = np.asarray(store.index("molecule"))
    known = set(potential.elements)
    reasons = {
        "was in the training or validation split": [
            d is not None and d.skeleton in seen for d in descriptions
        ],
        "cannot be read by RDKit": [d is None for d in descriptions],
        "has elements that the force field was not trained on": [
            d is not None and not set(d.elements) <= known for d in descriptions
        ],
    }
    out = np.zeros(len(first), bool)
    for reason, flags in reasons.items():
        if any(flags):
            notes.append(
                f"OOD-S: {sum(flags)} of {len(first)} molecules are skipped: each {reason}."
            )
        out |= np.array(flags, bool)
    kept = indices[np.isin(molecule[indices], molecule[first[~out]])]
    return store, _sample(kept, store, options, training.seed), notes


def _with_whole_splits(data: RunData, training) -> RunData:
    """Return the data with all molecules that runs of this split may draw.

    All these runs then exclude the same molecules.
    """
    whole = training.data.copy_and_resolve_references()
    whole.unlock()
    whole.path, whole.num_molecules = str(data.store.path), None
    return dataclasses.replace(data, parts=data_split.split_data(source.load(whole), whole))


def _sample(indices: np.ndarray, store: Store, options, seed: int) -> np.ndarray:
    """Return at most options.max_structures structures with an energy, drawn at random."""
    indices = _with_energy(np.asarray(indices, np.int64), store)
    if len(indices) <= options.max_structures:
        return indices
    return np.sort(
        np.random.default_rng(seed).choice(indices, options.max_structures, replace=False)
    )


def _with_energy(indices: np.ndarray, store: Store) -> np.ndarray:
    """Return the indices of structures with an energy label."""
    return indices[np.isfinite(store.index("energy")[indices])]


def _errors(potential: Potential, store: Store, indices: np.ndarray, with_forces: bool) -> Errors:
    """Compute the errors of a force field on structures of a store."""
    # (S,) each
    energy, n_atoms, molecule = (
        np.asarray(store.index(name)[indices]) for name in ("energy", "n_atoms", "molecule")
    )
    if not with_forces:
        return Errors(energy, energies(potential, store, indices), n_atoms, molecule)
    predicted, forces = energies_and_forces(potential, store, indices)
    columns = store.take(indices, labels_only=True)
    atom_error = np.abs(forces - columns.forces).mean(axis=1)  # (A,)
    force_error = (
        np.add.reduceat(atom_error, columns.offsets[:-1]) / n_atoms if len(indices) else np.zeros(0)
    )
    return Errors(energy, predicted, n_atoms, molecule, force_error)


def _fingerprints(store: Store, indices: np.ndarray, seed: int) -> np.ndarray:
    """Return packed Morgan fingerprints (M, 256) uint8 of at most _MAX_MAPPED molecules."""
    first = first_per_molecule(store, indices)
    if len(first) > _MAX_MAPPED:
        first = np.sort(np.random.default_rng(seed).choice(first, _MAX_MAPPED, replace=False))
    descriptions = describe(entries(store, first), len(first), fingerprints=True)
    return np.packbits(unpack([d.fingerprint for d in descriptions if d is not None]), axis=1)


def _arrays(
    sets: dict[str, Errors], indices: dict[str, np.ndarray], rmsd: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the arrays of diversity.npz."""
    names = [n for n in NAMES if n in sets]
    arrays = {
        "set": np.repeat(names, [len(sets[n]) for n in names]),
        "structure": np.concatenate([indices[n] for n in names]),
        "rmsd": np.concatenate([rmsd.get(n, np.full(len(sets[n]), np.nan)) for n in names]),
    }
    fields = [
        f.name for f in dataclasses.fields(Errors) if getattr(sets[names[0]], f.name) is not None
    ]
    return arrays | {
        field: np.concatenate([getattr(sets[n], field) for n in names]) for field in fields
    }


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with atomic_open(path) as file:
        np.savez(file, **arrays)
