"""Labeled structures of the new domain, and the files that the training runs read.

A file contains the training structures of one number of labels, the validation and test
structures, and structures of the old domain for replay. Runs without replay have a split of the same
file that leaves these out.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from ase.data import chemical_symbols

from mlip_jax import fine_tuning, models
from mlip_jax.datasets import atoms_list, source
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection import data_split
from mlip_jax.datasets.statistics import sum_reference
from mlip_jax.datasets.unseen_elements import of_columns
from mlip_jax.files import make_subfolder
from mlip_jax.graphs.padding import graph_sizes
from mlip_jax.label_budget.choice import choose_first
from mlip_jax.potential import Potential
from mlip_jax.structure import Structure
from mlip_jax.training.data import Split
from mlip_jax.wording import count_of
from mlip_jax.workdir import write_json

log = logging.getLogger(__name__)

_MIN_TRAIN, _MIN_VALID = 4, 2  # numbers of structures


@dataclasses.dataclass(frozen=True)
class NewDomain:
    """Labeled structures of the new domain.

    Attributes:
      splits: Structures of the splits "train", "valid" and "test". Those of "train" are in random
        order, except that the first ones contain all elements. The others contain no further ones.
      name: Name of the data.
      level_of_theory: Level of theory of the labels.
      new_elements: Symbols of the elements that the initial force field was not trained on.
      notes: Remarks for the reader of the report.
      digest: Digest of the data.
    """

    splits: dict[str, Columns]
    name: str
    level_of_theory: str
    new_elements: tuple[str, ...]
    notes: tuple[str, ...] = ()
    digest: str = ""

    @property
    def has_forces(self) -> bool:
        """Whether forces decide between the recipes; otherwise energies do."""
        return bool(np.isfinite(self.splits["valid"].forces).any())

    def covers_elements(self, num_labels: int) -> bool:
        """Return whether the first training structures contain all elements of the training split.

        Otherwise the reference energies of the missing elements would be those of the initial force
        field, at another zero of energy than the labels.
        """
        train = self.splits["train"]
        first = train.numbers[: train.offsets[num_labels]]
        return np.isin(train.numbers, first).all()

    @classmethod
    def load(cls, config: ml_collections.ConfigDict, initial: Potential) -> NewDomain:
        """Load and split the labeled structures of config.data.

        Raises:
          DatasetError: The data cannot be read, their labels are invalid, or there are too few.
          ValueError: The model of the initial force field has no parameters for an element.
        """
        data = source.load(config.data)
        indices = data_split.split_data(data, config.data)
        rng = np.random.default_rng(config.seed)
        splits = {name: data.store.take(rows) for name, rows in indices.items()}
        train = splits["train"]
        splits["train"] = train.take(choose_first(train, len(train), rng))
        elements = np.unique(train.numbers)
        notes = list(data.notes)
        for name in ("valid", "test"):
            unseen = of_columns(splits[name], elements.tolist())
            if len(unseen):
                notes.append(
                    f"Excluded: {unseen.describe(f'{name} structures')}. Their reference energies "
                    "cannot be fitted to the labels."
                )
                splits[name] = splits[name].take(np.flatnonzero(unseen.known))
        for name, least in (("train", _MIN_TRAIN), ("valid", _MIN_VALID)):
            if len(splits[name]) < least:
                raise DatasetError(
                    f"{data.name}: fine-tuning requires at least {least} {name} structures, received "
                    f"{len(splits[name])}. Add labeled structures, or change data.num_{name}."
                )
        models.check_elements(initial.model, elements.tolist())
        new = [chemical_symbols[z] for z in elements if z not in initial.elements]
        for note in notes[len(data.notes) :]:
            log.warning("%s", note)
        for name, columns in splits.items():
            log.info("%s: %s", name, count_of(len(columns), "structure"))
        level, digest = data.level_of_theory, data.store.digest()
        return cls(splits, data.name, level, tuple(new), tuple(notes), digest)


def refit_reference(initial: Potential, train: Columns, seed: int) -> np.ndarray:
    """Fit reference energies (eV), (119,), to training structures; see `fine_tuning`.

    Without any energy, those of the initial force field are kept.
    """
    if not np.isfinite(train.energy).any():
        return np.asarray(initial.reference_energies, np.float64)
    sizes = graph_sizes(train, initial.cutoff, initial.long_range_cutoff)
    split = Split(train, np.arange(len(train)), sizes)
    return fine_tuning.reference_energies(initial, split, np.unique(train.numbers), seed)


def with_reference(columns: Columns, old: np.ndarray, new: np.ndarray) -> Columns:
    """Return structures whose total energies refer to other reference energies.

    Args:
      columns: Structures with total energies.
      old: Reference energies that the total energies contain (eV), (119,).
      new: Reference energies that replace them (eV), (119,).
    """
    shift = sum_reference(new, columns) - sum_reference(old, columns)
    return dataclasses.replace(columns, energy=columns.energy + shift)


@dataclasses.dataclass(frozen=True)
class TrainingFile:
    """Data of the training runs with one number of labels.

    Attributes:
      path: Trajectory with all structures.
      num_labels: Number of training structures of the new domain.
      reference: Reference energies (eV), (119,).
      known: Atomic numbers whose reference energies are known.
    """

    path: Path
    num_labels: int
    reference: np.ndarray
    known: tuple[int, ...]

    def fields(self, replays: bool, level_of_theory: str) -> dict[str, Any]:
        """Return the fields of config.data of a run with or without replay."""
        energies = ",".join(
            f"{chemical_symbols[z]}={float(self.reference[z])!r}" for z in self.known
        )
        level = level_of_theory.replace(";", ",")
        return {
            "path": str(self.path),
            "directory": str(self.path.parent),
            "reader": "ase",
            "reader_options": f"{atoms_list.TRAJECTORY_OPTIONS}; level_of_theory={level}",
            # the file of the user was checked
            "reject_invalid": False,
            "confirm_units": True,
            "split_files": str(self._split(replays)),
            "reference_energies": energies,
        }

    def _split(self, replays: bool) -> Path:
        return self.path.with_name(f"{self.path.stem}{'_replay' if replays else ''}.json")

    def write(
        self, new: NewDomain, replay: Columns | None, initial: Potential, share: float = 0.5
    ) -> None:
        """Write the trajectory and the splits with and without replay, unless they exist.

        With replay, the training structures of the new domain are repeated, so that about a
        fraction `share` of each batch consists of old structures.

        Args:
          new: Structures of the new domain.
          replay: Structures of the old domain with labels, or None.
          initial: Initial force field, whose reference energies the labels of `replay` contain.
          share: Fraction of old structures.
        """
        if self._split(True).exists():
            return
        train = new.splits["train"].take(np.arange(self.num_labels))
        old = [] if replay is None else [with_reference(replay, *self._references(initial))]
        num_old = sum(map(len, old))
        repeats = round(num_old * (1 - share) / share / len(train))
        copies = [train] * max(repeats, 1)
        structures: list[Structure] = []
        numbers: dict[str, list[int]] = {}
        for name, parts in (
            ("train", [train]),
            ("copies", copies[1:]),
            ("old", old),
            ("valid", [new.splits["valid"]]),
            ("test", [new.splits["test"]]),
        ):
            before = len(structures)
            structures += [s for part in parts for s in part]
            numbers[name] = list(range(before, len(structures)))
        make_subfolder(self.path.parent)
        atoms_list.write_trajectory(self.path, structures)
        rest = {"valid": numbers["valid"], "test": numbers["test"]}
        write_json(self._split(False), {"train": numbers["train"], **rest})
        write_json(
            self._split(True),
            {"train": numbers["train"] + numbers["copies"] + numbers["old"], **rest},
        )

    def _references(self, initial: Potential) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(initial.reference_energies, np.float64), self.reference


def training_file(
    folder: Path, new: NewDomain, num_labels: int, initial: Potential, seed: int
) -> TrainingFile:
    """Return the data with the first `num_labels` training structures, before they are written."""
    train = new.splits["train"].take(np.arange(num_labels))
    reference = refit_reference(initial, train, seed)
    known = tuple(sorted({*np.unique(train.numbers).tolist(), *initial.elements}))
    return TrainingFile(folder / f"labels_{num_labels}.traj", num_labels, reference, known)
