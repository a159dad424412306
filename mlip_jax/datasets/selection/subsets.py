"""Subsets of n_s molecules with n_c conformations each, every one within the larger ones.

What is in a subset is decided by a hash of the seed, the molecule and the conformation: it depends on no random
generator's version, on no other molecule, and not on the order of the structures. Molecules may be taken in an order of
preference instead, as the most diverse ones are; the draw of their conformations stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlip_jax.datasets.identity import group, splitmix64, stable_ids

SELECTIONS = ("random", "maxmin", "embedding")  # data.selection: in which order molecules are taken
_MOLECULES, _CONFORMERS = 0x6D6F6C6563756C65, 0x636F6E666F726D65  # so that both draws of one seed are independent


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
    """Indices of `num_molecules` molecules with `num_conformers` conformations each: sorted, int64.

    For one seed and one `min_conformers` the subsets are nested: that of (n_s, n_c) lies within that of (n_s', n_c')
    where n_s <= n_s' and n_c <= n_c'. To draw from a part of the data, as from its training set, give the molecules
    and conformers of that part: `train[nested_subset(molecule[train], conformer[train], ...)]`.

    Args:
      molecule: Molecule of each structure, shape (S,), of any sortable type.
      conformer: Number of each structure within its molecule, shape (S,), int. Where one stands twice in a molecule,
        their order among the structures tells them apart.
      num_molecules, num_conformers: n_s and n_c.
      seed: Of both draws.
      min_conformers: Only molecules with so many are drawn; unset: `num_conformers`. For subsets that are compared,
        set it to the largest n_c among them: else those of few conformations come from other molecules too.
      fewer_last: Molecules with fewer than `min_conformers`, but `num_conformers`, are drawn as well, after all others,
        and those of more conformers first. Subsets stay nested, and few molecules of the data need many conformers.
      rank: Place of each structure's molecule in an order of preference, (S,): the first ones are taken; None: they are
        drawn.

    Raises:
      ValueError: Too few molecules with enough conformations, or numbers that mean nothing.
    """
    molecule, conformer = np.asarray(molecule), np.asarray(conformer)
    least = num_conformers if min_conformers is None else min_conformers
    if num_molecules < 1 or num_conformers < 1 or least < num_conformers:
        raise ValueError("a subset needs at least 1 molecule and 1 conformer, and min_conformers not below "
                         f"num_conformers; received {num_molecules=}, {num_conformers=}, {min_conformers=}")
    if conformer.shape != molecule.shape or conformer.dtype.kind not in "iu":
        raise ValueError(f"conformer must hold a whole number for each of {len(molecule)} structures; received "
                         f"{conformer.dtype} of shape {conformer.shape}")
    unit_of, num_units = group(molecule)
    sizes = np.bincount(unit_of, minlength=num_units)
    needed = num_conformers if fewer_last else least
    enough = np.flatnonzero(sizes >= needed)
    if len(enough) < num_molecules:
        raise ValueError(f"{num_molecules} molecules with at least {needed} conformations are asked for; "
                         f"{len(enough)} of {num_units} molecules have so many (the most is {sizes.max(initial=0)})")
    one_of_unit = np.zeros(num_units, np.int64)
    one_of_unit[unit_of] = np.arange(len(unit_of))
    ids = stable_ids(molecule[one_of_unit[enough]])
    preference = _mix(seed, _MOLECULES, ids) if rank is None else np.asarray(rank)[one_of_unit[enough]]
    first = np.lexsort((preference, -np.minimum(sizes[enough], least)))[:num_molecules]
    rank = np.full(num_units, -1, unit_of.dtype)  # of the chosen molecules
    rank[enough[first]] = np.arange(num_molecules)
    indices = np.flatnonzero(rank[unit_of] >= 0)
    rank_of = rank[unit_of[indices]]
    keys = _mix(seed, _CONFORMERS, ids[first][rank_of], conformer[indices].astype(np.int64).view(np.uint64))
    order = np.lexsort((keys, rank_of))
    starts = np.concatenate([[0], np.cumsum(sizes[enough[first]])[:-1]])
    return np.sort(indices[order[(starts[:, None] + np.arange(num_conformers)).ravel()]])


def of_many_conformers(molecule: np.ndarray, indices: np.ndarray, least: int) -> np.ndarray:
    """Those of `indices` whose molecule has at least so many of them: sorted as they were.

    Args:
      molecule: Of each structure, (S,). indices: Numbers of structures, (I,).
    """
    unit_of, num_units = group(molecule[indices])
    return indices[np.bincount(unit_of, minlength=num_units)[unit_of] >= least]


def budget_grid(total: int, conformers: Sequence[int]) -> list[tuple[int, int]]:
    """(n_s, n_c) for every n_c such that n_s * n_c is `total`, or just below where it does not divide.

    >>> budget_grid(1000, [1, 10, 30])
    [(1000, 1), (100, 10), (33, 30)]
    """
    for count in conformers:
        if not 1 <= count <= total:
            raise ValueError(f"conformations of a molecule must be between 1 and {total}; received {count}")
    return [(total // count, count) for count in conformers]


def _mix(seed: int, purpose: int, *values: np.ndarray) -> np.ndarray:
    """Keys to sort by, uint64: a hash of all arguments."""
    key = splitmix64(np.array([(seed ^ purpose) % 2**64], np.uint64))
    for value in values:
        key = splitmix64(key ^ value)
    return key
