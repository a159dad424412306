"""Structures that tell how a force field generalises: to other molecules, and to other conformers of its own.

A run trains on n_s molecules with n_c conformers each. Four kinds of structures are of interest:

    IID-S   molecules that it has not seen, of the same data: those of the test part of a split by molecule that have as
            many conformers as a molecule must have to be drawn for training
    OOD-S   molecules of another data set, smaller ones for instance; none that the run has seen
    IID-C   unseen conformers of molecules that it trained on, near to one of those: the least RMSD over the heavy atoms
            to any training conformer of the molecule is at most a threshold
    OOD-C   the same beyond the threshold

Runs that are compared (same seed of the split, other n_s and n_c) draw nested subsets (subsets.py) from molecules of
at least `min_conformers` conformers, the largest n_c among them. Conformers that would be drawn at that n_c count as
training conformers of every run: what is left over is unseen in all of them, so that each is tested on the same
conformers of a molecule. Which of them are near depends on what a run trained on, and so on n_c.

After Shenoy et al., "Role of Structural and Conformational Diversity for Machine Learning Potentials"
(arXiv:2311.00862); the threshold and the conformers put aside are choices made here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.identity import group
from mlip_jax.datasets.molecules.rmsd import Conformers, nearest_rmsd
from mlip_jax.datasets.molecules.symmetry import MAX_SYMMETRIES, SymmetryQuery, symmetries_of
from mlip_jax.datasets.selection.subsets import nested_subset
from mlip_jax.datasets.store.store import Store

log = logging.getLogger(__name__)

_HEAVY = 1  # atomic numbers above it


def unseen_conformers(molecule: np.ndarray, conformer: np.ndarray, train: np.ndarray, *, num_conformers: int,
                      seed: int, max_molecules: int | None = None, among: np.ndarray | None = None) -> np.ndarray:
    """Conformers of the training molecules that no run of a comparison trains on: sorted, int64.

    Args:
      molecule, conformer: Of each structure, (S,), as of `nested_subset`.
      train: Numbers of the structures that the run trains on, (N,).
      num_conformers: That are put aside for training, of each molecule: the largest n_c of the comparison. Molecules
        without more have no unseen ones.
      seed: Of the draw of `train`, by `nested_subset`.
      max_molecules: Only of so many of the molecules, the first ones of the draw: the same in each run that has them.
      among: Numbers of the structures that may be used; None: all.

    Raises:
      ValueError: The run trains on what would have been left over: `seed` or `num_conformers` are not those of the
        draw.
    """
    among = np.arange(len(molecule)) if among is None else np.asarray(among, np.int64)
    mine = among[np.isin(molecule[among], molecule[train])]
    unit_of, num_units = group(molecule[mine])
    sizes = np.bincount(unit_of, minlength=num_units)
    mine = mine[sizes[unit_of] >= num_conformers]
    if not len(mine):
        return mine
    count = group(molecule[mine])[1]
    aside = mine[nested_subset(molecule[mine], conformer[mine], count, num_conformers, seed=seed)]
    unseen = np.setdiff1d(mine, aside)
    if np.isin(unseen, train).any():
        raise ValueError(f"{np.isin(unseen, train).sum()} structures of the training set are not among the "
                         f"{num_conformers} conformers of each molecule that are put aside for it (seed {seed}): these "
                         "are not those by which the training set was drawn")
    if max_molecules is not None and count > max_molecules:
        first = mine[nested_subset(molecule[mine], conformer[mine], max_molecules, 1, seed=seed,
                                   min_conformers=num_conformers)]
        unseen = unseen[np.isin(molecule[unseen], molecule[first])]
    return unseen


class Distances(NamedTuple):
    """Of conformers to the training conformers of their molecules.

    Attributes:
      rmsd: (C,) Å, the least over the heavy atoms and their symmetries; NaN where it is not known.
      notes: What a reader of them must know, one sentence each.
    """

    rmsd: np.ndarray
    notes: list[str]


def distances_to_training(store: Store, conformers: np.ndarray, train: np.ndarray, *,
                          max_symmetries: int = MAX_SYMMETRIES, num_processes: int | None = None) -> Distances:
    """The least heavy-atom RMSD of each conformer to the training conformers of its molecule.

    One molecule after another is read, so that memory does not grow with the data.

    Args:
      store: Of the structures. conformers, train: Numbers there, (C,) and (N,).
      max_symmetries: Of a molecule that are looked through.
      num_processes: That find symmetries; None: one per core, 1: this one alone.
    """
    molecule = np.asarray(store.index("molecule"))
    places = np.argsort(molecule[conformers], kind="stable")
    _, starts = np.unique(molecule[conformers][places], return_index=True)
    tests = np.split(places, starts[1:]) if len(places) else []
    order = train[np.argsort(molecule[train], kind="stable")]
    found, problems = np.full(len(conformers), np.nan), {"other atoms": 0, "many symmetries": 0, "unreadable": 0}

    def pieces() -> Iterator[tuple[np.ndarray, Columns, Columns]]:
        for test in tests:
            key = molecule[conformers[test[0]]]
            here = slice(*(np.searchsorted(molecule[order], key, side) for side in ("left", "right")))
            yield test, store.take(conformers[test]), store.take(order[here])

    def molecules() -> Iterator[Conformers]:
        symmetries = symmetries_of((_entry(a) for _, a, _ in pieces()), max_symmetries, num_processes)
        for (test, a, b), each in zip(pieces(), symmetries):
            problems["unreadable"] += each is None
            problems["many symmetries"] += each is not None and not each.complete
            heavy = np.flatnonzero(a[0].numbers > _HEAVY) if each is None else each.heavy
            same = [np.array([np.array_equal(s.numbers, a[0].numbers) for s in x], bool) for x in (a, b)]
            problems["other atoms"] += sum(int((~s).sum()) for s in same)
            kept.append(test[same[0]])
            yield Conformers(*(_positions(x, s, heavy) for x, s in zip((a, b), same)),
                             None if each is None else each.permutations)

    kept: list[np.ndarray] = []
    for number, nearest in enumerate(nearest_rmsd(molecules())):
        found[kept[number]] = nearest
    found[np.isinf(found)] = np.nan
    return Distances(found, _notes(problems, max_symmetries))


def _entry(columns: Columns) -> SymmetryQuery:
    first = columns[0]
    return SymmetryQuery(first.numbers, first.positions, first.smiles)


def _positions(columns: Columns, of: np.ndarray, heavy: np.ndarray) -> np.ndarray:
    return np.array([columns[int(s)].positions[heavy] for s in np.flatnonzero(of)]).reshape(-1, len(heavy), 3)


def _notes(problems: dict[str, int], most: int) -> list[str]:
    texts = {
        "other atoms": "{} conformers have their atoms in another order than the first unseen one of their molecule, "
                       "and are left out of its RMSDs.",
        "many symmetries": f"{{}} molecules have more than {most} symmetries, of which so many are looked through: "
                           "their RMSDs may be too large.",
        "unreadable": "RDKit cannot read {} molecules: their RMSDs are without symmetries."}
    notes = [texts[name].format(count) for name, count in problems.items() if count]
    for note in notes:
        log.warning("%s", note)
    return notes


def near_and_far(rmsd: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    """Places of IID-C and OOD-C among conformers of known distance: {"iid_c": ..., "ood_c": ...}, int64.

    Raises:
      ValueError: A threshold that is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"the RMSD that tells near conformers from far ones must be positive (Å); received "
                         f"{threshold}")
    return {"iid_c": np.flatnonzero(rmsd <= threshold), "ood_c": np.flatnonzero(rmsd > threshold)}


def drawn(options: Any) -> tuple[int, int] | None:
    """(conformers put aside of each molecule, seed) of the draw that config.data asks for; None if there is none."""
    if not options.num_molecules:
        return None
    return options.min_conformers or options.num_conformers, options.split_seed
