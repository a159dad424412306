"""Tests for the choice of structures to label: uncertain, different, and of all elements."""

import numpy as np
import pytest

from mlip_jax.datasets.columns import Columns
from mlip_jax.label_budget import choice
from mlip_jax.label_budget.learning_curve import labels_to_reach
from mlip_jax.structure import Structure

# Two copies of an uncertain structure, one that is uncertain and elsewhere, one that is certain and
# elsewhere, and one that is uncertain but next to a labeled structure.
POINTS = np.array([[0.0, 0], [0.01, 0], [3, 0], [0, 3], [9.99, 9.99]])
UNCERTAINTY = np.array([1.0, 0.99, 0.8, 0.05, 2.0])
LABELED = np.array([[10.0, 10.0]])


def chosen(strategy, count):
    rng = np.random.default_rng(0)
    return choice.choose(strategy, count, UNCERTAINTY, POINTS, LABELED, rng).tolist()


def test_both_leaves_out_copies_and_neighbors_of_labeled_structures():
    """Detects a batch of copies, and a score that ignores the uncertainty or the distance."""
    assert chosen("both", 2) == [0, 2]
    assert chosen("uncertainty", 3) == [4, 0, 1]
    assert chosen("diversity", 3)[:1] == [0] and set(chosen("diversity", 3)) == {0, 2, 3}


def test_without_labels_the_chosen_points_determine_the_distances():
    """Detects that distances count only below one standard deviation, as if the first were one."""
    points = np.random.default_rng(0).normal(size=(40, 32))
    points[20:] += 6.0
    slightly = np.where(np.arange(40) < 20, 1.05, 1.0)
    found = choice.choose("both", 4, slightly, points, np.zeros((0, 32)), np.random.default_rng(0))
    assert (found >= 20).any()


def test_a_batch_represents_many_candidates_before_an_outlier():
    """Detects a choice of the farthest structure, which no other candidate resembles."""
    rng = np.random.default_rng(0)
    crowd, outlier, labeled = rng.normal(size=(200, 2)), [[20.0, 6.0]], np.array([[0, 0], [20, 0]])
    points = np.concatenate([crowd, outlier])
    rows = choice.choose("diversity", 3, np.ones(len(points)), points, labeled, rng)
    assert (rows < len(crowd)).all()


@pytest.mark.parametrize("strategy", choice.STRATEGIES)
def test_every_strategy_chooses_distinct_structures_and_at_most_all(strategy):
    assert sorted(chosen(strategy, 99)) == [0, 1, 2, 3, 4]


def columns_of(*molecules):
    """Return structures with (name, elements)."""
    return Columns.from_structures(
        Structure(np.array(z, np.int32), np.zeros((len(z), 3)), molecule=name)
        for name, z in molecules
    )


def test_the_first_choice_covers_every_element():
    """Detects a first batch without a rare element, which no force field could then predict."""
    columns = columns_of(*[("a", [1, 6])] * 50, ("b", [1, 16]), *[("c", [1, 8])] * 3)
    for seed in range(5):
        rows = choice.choose_first(columns, 6, np.random.default_rng(seed))
        assert len(set(rows.tolist())) == 6
        assert set(np.concatenate([columns[k].numbers for k in rows])) == {1, 6, 8, 16}


def test_held_out_structures_are_spread_over_the_molecules():
    columns = columns_of(*[("a", [1])] * 50, *[("b", [1])] * 4, *[("c", [1])] * 4)
    rows = choice.spread_over_molecules(columns, 9, np.random.default_rng(0))
    names, counts = np.unique(columns.molecule[rows].astype(str), return_counts=True)
    assert names.tolist() == ["a", "b", "c"] and counts.tolist() == [3, 3, 3]


def test_labels_that_a_learning_curve_needs():
    curve = [100, 200, 400], [0.4, 0.2, 0.1]
    assert labels_to_reach(*curve, 0.2) == 200 and labels_to_reach(*curve, 0.5) == 100
    assert labels_to_reach(*curve, 0.1 * 2**0.5) == pytest.approx(200 * 2**0.5, abs=0.1)
    assert labels_to_reach(*curve, 0.05) is None
