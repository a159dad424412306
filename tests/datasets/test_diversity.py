"""MaxMin picks what the plain greedy algorithm picks."""

import numpy as np
import pytest
from rdkit.DataStructs import BulkTanimotoSimilarity

from mlip_jax.datasets import diversity
from mlip_jax.datasets.connectivity import from_smiles
from mlip_jax.datasets.embedded import embedded_molecules

PRINTS = [diversity.morgan_fingerprint(from_smiles(m.smiles)) for m in embedded_molecules()[::5]]
DISTANCES = 1 - np.array([BulkTanimotoSimilarity(p, PRINTS) for p in PRINTS])


def greedy(first, count):
    """Smallest distance of each pick to those before it, and the picks with the lowest place among equals."""
    picks, reach = [first], []
    for _ in range(count - 1):
        nearest = DISTANCES[picks].min(0)
        nearest[picks] = -1
        picks.append(int(nearest.argmax()))
        reach.append(nearest.max())
    return picks, np.array(reach)


@pytest.mark.parametrize("first", [0, 17, 50])
def test_picks_are_the_greedy_ones(first):
    picks = diversity.maxmin(PRINTS, 25, first=first)
    assert picks[0] == first and len(set(picks.tolist())) == 25
    for n in range(1, 25):  # each pick is one of the farthest from those before it, whichever of equals they are
        nearest = DISTANCES[picks[:n]].min(0)
        nearest[picks[:n]] = -1
        assert nearest[picks[n]] == pytest.approx(nearest.max())


def test_picks_are_more_diverse_than_chance():
    def closest(places):
        return (DISTANCES[np.ix_(places, places)] + 2 * np.eye(len(places))).min()

    rng = np.random.default_rng(0)
    assert closest(diversity.maxmin(PRINTS, 20)) > max(
        closest(rng.choice(len(PRINTS), 20, replace=False)) for _ in range(100))
    assert closest(diversity.maxmin(PRINTS, 20, first=0)) == pytest.approx(greedy(0, 20)[1].min(), abs=0.05)


def test_the_seed_draws_the_first_pick():
    a, b = diversity.maxmin(PRINTS, 10, seed=1), diversity.maxmin(PRINTS, 10, seed=1)
    np.testing.assert_array_equal(a, b)
    assert len({int(diversity.maxmin(PRINTS, 1, seed=s)[0]) for s in range(10)}) > 3
    np.testing.assert_array_equal(a, diversity.maxmin(PRINTS, 10, first=int(a[0]), seed=7))
    np.testing.assert_array_equal(a, diversity.maxmin([p.ToBinary() for p in PRINTS], 10, seed=1))


def test_more_than_there_are_is_all():
    assert sorted(diversity.maxmin(PRINTS[:7], 100, first=3).tolist()) == list(range(7))


@pytest.mark.parametrize("prints, count, first", [([], 1, None), (PRINTS, 0, None), (PRINTS, 5, len(PRINTS)),
                                                  (PRINTS, 5, -1)])
def test_out_of_range(prints, count, first):
    with pytest.raises(ValueError, match="received"):
        diversity.maxmin(prints, count, first=first)
