"""Diverse molecules: MaxMin picking by Tanimoto distance of Morgan fingerprints or by features.

In MaxMin picking (Ashton et al., Quant. Struct.-Act. Relat. 21, 598 (2002)), each pick is the
molecule whose nearest neighbor among the previous picks is farthest. RDKit's LazyBitVectorPick
returns the picks of the greedy algorithm without computing all distances. In a vector space, the
same algorithm is called farthest-point sampling (Gonzalez, Theor. Comput. Sci. 38, 293, 1985).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlip_jax.datasets.identity import group, stable_ids
from mlip_jax.datasets.isolation.molecules import is_safe_smiles
from mlip_jax.datasets.molecules.fingerprints import morgan_fingerprint


def maxmin(
    fingerprints: Sequence[Any], count: int, *, first: int | None = None, seed: int = 0
) -> np.ndarray:
    """Return the indices of `count` diverse fingerprints in the order of picking, (count,) int64.

    Args:
      fingerprints: ExplicitBitVects or their binary form, (S,).
      count: Number of picks. If it exceeds S, all S fingerprints are picked.
      first: Index of the first pick; None draws it with `seed`.
      seed: Seed of the first pick.

    Raises:
      ValueError: There are no fingerprints, or `count` or `first` is out of range.
    """
    from rdkit.DataStructs import ExplicitBitVect
    from rdkit.SimDivFilters.rdSimDivPickers import MaxMinPicker

    size = len(fingerprints)
    if not size or count < 1:
        raise ValueError(
            f"expected at least one fingerprint and one pick; received {size} and {count}"
        )
    first = _first(size, first, seed)
    if min(count, size) == 1:
        return np.array([first], np.int64)
    vectors = [ExplicitBitVect(f) if isinstance(f, bytes) else f for f in fingerprints]
    # This seed is for RDKit's choice of the first pick, which is not used here.
    picked = MaxMinPicker().LazyBitVectorPick(vectors, size, min(count, size), [first], seed=0)
    return np.array(list(picked), np.int64)


def maxmin_rank(
    molecule: np.ndarray, smiles: Sequence[str], count: int, *, seed: int, min_conformers: int = 1
) -> np.ndarray:
    """Return the rank of the molecule of each structure in the order of MaxMin picking, (S,) int64.

    The picks for a smaller count are the first picks for a larger one. The picks do not depend on
    the order of the structures.

    Args:
      molecule: Molecule of each structure, (S,), of any sortable type.
      smiles: SMILES of each structure, (S,).
      count: Number of molecules to pick. All other molecules have the rank `count`.
      seed: Seed of the first pick.
      min_conformers: Minimum number of structures of a molecule that can be picked.

    Raises:
      ImportError: RDKit is missing.
      ValueError: A SMILES cannot be read, or there is no molecule to pick from.
    """
    from rdkit import Chem

    def pick(structures: np.ndarray, picks: int) -> np.ndarray:
        fingerprints = []
        for text in (smiles[k] for k in structures):
            mol = Chem.MolFromSmiles(text) if text and is_safe_smiles(text) else None
            if mol is None:
                raise ValueError(
                    f"the selection of diverse molecules requires valid SMILES; received {text!r}"
                )
            # Hydrogens can be explicit in one record and implicit in the next.
            fingerprints.append(morgan_fingerprint(Chem.RemoveHs(mol)))
        return maxmin(fingerprints, picks, seed=seed)

    return _rank(molecule, count, min_conformers, pick)


def farthest_points(
    points: np.ndarray, count: int, *, first: int | None = None, seed: int = 0
) -> np.ndarray:
    """Return the indices of `count` distant points in the order of picking, (count,) int64.

    Each pick is the point whose nearest previous pick is farthest. The cost is O(S * F * count):
    seconds for thousands of each.

    Args:
      points: Points, (S, F).
      count: Number of picks. If it exceeds S, all S points are picked.
      first: Index of the first pick; None draws it with `seed`, as in `maxmin`.
      seed: Seed of the first pick.

    Raises:
      ValueError: There are no points, `count` or `first` is out of range, or points are not finite.
    """
    size = len(points)
    if not size or count < 1:
        raise ValueError(f"expected at least one point and one pick; received {size} and {count}")
    first = _first(size, first, seed)
    points = np.ascontiguousarray(points, np.float32)
    if not np.isfinite(points).all():
        raise ValueError("points must be finite; received NaN or infinite numbers")
    # Squared norms and squared distances to the nearest pick, both (S,).
    squares, nearest = np.einsum("sf,sf->s", points, points), np.full(size, np.inf, np.float32)
    picks = np.empty(min(count, size), np.int64)
    picks[0] = first
    for n in range(1, len(picks)):
        # Update the distances with the last pick, then take the farthest point.
        last = picks[n - 1]
        np.minimum(nearest, squares + squares[last] - 2.0 * (points @ points[last]), out=nearest)
        nearest[last] = -np.inf  # for all that follows, even where points are the same
        picks[n] = nearest.argmax()
    return picks


def farthest_rank(
    molecule: np.ndarray,
    ids: np.ndarray,
    features: np.ndarray,
    count: int,
    *,
    seed: int,
    min_conformers: int = 1,
) -> np.ndarray:
    """Return the rank of the molecule of each structure in farthest-point picking, (S,) int64.

    Each feature is divided by its standard deviation over the candidate molecules.

    Args:
      molecule: Molecule of each structure, (S,), of any sortable type.
      ids: Molecules with features, (M,); can include molecules without structures here.
      features: Features of these molecules, (M, F).
      count: Number of molecules to pick. All other molecules have the rank `count`.
      seed: Seed of the first pick.
      min_conformers: Minimum number of structures of a molecule that can be picked.

    Raises:
      ValueError: A candidate molecule has no features, or there is no candidate.
    """
    order = np.argsort(ids, kind="stable")

    def pick(structures: np.ndarray, picks: int) -> np.ndarray:
        candidates = np.asarray(molecule)[structures]
        rows = order[np.minimum(np.searchsorted(ids, candidates, sorter=order), len(order) - 1)]
        if (ids[rows] != candidates).any():
            raise ValueError(
                f"{(ids[rows] != candidates).sum()} of {len(candidates)} molecules have no features"
            )
        values = features[rows].astype(np.float64)
        # Without this minimum, division would turn a constant feature into rounding noise.
        spread = np.maximum(values.std(0), 1e-6 * max(float(np.abs(values).max(initial=0)), 1e-12))
        return farthest_points((values - values.mean(0)) / spread, picks, seed=seed)

    return _rank(molecule, count, min_conformers, pick)


def _first(size: int, first: int | None, seed: int) -> int:
    """Return the index of the first pick out of `size`: `first`, or a random one if it is None."""
    if first is None:
        first = int(np.random.default_rng(seed).integers(size))
    if not 0 <= first < size:
        raise ValueError(f"the first pick must be an index from 0 to {size - 1}; received {first}")
    return first


def _rank(
    molecule: np.ndarray,
    count: int,
    min_conformers: int,
    pick: Callable[[np.ndarray, int], np.ndarray],
) -> np.ndarray:
    """Return the rank of the molecule of each structure among `count` picks, (S,) int64.

    Molecules that are not picked have the rank `count`.

    Args:
      molecule: Molecule of each structure, (S,).
      count: Number of molecules to pick.
      min_conformers: Minimum number of structures of a molecule that can be picked.
      pick: Function (one structure per candidate molecule, number of picks) -> indices among the
        candidates. The order of the candidates does not depend on the order of the structures.
    """
    unit_of, num_units = group(molecule)
    one = np.zeros(num_units, np.int64)
    one[unit_of] = np.arange(len(unit_of))
    # Candidates, sorted by their hash to be independent of the order of the structures.
    pool = np.flatnonzero(np.bincount(unit_of, minlength=num_units) >= min_conformers)
    pool = pool[np.argsort(stable_ids(np.asarray(molecule)[one[pool]]), kind="stable")]
    rank = np.full(num_units, count, np.int64)
    picks = pick(one[pool], min(count, len(pool)))
    rank[pool[picks]] = np.arange(len(picks))
    return rank[unit_of]
