"""Filters and splits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.datasets.selection import SPLITS, Selection, split
from mlip_jax.structure import Structure


@st.composite
def molecules(draw):
    sizes = draw(st.lists(st.integers(1, 12), min_size=3, max_size=60))
    labels = np.repeat([f"m{n}" for n in range(len(sizes))], sizes)
    return np.random.default_rng(draw(st.integers(0, 99))).permutation(labels)


counts_of_parts = st.tuples(st.integers(1, 400), st.integers(0, 200), st.integers(0, 200))


@settings(max_examples=150, deadline=None)
@given(molecule=molecules(), counts=counts_of_parts, by=st.sampled_from(["molecule", "random"]),
       seed=st.integers(0, 99))
def test_parts_are_disjoint_and_deterministic(molecule, counts, by, seed):
    parts = split(molecule, counts, by=by, seed=seed)
    assert tuple(parts) == SPLITS
    together = np.concatenate(list(parts.values()))
    assert len(np.unique(together)) == len(together) <= len(molecule)
    assert all((np.diff(p) > 0).all() for p in parts.values())
    assert together.size == 0 or (together.min() >= 0 and together.max() < len(molecule))
    again = split(molecule, counts, by=by, seed=seed)
    assert all(np.array_equal(parts[name], again[name]) for name in SPLITS)
    for name, count in zip(SPLITS, counts):
        assert (len(parts[name]) > 0) == (count > 0)
    if by == "molecule":
        seen = [set(molecule[p]) for p in parts.values()]
        assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


@settings(max_examples=100, deadline=None)
@given(molecule=molecules(), counts=counts_of_parts, seed=st.integers(0, 99))
def test_counts_are_near_the_request(molecule, counts, seed):
    """Within half a molecule at either end; to one structure when drawn one by one; scaled down when too many."""
    wanted = np.array(counts) * min(1.0, len(molecule) / sum(counts))
    largest = np.unique(molecule, return_counts=True)[1].max()
    for by, tolerance in (("random", 1.5), ("molecule", 1.0 * largest)):
        parts = split(molecule, counts, by=by, seed=seed)
        found = np.array([len(parts[name]) for name in SPLITS])
        # a part that got nothing by rounding is given one unit of the largest
        tiny = 2 * (largest if by == "molecule" else 1) * (wanted < largest).sum()
        assert (np.abs(found - wanted) <= tolerance + tiny).all(), (found, wanted)
        if sum(counts) >= len(molecule):
            assert found.sum() == len(molecule)


def test_exact_counts_when_drawn_one_by_one():
    parts = split(np.array(["a"] * 1000), (600, 100, 50), by="random", seed=3)
    assert [len(parts[name]) for name in SPLITS] == [600, 100, 50]


def test_seeds_differ():
    molecule = np.arange(100).astype(str)
    assert not np.array_equal(split(molecule, (50, 25, 25))["train"], split(molecule, (50, 25, 25), seed=1)["train"])


def test_split_does_not_depend_on_where_molecules_stand():
    """The same molecules in another order fall into the same parts."""
    molecule = np.repeat(np.arange(30).astype(str), 4)
    order = np.random.default_rng(0).permutation(len(molecule))
    one, other = split(molecule, (60, 30, 30), seed=5), split(molecule[order], (60, 30, 30), seed=5)
    for name in SPLITS:
        assert set(molecule[one[name]]) == set(molecule[order][other[name]])


@pytest.mark.parametrize(("arguments", "message"), [
    ({"counts": (5, 1, 1), "by": "scaffold"}, "'molecule' or 'random', received 'scaffold'"),
    ({"counts": (0, 1, 1)}, "first at least 1"), ({"counts": (5, -1, 1)}, "received"),
    ({"counts": (5, 1)}, "three numbers"),
    ({"counts": (5, 1, 1)}, "10 structures of 2 molecules cannot be split by molecule into 3 parts")])
def test_wrong_requests(arguments, message):
    with pytest.raises(ValueError, match=message):
        split(np.repeat(["a", "b"], 5), **arguments)


def structure(numbers=(1, 1), **fields):
    fields.setdefault("energy", 1.0)
    return Structure(np.array(numbers), np.zeros((len(numbers), 3)), **fields)


@pytest.mark.parametrize(("options", "dropped", "reason"), [
    ({"elements": ("H", "C")}, structure((1, 8)), "elements"),
    ({"charge": 0.0}, structure(charge=1.0), "charge"),
    ({"max_atoms": 3}, structure((1,) * 4), "too many atoms"),
    ({"max_force": 2.0}, structure(forces=np.full((2, 3), -3.0)), "force too large"),
    ({}, structure(energy=float("nan")), "no labels"),
    ({}, structure(energy=float("nan"), forces=np.full((2, 3), np.nan)), "no labels")])
def test_filter_counts_reasons(options, dropped, reason):
    selection = Selection(**options)
    good = structure((1, 6), forces=np.ones((2, 3)))
    assert list(selection.filter([good, dropped, good])) == [good, good]
    assert selection.removed == {reason: 1} and selection.kept == 2


def test_one_label_is_enough():
    kept = [structure(energy=float("nan"), forces=np.ones((2, 3))), structure(forces=np.full((2, 3), np.nan))]
    assert list(Selection(max_force=5.0).filter(kept)) == kept


def test_unknown_element_in_the_filter():
    with pytest.raises(ValueError, match="'Xy' is not the symbol"):
        Selection(elements=("H", "Xy"))
