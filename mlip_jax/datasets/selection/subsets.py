"""Nested subsets of n_s molecules with n_c conformations each.

The draw sorts by a hash of the seed, the molecule and the conformation. It is independent of the
version of a random generator, of other molecules and of the order of the structures. Molecules can
also be taken in a given order of preference, such as the most diverse ones first. The draw of their
conformations stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlip_jax.datasets.identity import group, splitmix64, stable_ids

SELECTIONS = ("random", "maxmin", "embedding")  # data.selection: order in which molecules are taken
_MOLECULES, _CONFORMERS = 0x6D6F6C6563756C65, 0x636F6E666F726D65  # make both draws independent


def nested_subset(
    molecule: np.ndarray,
    conformer: np.ndarray,
    num_molecules: int,
    num_conformers: int,
    *,
    seed: int,
    min_conformers: int | None = None,
    fewer_last: bool = False,
    rank: np.ndarray | None = None,
) -> np.ndarray:
    """Return the indices of `num_molecules` molecules with `num_conformers` conformations each.

    Subsets with the same seed and `min_conformers` are nested: the subset for (n_s, n_c) is
    contained in the subset for (n_s', n_c') if n_s <= n_s' and n_c <= n_c'. To draw from a split,
    pass its molecules and conformers: `train[nested_subset(molecule[train], conformer[train],
    ...)]`.

    Args:
      molecule: Molecule of each structure, (S,), of any sortable type.
      conformer: Number of each structure within its molecule, (S,) int. Equal numbers in one
        molecule are distinguished by the order of the structures.
      num_molecules: Number of molecules, n_s.
      num_conformers: Number of conformations per molecule, n_c.
      seed: Seed of both draws, of molecules and of conformations.
      min_conformers: Minimum number of conformations of a molecule that can be drawn. The default
        is `num_conformers`. To compare subsets, set it to the largest n_c among them; otherwise the
        subsets with few conformations contain molecules that the others cannot contain.
      fewer_last: Whether to draw molecules with at least `num_conformers` but fewer than
        `min_conformers` conformations after all others, those with more conformations first.
        Subsets stay nested, and only a few molecules need many conformations.
      rank: Rank of the molecule of each structure in an order of preference, (S,). Molecules with
        the lowest ranks are taken. None draws molecules at random.

    Returns:
      Sorted indices, (num_molecules * num_conformers,) int64.

    Raises:
      ValueError: Too few molecules have enough conformations, or an argument is invalid.
    """
    molecule, conformer = np.asarray(molecule), np.asarray(conformer)
    min_size = num_conformers if min_conformers is None else min_conformers
    if num_molecules < 1 or num_conformers < 1 or min_size < num_conformers:
        raise ValueError(
            "a subset requires at least 1 molecule and 1 conformer, and min_conformers not below "
            f"num_conformers; received {num_molecules=}, {num_conformers=}, {min_conformers=}"
        )
    if conformer.shape != molecule.shape or conformer.dtype.kind not in "iu":
        raise ValueError(
            f"conformer must be an integer for each of {len(molecule)} structures; received "
            f"{conformer.dtype} of shape {conformer.shape}"
        )
    unit_of, num_units = group(molecule)  # units are molecules, (S,)
    sizes = np.bincount(unit_of, minlength=num_units)
    needed = num_conformers if fewer_last else min_size
    enough = np.flatnonzero(sizes >= needed)
    if len(enough) < num_molecules:
        raise ValueError(
            f"requested {num_molecules} molecules with at least {needed} conformations; "
            f"{len(enough)} of {num_units} molecules qualify (the maximum is "
            f"{sizes.max(initial=0)})"
        )
    # Any structure of each molecule, to look up its label.
    one_of_unit = np.zeros(num_units, np.int64)
    one_of_unit[unit_of] = np.arange(len(unit_of))
    ids = stable_ids(molecule[one_of_unit[enough]])  # (candidates,)
    preference = (
        _mix(seed, _MOLECULES, ids) if rank is None else np.asarray(rank)[one_of_unit[enough]]
    )
    # Molecules with more conformations come first, up to `min_size`; ties by preference.
    first = np.lexsort((preference, -np.minimum(sizes[enough], min_size)))[:num_molecules]
    rank = np.full(num_units, -1, unit_of.dtype)  # rank among the chosen molecules, or -1
    rank[enough[first]] = np.arange(num_molecules)
    indices = np.flatnonzero(rank[unit_of] >= 0)
    rank_of = rank[unit_of[indices]]
    keys = _mix(
        seed, _CONFORMERS, ids[first][rank_of], conformer[indices].astype(np.int64).view(np.uint64)
    )
    order = np.lexsort((keys, rank_of))  # by molecule and, within a molecule, by key
    # Take the first conformations of each chosen molecule in the order of their keys.
    starts = np.concatenate([[0], np.cumsum(sizes[enough[first]])[:-1]])
    return np.sort(indices[order[(starts[:, None] + np.arange(num_conformers)).ravel()]])


def with_min_conformers(
    molecule: np.ndarray, indices: np.ndarray, min_conformers: int
) -> np.ndarray:
    """Return the `indices` whose molecule occurs at least `min_conformers` times, in order.

    Args:
      molecule: Molecule of each structure, (S,).
      indices: Indices of structures, (I,).
      min_conformers: Minimum number of structures per molecule.
    """
    unit_of, num_units = group(molecule[indices])
    return indices[np.bincount(unit_of, minlength=num_units)[unit_of] >= min_conformers]


def budget_grid(total: int, conformers: Sequence[int]) -> list[tuple[int, int]]:
    """Return (n_s, n_c) for each n_c, with the largest n_s for which n_s * n_c is at most `total`.

    >>> budget_grid(1000, [1, 10, 30])
    [(1000, 1), (100, 10), (33, 30)]
    """
    for count in conformers:
        if not 1 <= count <= total:
            raise ValueError(
                f"the number of conformations must be between 1 and {total}; received {count}"
            )
    return [(total // count, count) for count in conformers]


def _mix(seed: int, purpose: int, *values: np.ndarray) -> np.ndarray:
    """Return sort keys, uint64: a hash of all arguments."""
    key = splitmix64(np.array([(seed ^ purpose) % 2**64], np.uint64))
    for value in values:
        key = splitmix64(key ^ value)
    return key
