"""Structures for the calibration of an ensemble, on which no member was trained.

The factors are fitted to half of the test split of the first member and checked on the other half.
The validation split chose the checkpoint of the first member, so its errors are too small. It is
used only if the test split is too small.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlip_jax.datasets import unseen_elements
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection.held_out import RunData
from mlip_jax.datasets.store.store import Store
from mlip_jax.potential import Potential
from mlip_jax.wording import count_of

log = logging.getLogger(__name__)

_MIN_STRUCTURES = 20  # structures of each half, with which a factor is known to about 15 %


@dataclasses.dataclass(frozen=True)
class CalibrationStructures:
    """Structures of the data of the first member.

    Attributes:
      store: Store with the structures.
      part: Split of the structures to which the factors are fitted, "test" or "valid".
      indices: Indices in the store of the structures for the fit, "calibration", and of those for
        the check, "test", if there are any.
      notes: Notes for the user.
    """

    store: Store
    part: str
    indices: dict[str, np.ndarray]
    notes: list[str]


def choose(
    workdirs: Sequence[str | Path],
    potentials: Sequence[Potential],
    max_structures: int,
    seed: int = 0,
) -> CalibrationStructures:
    """Choose structures to fit and to check a calibration.

    Args:
      workdirs: Workdirs of the members.
      potentials: The members.
      max_structures: Maximum number of structures of the fit, and of the check.
      seed: Seed of the subsampling.

    Raises:
      DatasetError: If the data of the first member are missing, or if no structure is left.
    """
    try:
        store, test, notes = held_out(workdirs, potentials, "test", 2 * max_structures, seed)
    except DatasetError as error:
        store, test = None, np.zeros(0, np.int64)
        notes = [f"There is no test split to evaluate the calibration on: {error}"]
    if store is not None:
        fit, check = halves(store, test, seed)
        if min(len(fit), len(check)) >= _MIN_STRUCTURES:
            return CalibrationStructures(store, "test", {"calibration": fit, "test": check}, notes)
    store, valid, more = held_out(workdirs, potentials, "valid", max_structures, seed)
    notes = [
        f"The test split has only {count_of(len(test), 'structure')}, so the calibration is "
        "fitted to the validation split. That split chose the checkpoint of the first member, so expected errors "
        "may be too small.",
        *more,
        *(note for note in notes if note not in more),
    ]
    check = {"test": test[:max_structures]} if len(test) else {}
    return CalibrationStructures(store, "valid", {"calibration": valid} | check, notes)


def halves(store: Store, indices: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide structures at random into halves, with about half of the molecules each."""
    molecule = np.asarray(store.index("molecule"))[indices]
    unique = np.random.default_rng(seed).permutation(np.unique(molecule))
    first = np.isin(molecule, unique[: len(unique) // 2])
    return indices[first], indices[~first]


def held_out(
    workdirs: Sequence[str | Path],
    potentials: Sequence[Potential],
    part: str,
    max_structures: int,
    seed: int = 0,
) -> tuple[Store, np.ndarray, list[str]]:
    """Return structures of a split of the first member's data that no member was trained on.

    Args:
      workdirs: Workdirs of the members.
      potentials: The members.
      part: Split, "valid" or "test".
      max_structures: Maximum number of structures; more are subsampled at random.
      seed: Seed of the subsampling.

    Returns:
      The store, the indices of the structures in it, and notes for the user.

    Raises:
      DatasetError: If the data of the first member are missing, or if no structure is left.
    """
    first_run, notes = RunData.load(workdirs[0]), []
    indices = _not_trained_on(first_run, part, workdirs[1:], notes)
    common_elements = set.intersection(*(set(p.elements) for p in potentials))
    unseen = unseen_elements.of_rows(first_run.store, indices, common_elements)
    indices = indices[unseen.known]
    if len(unseen):
        notes.append(
            f"skipped {count_of(len(unseen), 'structure')} of split {part!r}: a member was not "
            f"trained on their elements ({unseen.symbols})."
        )
    if not len(indices):
        raise DatasetError(
            f"{workdirs[0]}: split {part!r} contains no structure to calibrate the ensemble "
            "with. " + " ".join(notes)
        )
    if len(indices) > max_structures:
        indices = np.sort(
            np.random.default_rng(seed).choice(indices, max_structures, replace=False)
        )
    return first_run.store, indices, notes


def _not_trained_on(
    first_run: RunData, part: str, others: Sequence[str | Path], notes: list[str]
) -> np.ndarray:
    """Return structures of a split of the first member that no other member was trained on.

    Structures of the test split must also be absent from the validation splits, which chose the
    checkpoints.
    """
    candidates = unseen = np.asarray(first_run.parts.get(part, []), np.int64)
    # Exclude whole molecules, since training on other conformers counts as knowing a molecule. If
    # the first member's own split is not by molecule (a random split), exclude structures.
    unit = np.asarray(first_run.store.index("molecule"))
    if np.isin(unit[unseen], unit[first_run.parts["train"]]).any():
        unit = np.arange(len(first_run.store))
    for workdir in others:
        trained = _trained_on(workdir, first_run.store, with_valid=part == "test")
        if trained is None:
            notes.append(
                f"{Path(workdir).name} has another data set than {first_run.workdir.name}, or one "
                "that cannot be found: it may have been trained on structures of the "
                "calibration."
            )
        else:
            unseen = unseen[~np.isin(unit[unseen], unit[trained])]
    if len(unseen) < len(candidates):
        notes.append(
            f"skipped {count_of(len(candidates) - len(unseen), 'structure')} of split {part!r}: "
            "other members were trained on them, or on other conformers of their molecules."
        )
    return unseen


def _trained_on(workdir: str | Path, store: Store, with_valid: bool) -> np.ndarray | None:
    """Return the structures of `store` that a run was trained on; None if they are unknown.

    Optionally with those of its validation split.
    """
    try:
        data = RunData.load(workdir)
    except DatasetError as error:
        log.warning("%s", error)
        return None
    if data.store.digest() != store.digest():
        return None
    return data.seen() if with_valid else data.parts["train"]
