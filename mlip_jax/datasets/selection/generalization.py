"""Test sets for the generalization of a force field to other molecules and to other conformers.

A run trains on n_s molecules with n_c conformers each. There are four kinds of test structures:

    IID-S   unseen molecules of the same data set: molecules in the test split of a split by
            molecule, with the minimum number of conformers that training molecules have
    OOD-S   unseen molecules of another data set, for instance smaller ones
    IID-C   unseen conformers of training molecules near a training conformer: the minimum
            heavy-atom RMSD to the training conformers of the molecule is at most a threshold
    OOD-C   unseen conformers of training molecules beyond the threshold

Runs to be compared have the same split seed and different n_s and n_c. They draw nested subsets
(subsets.py) from molecules with at least `min_conformers` conformers, the largest n_c among the
runs. Conformers that would be drawn at this largest n_c count as training conformers of every run.
The remaining ones are unseen in all runs, so all runs are tested on the same conformers of a
molecule. The assignment to IID-C or OOD-C depends on the training conformers and therefore on n_c.

Follows Shenoy et al., "Role of Structural and Conformational Diversity for Machine Learning
Potentials" (arXiv:2311.00862). The threshold and the reserved conformers are choices of this
package.
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

_HEAVY = 1  # atoms with a larger atomic number are heavy


def unseen_conformers(
    molecule: np.ndarray,
    conformer: np.ndarray,
    train: np.ndarray,
    *,
    num_conformers: int,
    seed: int,
    max_molecules: int | None = None,
    among: np.ndarray | None = None,
) -> np.ndarray:
    """Return conformers of the training molecules that no run of a comparison trains on.

    Args:
      molecule: Molecule of each structure, (S,), as in `nested_subset`.
      conformer: Number of each structure within its molecule, (S,), as in `nested_subset`.
      train: Indices of the training structures of the run, (N,).
      num_conformers: Number of conformers per molecule that are reserved for training, the largest
        n_c of the comparison. Molecules without further conformers have no unseen ones.
      seed: Seed with which `nested_subset` has drawn `train`.
      max_molecules: Maximum number of molecules, the first ones of the draw. They are the same in
        every run that trains on them.
      among: Indices of the structures that can be used; None for all.

    Returns:
      Sorted indices, int64.

    Raises:
      ValueError: The run trains on some of the remaining conformers, so `seed` or `num_conformers`
        is not that of the draw.
    """
    among = np.arange(len(molecule)) if among is None else np.asarray(among, np.int64)
    candidates = among[np.isin(molecule[among], molecule[train])]
    unit_of, num_units = group(molecule[candidates])
    sizes = np.bincount(unit_of, minlength=num_units)
    candidates = candidates[sizes[unit_of] >= num_conformers]
    if not len(candidates):
        return candidates
    count = group(molecule[candidates])[1]
    reserved = candidates[
        nested_subset(molecule[candidates], conformer[candidates], count, num_conformers, seed=seed)
    ]
    unseen = np.setdiff1d(candidates, reserved)
    if np.isin(unseen, train).any():
        raise ValueError(
            f"{np.isin(unseen, train).sum()} structures of the training set are not among the "
            f"{num_conformers} conformers per molecule that are reserved for it (seed {seed}): the "
            "seed or the number differs from that of the draw"
        )
    if max_molecules is not None and count > max_molecules:
        first = candidates[
            nested_subset(
                molecule[candidates],
                conformer[candidates],
                max_molecules,
                1,
                seed=seed,
                min_conformers=num_conformers,
            )
        ]
        unseen = unseen[np.isin(molecule[unseen], molecule[first])]
    return unseen


class Distances(NamedTuple):
    """Distances of conformers to the training conformers of their molecules.

    Attributes:
      rmsd: Minimum heavy-atom RMSD over the training conformers and the symmetries of the molecule
        (Å), (C,); NaN if unknown.
      notes: Remarks that a reader of the distances has to know, one sentence each.
    """

    rmsd: np.ndarray
    notes: list[str]


def distances_to_training(
    store: Store,
    conformers: np.ndarray,
    train: np.ndarray,
    *,
    max_symmetries: int = MAX_SYMMETRIES,
    num_processes: int | None = None,
) -> Distances:
    """Compute the minimum heavy-atom RMSD of each conformer to the training conformers.

    Molecules are read one after another, so memory does not grow with the data.

    Args:
      store: Store with the structures.
      conformers: Indices of the conformers, (C,).
      train: Indices of the training structures, (N,).
      max_symmetries: Maximum number of symmetries to try per molecule.
      num_processes: Number of worker processes that find symmetries. None is one per core, and 1
        runs in this process.
    """
    molecule = np.asarray(store.index("molecule"))
    order_of_tests = np.argsort(molecule[conformers], kind="stable")
    _, starts = np.unique(molecule[conformers][order_of_tests], return_index=True)
    tests = np.split(order_of_tests, starts[1:]) if len(order_of_tests) else []
    # Training structures sorted by molecule, to find those of a molecule by bisection.
    order = train[np.argsort(molecule[train], kind="stable")]
    rmsd, problems = (
        np.full(len(conformers), np.nan),
        {"other atoms": 0, "many symmetries": 0, "unreadable": 0},
    )

    # `pieces` is read twice, for the symmetries and for the positions, to bound the memory.
    def pieces() -> Iterator[tuple[np.ndarray, Columns, Columns]]:
        for test in tests:
            key = molecule[conformers[test[0]]]
            same_molecule = slice(
                *(np.searchsorted(molecule[order], key, side) for side in ("left", "right"))
            )
            yield test, store.take(conformers[test]), store.take(order[same_molecule])

    def molecules() -> Iterator[Conformers]:
        symmetries = symmetries_of(
            (_entry(a) for _, a, _ in pieces()), max_symmetries, num_processes
        )
        for (test, a, b), each in zip(pieces(), symmetries):
            problems["unreadable"] += each is None
            problems["many symmetries"] += each is not None and not each.complete
            heavy = np.flatnonzero(a[0].numbers > _HEAVY) if each is None else each.atoms
            same = [
                np.array([np.array_equal(s.numbers, a[0].numbers) for s in x], bool) for x in (a, b)
            ]
            problems["other atoms"] += sum(int((~s).sum()) for s in same)
            kept.append(test[same[0]])
            yield Conformers(
                *(_positions(x, s, heavy) for x, s in zip((a, b), same)),
                None if each is None else each.permutations,
            )

    kept: list[np.ndarray] = []
    # `nearest_rmsd` reads `molecules` ahead, so `kept` already has the conformers of each result.
    for number, nearest in enumerate(nearest_rmsd(molecules())):
        rmsd[kept[number]] = nearest
    rmsd[np.isinf(rmsd)] = np.nan  # molecules without training conformers
    return Distances(rmsd, _notes(problems, max_symmetries))


def _entry(columns: Columns) -> SymmetryQuery:
    """Return the query for the symmetries of a molecule, from its first structure."""
    first = columns[0]
    return SymmetryQuery(first.numbers, first.positions, first.smiles)


def _positions(columns: Columns, mask: np.ndarray, heavy: np.ndarray) -> np.ndarray:
    """Return the heavy-atom positions (Å) of the structures in `mask`, (C, n, 3)."""
    return np.array([columns[int(s)].positions[heavy] for s in np.flatnonzero(mask)]).reshape(
        -1, len(heavy), 3
    )


def _notes(problems: dict[str, int], max_symmetries: int) -> list[str]:
    """Format and log the problems that occurred."""
    texts = {
        "other atoms": (
            "{} conformers have their atoms in another order than the first unseen one of their "
            "molecule, and are excluded from its RMSDs."
        ),
        "many symmetries": (
            f"{{}} molecules have more than {max_symmetries} symmetries; only this number is "
            "tried, so their RMSDs may be too large."
        ),
        "unreadable": "RDKit cannot read {} molecules: their RMSDs are without symmetries.",
    }
    notes = [texts[name].format(count) for name, count in problems.items() if count]
    for note in notes:
        log.warning("%s", note)
    return notes


def near_and_far(rmsd: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    """Divide conformers into near (IID-C) and far (OOD-C) ones.

    Args:
      rmsd: Distances to the training conformers (Å), (C,). Conformers with NaN are in neither set.
      threshold: Maximum distance of near conformers (Å).

    Returns:
      Indices {"iid_c": ..., "ood_c": ...}, int64.

    Raises:
      ValueError: The threshold is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"the RMSD threshold (Å) must be positive; received {threshold}")
    return {"iid_c": np.flatnonzero(rmsd <= threshold), "ood_c": np.flatnonzero(rmsd > threshold)}


def draw_settings(options: Any) -> tuple[int, int] | None:
    """Return (reserved conformers per molecule, seed) of the draw in config.data, or None."""
    if not options.num_molecules:
        return None
    return options.min_conformers or options.num_conformers, options.split_seed
