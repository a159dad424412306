"""Tests for diverse molecules: picks equal those of the plain greedy algorithm."""

import time

import numpy as np
import pytest
from rdkit.DataStructs import BulkTanimotoSimilarity

from mlip_jax.datasets.builtin import embedded_molecules
from mlip_jax.datasets.molecules.connectivity import from_smiles
from mlip_jax.datasets.molecules.fingerprints import morgan_fingerprint
from mlip_jax.datasets.selection import diversity

PRINTS = [morgan_fingerprint(from_smiles(m.smiles)) for m in embedded_molecules()[::5]]
DISTANCES = 1 - np.array([BulkTanimotoSimilarity(p, PRINTS) for p in PRINTS])


def greedy(first, count):
    """Return the distance of each pick to earlier picks, and the picks (lowest index if equal)."""
    picks, reach = [first], []
    for _ in range(count - 1):
        nearest = DISTANCES[picks].min(0)
        nearest[picks] = -1
        picks.append(int(nearest.argmax()))
        reach.append(nearest.max())
    return picks, np.array(reach)


@pytest.mark.parametrize("first", [0, 17, 50])
def test_picks_equal_the_greedy_algorithm(first):
    picks = diversity.maxmin(PRINTS, 25, first=first)
    assert picks[0] == first and len(set(picks.tolist())) == 25
    # each pick is one of the farthest from those before it, whichever of equals they are
    for n in range(1, 25):
        nearest = DISTANCES[picks[:n]].min(0)
        nearest[picks[:n]] = -1
        assert nearest[picks[n]] == pytest.approx(nearest.max())


def test_picks_are_more_diverse_than_random_ones():
    def closest(places):
        return (DISTANCES[np.ix_(places, places)] + 2 * np.eye(len(places))).min()

    rng = np.random.default_rng(0)
    assert closest(diversity.maxmin(PRINTS, 20)) > max(
        closest(rng.choice(len(PRINTS), 20, replace=False)) for _ in range(100)
    )
    assert closest(diversity.maxmin(PRINTS, 20, first=0)) == pytest.approx(
        greedy(0, 20)[1].min(), abs=0.05
    )


def test_seed_determines_the_first_pick():
    a, b = diversity.maxmin(PRINTS, 10, seed=1), diversity.maxmin(PRINTS, 10, seed=1)
    np.testing.assert_array_equal(a, b)
    assert len({int(diversity.maxmin(PRINTS, 1, seed=s)[0]) for s in range(10)}) > 3
    np.testing.assert_array_equal(a, diversity.maxmin(PRINTS, 10, first=int(a[0]), seed=7))
    np.testing.assert_array_equal(a, diversity.maxmin([p.ToBinary() for p in PRINTS], 10, seed=1))


def test_count_above_the_size_picks_all():
    assert sorted(diversity.maxmin(PRINTS[:7], 100, first=3).tolist()) == list(range(7))


@pytest.mark.parametrize(
    "prints, count, first",
    [([], 1, None), (PRINTS, 0, None), (PRINTS, 5, len(PRINTS)), (PRINTS, 5, -1)],
)
def test_out_of_range(prints, count, first):
    with pytest.raises(ValueError, match="received"):
        diversity.maxmin(prints, count, first=first)


POINTS = np.random.default_rng(0).normal(size=(60, 4))


@pytest.mark.parametrize("first", [0, 17, 59])
def test_farthest_points_equal_the_greedy_algorithm(first):
    apart = np.linalg.norm(POINTS[:, None] - POINTS, axis=-1)
    expected = [first]
    while len(expected) < 25:
        expected.append(int(apart[expected].min(0).argmax()))
    assert diversity.farthest_points(POINTS, 25, first=first).tolist() == expected


def test_farthest_points_of_a_seed_and_of_equal_points():
    picks = diversity.farthest_points(POINTS, 40, seed=3)
    np.testing.assert_array_equal(picks[:9], diversity.farthest_points(POINTS, 9, seed=3))
    assert len({int(diversity.farthest_points(POINTS, 1, seed=s)[0]) for s in range(10)}) > 3
    same = diversity.farthest_points(np.ones((7, 3)), 100, first=2)
    assert sorted(same.tolist()) == list(range(7))


def test_speed_of_farthest_points():
    started = time.process_time()
    diversity.farthest_points(np.random.default_rng(0).normal(size=(5000, 128)), 4000)
    assert time.process_time() - started < 30  # less than 1 s where nothing else is to do


@pytest.mark.parametrize(
    "points, count, first",
    [(POINTS[:0], 1, None), (POINTS, 0, None), (POINTS, 5, 60), (np.full((3, 2), np.nan), 2, None)],
)
def test_farthest_points_out_of_range(points, count, first):
    with pytest.raises(ValueError, match="received"):
        diversity.farthest_points(points, count, first=first)


def test_rank_by_features():
    """The rank does not depend on the order of structures and features or on their units."""
    rng = np.random.default_rng(1)
    molecule = np.repeat(np.arange(60) + 1000, rng.integers(1, 5, 60))
    sizes = np.bincount(molecule - 1000)
    rank = diversity.farthest_rank(
        molecule, np.arange(1000, 1060), POINTS, 12, seed=5, min_conformers=2
    )
    picked = dict(zip(molecule.tolist(), rank.tolist()))
    assert (
        sorted(r for r in picked.values() if r < 12) == list(range(12))
        and max(picked.values()) == 12
    )
    assert all(sizes[m - 1000] >= 2 for m, r in picked.items() if r < 12)
    some, other = rng.permutation(len(molecule)), rng.permutation(60)
    units = np.array([1e-2, 1.0, 1e2, 3.0])
    again = diversity.farthest_rank(
        molecule[some], other + 1000, 7.0 + POINTS[other] * units, 12, seed=5, min_conformers=2
    )
    np.testing.assert_array_equal(again, rank[some])
    more = diversity.farthest_rank(
        molecule, np.arange(1000, 1060), POINTS, 20, seed=5, min_conformers=2
    )
    np.testing.assert_array_equal(np.where(more < 12, more, 12), rank)
    with pytest.raises(ValueError, match="1 of .* molecules have no features"):
        diversity.farthest_rank(
            molecule,
            np.delete(np.arange(1000, 1060), sizes.argmax()),
            np.delete(POINTS, sizes.argmax(), 0),
            12,
            seed=5,
            min_conformers=2,
        )
