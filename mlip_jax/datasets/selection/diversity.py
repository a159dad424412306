"""Diverse molecules: MaxMin picking by the Tanimoto distance of Morgan fingerprints, or by the distance of features.

Ashton et al., Quant. Struct.-Act. Relat. 21, 598 (2002): each pick is the molecule whose nearest neighbour among those
picked before is the farthest. RDKit's LazyBitVectorPick gives the picks of the plain greedy algorithm without all the
distances. In a space of numbers the same algorithm is known as farthest-point sampling (Gonzalez, Theor. Comput. Sci.
38, 293, 1985).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlip_jax.datasets.identity import group, stable_ids
from mlip_jax.datasets.molecules.fingerprints import morgan_fingerprint


def maxmin(fingerprints: Sequence[Any], count: int, *, first: int | None = None, seed: int = 0) -> np.ndarray:
    """Places of `count` diverse fingerprints in the order of picking, (count,) int64.

    Args:
      fingerprints: ExplicitBitVects or their binary form, (S,).
      count: At most S; more is all of them, in the order of picking.
      first: Place of the first pick; None: drawn by `seed`.
      seed: Of the first pick.

    Raises:
      ValueError: There is nothing to pick from, or `count` or `first` are out of range.
    """
    from rdkit.DataStructs import ExplicitBitVect
    from rdkit.SimDivFilters.rdSimDivPickers import MaxMinPicker

    size = len(fingerprints)
    if not size or count < 1:
        raise ValueError(f"expected at least one fingerprint and one pick; received {size} and {count}")
    first = _first(size, first, seed)
    if min(count, size) == 1:
        return np.array([first], np.int64)
    vectors = [ExplicitBitVect(f) if isinstance(f, bytes) else f for f in fingerprints]
    # the seed is RDKit's of a first pick of its own, which is not used
    picked = MaxMinPicker().LazyBitVectorPick(vectors, size, min(count, size), [first], seed=0)
    return np.array(list(picked), np.int64)


def maxmin_rank(molecule: np.ndarray, smiles: Sequence[str], count: int, *, seed: int, least: int = 1) -> np.ndarray:
    """Place of each structure's molecule in the order of MaxMin picking, (S,) int64.

    Picks of a smaller count are the first ones of a larger, and none depends on the order of the structures.

    Args:
      molecule: Of each structure, (S,), of any sortable type. smiles: Of each structure, (S,).
      count: Molecules that are picked; all others have the place `count`.
      seed: Of the first pick.
      least: Only molecules with so many structures are picked.

    Raises:
      ImportError: RDKit is missing. ValueError: A SMILES that cannot be read, or no molecule to pick from.
    """
    from rdkit import Chem

    def pick(structures: np.ndarray, picks: int) -> np.ndarray:
        fingerprints = []
        for text in (smiles[k] for k in structures):
            mol = Chem.MolFromSmiles(text) if text else None
            if mol is None:
                raise ValueError(f"a choice of diverse molecules needs SMILES that RDKit can read; received {text!r}")
            # hydrogens may be explicit in one record and not in the next
            fingerprints.append(morgan_fingerprint(Chem.RemoveHs(mol)))
        return maxmin(fingerprints, picks, seed=seed)

    return _rank(molecule, count, least, pick)


def farthest_points(points: np.ndarray, count: int, *, first: int | None = None, seed: int = 0) -> np.ndarray:
    """Places of `count` points that lie far from each other, in the order of picking, (count,) int64.

    Each is the one whose nearest pick is the farthest. Takes time as S * F * count: seconds for thousands of each.

    Args:
      points: (S, F).
      count: At most S; more is all of them, in the order of picking.
      first: Place of the first pick; None: drawn by `seed`, as `maxmin` draws it.
      seed: Of the first pick.

    Raises:
      ValueError: There is nothing to pick from, `count` or `first` are out of range, or points are not finite.
    """
    size = len(points)
    if not size or count < 1:
        raise ValueError(f"expected at least one point and one pick; received {size} and {count}")
    first = _first(size, first, seed)
    points = np.ascontiguousarray(points, np.float32)
    if not np.isfinite(points).all():
        raise ValueError("points must be finite; received NaN or infinite numbers")
    squares, nearest = np.einsum("sf,sf->s", points, points), np.full(size, np.inf, np.float32)
    picks = np.empty(min(count, size), np.int64)
    picks[0] = first
    for n in range(1, len(picks)):
        last = picks[n - 1]
        np.minimum(nearest, squares + squares[last] - 2.0 * (points @ points[last]), out=nearest)
        nearest[last] = -np.inf  # for all that follows, even where points are the same
        picks[n] = nearest.argmax()
    return picks


def farthest_rank(molecule: np.ndarray, ids: np.ndarray, features: np.ndarray, count: int, *, seed: int,
                  least: int = 1) -> np.ndarray:
    """Place of each structure's molecule in the order of farthest-point picking, (S,) int64, as `maxmin_rank` has it.

    Each feature counts in units of its standard deviation over the molecules that are picked from.

    Args:
      molecule: Of each structure, (S,), of any sortable type.
      ids, features: Molecules (M,) and what stands for each, (M, F); there may be others among them.
      count, seed, least: As of `maxmin_rank`.

    Raises:
      ValueError: A molecule that could be picked has no features, or none could be picked.
    """
    order = np.argsort(ids, kind="stable")

    def pick(structures: np.ndarray, picks: int) -> np.ndarray:
        wanted = np.asarray(molecule)[structures]
        places = order[np.minimum(np.searchsorted(ids, wanted, sorter=order), len(order) - 1)]
        if (ids[places] != wanted).any():
            raise ValueError(f"{(ids[places] != wanted).sum()} of {len(wanted)} molecules have no features")
        own = features[places].astype(np.float64)
        # one that is the same in all molecules must not become noise of rounding
        spread = np.maximum(own.std(0), 1e-6 * max(float(np.abs(own).max(initial=0)), 1e-12))
        return farthest_points((own - own.mean(0)) / spread, picks, seed=seed)

    return _rank(molecule, count, least, pick)


def _first(size: int, first: int | None, seed: int) -> int:
    """Place of the first pick among `size`: `first`, or one drawn by `seed`."""
    if first is None:
        first = int(np.random.default_rng(seed).integers(size))
    if not 0 <= first < size:
        raise ValueError(f"the first pick must be a place from 0 to {size - 1}; received {first}")
    return first


def _rank(molecule: np.ndarray, count: int, least: int, pick: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """Place of each structure's molecule among `count` picks, (S,) int64; all that are not picked have `count`.

    Args:
      pick: (one structure of each molecule that may be picked, number of picks) -> places among them. The molecules
        stand in an order of their own, whatever the order of the structures.
    """
    unit_of, num_units = group(molecule)
    one = np.zeros(num_units, np.int64)
    one[unit_of] = np.arange(len(unit_of))
    pool = np.flatnonzero(np.bincount(unit_of, minlength=num_units) >= least)
    pool = pool[np.argsort(stable_ids(np.asarray(molecule)[one[pool]]), kind="stable")]
    rank = np.full(num_units, count, np.int64)
    picks = pick(one[pool], min(count, len(pool)))
    rank[pool[picks]] = np.arange(len(picks))
    return rank[unit_of]
