"""Tests for subsets of n_s molecules with n_c conformations: nested and of the requested size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.datasets.selection.subsets import budget_grid, nested_subset


@st.composite
def data(draw):
    """Molecules with 1 to 9 conformations in any order; at least three have 5 or more."""
    sizes = [9, 5, 7, *draw(st.lists(st.integers(1, 9), max_size=25))]
    molecule = np.repeat([f"m{n}" for n in range(len(sizes))], sizes)
    conformer = np.concatenate([np.arange(size) for size in sizes])
    order = np.random.default_rng(draw(st.integers(0, 99))).permutation(len(molecule))
    return molecule[order], conformer[order]


def pairs(molecule, conformer, indices):
    return {(str(m), int(c)) for m, c in zip(molecule[indices], conformer[indices])}


@settings(max_examples=150, deadline=None)
@given(
    data=data(),
    n_s=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    n_c=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 2**70),
)
def test_subsets_are_nested_and_have_the_requested_size(data, n_s, n_c, seed):
    molecule, conformer = data
    actual = []
    for count, each in zip(sorted(n_s), sorted(n_c)):
        indices = nested_subset(molecule, conformer, count, each, seed=seed, min_conformers=5)
        assert (
            indices.dtype == np.int64
            and (np.diff(indices) > 0).all()
            and len(indices) == count * each
        )
        names, counts = np.unique(molecule[indices], return_counts=True)
        assert len(names) == count and (counts == each).all()
        assert all((molecule == name).sum() >= 5 for name in names)
        actual.append(pairs(molecule, conformer, indices))
    assert actual[0] <= actual[1]


@settings(max_examples=150, deadline=None)
@given(data=data(), seed=st.integers(0, 99))
def test_molecules_with_few_conformers_come_last(data, seed):
    molecule, conformer = data
    names, sizes = np.unique(molecule, return_counts=True)
    many = set(names[sizes >= 5])
    enough = (sizes >= 2).sum()
    everything = nested_subset(
        molecule, conformer, enough, 2, seed=seed, min_conformers=5, fewer_last=True
    )
    assert set(molecule[everything]) == set(names[sizes >= 2])
    for count in (1, len(many), enough):
        some = nested_subset(
            molecule, conformer, count, 1, seed=seed, min_conformers=5, fewer_last=True
        )
        assert pairs(molecule, conformer, some) <= pairs(molecule, conformer, everything)
        assert len(set(molecule[some]) & many) == min(count, len(many))
    without = nested_subset(molecule, conformer, len(many), 4, seed=seed, min_conformers=5)
    assert np.array_equal(
        without,
        nested_subset(
            molecule, conformer, len(many), 4, seed=seed, min_conformers=5, fewer_last=True
        ),
    )
    order = [
        nested_subset(molecule, conformer, n, 1, seed=seed, min_conformers=5, fewer_last=True)
        for n in range(1, len(names) + 1)
    ]
    assert all(set(a) < set(b) for a, b in zip(order, order[1:]))
    with pytest.raises(ValueError, match=f"{enough + 1} molecules with at least 2 conformations"):
        nested_subset(
            molecule, conformer, enough + 1, 2, seed=seed, min_conformers=5, fewer_last=True
        )


@settings(max_examples=80, deadline=None)
@given(data=data(), seed=st.integers(0, 99), shuffle=st.integers(0, 99))
def test_order_of_structures_does_not_matter(data, seed, shuffle):
    molecule, conformer = data
    order = np.random.default_rng(shuffle).permutation(len(molecule))
    one = nested_subset(molecule, conformer, 2, 3, seed=seed)
    other = nested_subset(molecule[order], conformer[order], 2, 3, seed=seed)
    assert np.array_equal(one, np.sort(order[other]))


def test_conformations_of_a_molecule_do_not_depend_on_the_others():
    molecule, conformer = np.repeat(["a", "b", "c"], 20), np.tile(np.arange(20), 3)
    everything = pairs(molecule, conformer, nested_subset(molecule, conformer, 3, 6, seed=1))
    alone = nested_subset(molecule[20:40], conformer[20:40], 1, 6, seed=1)
    assert pairs(molecule[20:40], conformer[20:40], alone) == {
        pair for pair in everything if pair[0] == "b"
    }


def test_conformations_are_drawn_independently_per_molecule_and_seed():
    molecule, conformer = np.repeat(np.arange(50), 20), np.tile(np.arange(20), 50)
    drawn = [nested_subset(molecule, conformer, 50, 5, seed=seed) for seed in (0, 1)]
    choices = {tuple(conformer[drawn[0]][5 * n : 5 * n + 5]) for n in range(50)}
    assert len(choices) > 40 and not np.array_equal(*drawn)
    # every conformation is as likely as any other: 250 draws of 20, so 12.5 each
    assert 3 <= np.bincount(conformer[drawn[0]], minlength=20).min() <= 12.5


def test_molecules_are_equally_likely():
    molecule = np.arange(40)
    drawn = np.concatenate(
        [nested_subset(molecule, np.zeros(40, int), 10, 1, seed=seed) for seed in range(200)]
    )
    counts = np.bincount(drawn, minlength=40)
    assert 25 < counts.min() and counts.max() < 80  # 50 expected, with a standard deviation of 6


def test_result_equals_recorded_values():
    """The hash must not change with the process, the machine or the version of NumPy."""
    molecule, conformer = np.repeat([f"m{n}" for n in range(6)], 4), np.tile(np.arange(4), 6)
    assert nested_subset(molecule, conformer, 2, 2, seed=7).tolist() == [17, 18, 22, 23]


def test_repeated_conformer_numbers_give_the_requested_count():
    indices = nested_subset(np.repeat(["a", "b"], 6), np.tile([0, 1, 2], 4), 2, 5, seed=0)
    assert len(indices) == 10 and (np.bincount(indices // 6) == 5).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 4, None), "3 molecules with at least 4 conformations; 2 of 4 .* .the maximum is 6"),
        ((2, 2, 6), "2 molecules with at least 6 conformations; 1 of 4"),
        ((0, 1, None), "at least 1 molecule"),
        ((1, 0, None), "at least 1"),
        ((1, 3, 2), "not below num_conformers"),
    ],
)
def test_invalid_requests_are_rejected(arguments, message):
    molecule = np.repeat(["a", "b", "c", "d"], [6, 4, 2, 1])
    with pytest.raises(ValueError, match=message):
        nested_subset(molecule, np.arange(13), *arguments[:2], seed=0, min_conformers=arguments[2])


def test_conformer_numbers_are_validated():
    with pytest.raises(ValueError, match="integer for each of 3 structures; received float64"):
        nested_subset(np.array(["a"] * 3), np.zeros(3), 1, 1, seed=0)


def test_budget_grid():
    assert budget_grid(100, [1, 3, 100]) == [(100, 1), (33, 3), (1, 100)]
    for conformers in ([0], [101]):
        with pytest.raises(ValueError, match="between 1 and 100"):
            budget_grid(100, conformers)
