"""Tests for splits: disjoint, of the requested sizes, reproducible, no leaks between splits."""

import hashlib
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.datasets.identity import group
from mlip_jax.datasets.selection import split_choice
from mlip_jax.datasets.selection.splits import METHODS, SPLITS, check_parts, describe, split

# An official split needs further arguments and has tests of its own.
BY = [by for by in METHODS if by != "official"]
PINNED = {
    "molecule": "d536b7e9",
    "random": "dd781912",
    "scaffold": "053e7206",
    "scaffold_random": "1213a273",
    "size": "56199c1f",
}


@st.composite
def molecules(draw, least=3):
    sizes = draw(st.lists(st.integers(1, 12), min_size=least, max_size=60))
    labels = np.repeat([f"m{n}" for n in range(len(sizes))], sizes)
    return np.random.default_rng(draw(st.integers(0, 99))).permutation(labels)


counts_of_parts = st.tuples(st.integers(2, 400), st.integers(0, 200), st.integers(0, 200))


def columns(molecule, groups=7, seed=0):
    """Arguments of a split: each molecule has one of at least three scaffolds and sizes."""
    different, number = np.unique(molecule, return_inverse=True)
    rng = np.random.default_rng(seed)
    chosen = np.concatenate([[0, 1, 2], rng.integers(0, groups, max(len(different) - 3, 0))])[
        : len(different)
    ]
    scaffold = np.array(["", "c1ccccc1", "C1CC1", "c1ccncc1", "C1CCNCC1", "c1ccoc1", "C1CCC1"])[
        chosen % 7
    ]
    return {"molecule": molecule, "scaffold": scaffold[number], "n_atoms": 3 + chosen[number]}


def kept_apart(by, arguments):
    """Return the labels that must not occur in two splits."""
    return {
        "molecule": ["molecule"],
        "scaffold": ["molecule", "scaffold"],
        "scaffold_random": ["molecule", "scaffold"],
        "size": ["molecule", "n_atoms"],
    }.get(by, [])


@settings(max_examples=250, deadline=None)
@given(
    molecule=molecules(), counts=counts_of_parts, by=st.sampled_from(BY), seed=st.integers(0, 99)
)
def test_splits_are_disjoint_and_deterministic(molecule, counts, by, seed):
    arguments = columns(molecule)
    parts = split(by, counts, seed=seed, **arguments)
    assert tuple(parts) == SPLITS
    together = np.concatenate(list(parts.values()))
    assert len(np.unique(together)) == len(together) <= len(molecule)
    assert all((np.diff(p) > 0).all() and p.dtype == np.int64 for p in parts.values())
    assert together.min() >= 0 and together.max() < len(molecule)
    again = split(by, counts, seed=seed, **arguments)
    assert all(np.array_equal(parts[name], again[name]) for name in SPLITS)
    for name, count in zip(SPLITS, counts):
        assert (len(parts[name]) > 0) == (count > 0)
    if sum(counts) >= len(molecule):
        assert len(together) == len(molecule)
    for name in kept_apart(by, arguments):
        seen = [set(arguments[name][p]) for p in parts.values()]
        assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


@settings(max_examples=100, deadline=None)
@given(molecule=molecules(), counts=counts_of_parts, seed=st.integers(0, 99))
def test_counts_are_close_to_the_request(molecule, counts, seed):
    """Within half a molecule at either end, exact for random splits, scaled down if too large."""
    wanted = np.array(counts) * min(1.0, len(molecule) / sum(counts))
    largest = np.unique(molecule, return_counts=True)[1].max()
    for by, tolerance in (("random", 1.5), ("molecule", 1.0 * largest)):
        parts = split(by, counts, seed=seed, molecule=molecule)
        actual = np.array([len(parts[name]) for name in SPLITS])
        # a split that is empty after rounding takes one unit from its neighbor
        tiny = 2 * (largest if by == "molecule" else 1) * (wanted < largest).sum()
        assert (np.abs(actual - wanted) <= tolerance + tiny).all(), (actual, wanted)


def test_random_splits_have_exact_counts():
    parts = split("random", (600, 100, 50), seed=3, molecule=np.array(["a"] * 1000))
    assert [len(parts[name]) for name in SPLITS] == [600, 100, 50]


@pytest.mark.parametrize("by", ["random", "molecule", "scaffold_random"])
def test_seeds_differ(by):
    arguments = {"molecule": np.arange(300), "scaffold": np.arange(300) // 3}
    one, other = (split(by, (150, 75, 75), seed=seed, **arguments)["train"] for seed in (0, 1))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("by", [by for by in BY if by != "random"])
@pytest.mark.parametrize("counts", [(60, 30, 30), (20, 10, 10), (0.5, 0.1, 0.1)])
def test_split_does_not_depend_on_the_order_of_structures(by, counts):
    """The same molecules in another order are in the same splits."""
    arguments = columns(np.repeat(np.arange(30).astype(str), 4))
    order = np.random.default_rng(0).permutation(120)
    shuffled = {name: values[order] for name, values in arguments.items()}
    one, other = split(by, counts, seed=5, **arguments), split(by, counts, seed=5, **shuffled)
    for name in SPLITS:
        assert np.array_equal(one[name], np.sort(order[other[name]]))


def test_result_equals_recorded_values():
    """Results must not change with the process, the machine or the version of NumPy."""
    arguments = columns(np.repeat([f"molecule {n}" for n in range(100)], 5))
    actual = {}
    for by in BY:
        parts = split(by, (200, 50, 50), seed=11, **arguments)
        actual[by] = hashlib.blake2b(
            b"|".join(p.astype("<i8").tobytes() for p in parts.values()), digest_size=4
        ).hexdigest()
    assert actual == PINNED


@pytest.mark.parametrize("by", BY)
def test_molecules_and_scaffolds_can_be_strings_or_integers(by):
    """Numbers in the order of the names result in the same split as the names."""
    arguments = columns(np.repeat([f"m{n:03}" for n in range(40)], 3))
    numbers = arguments | {
        name: np.unique(arguments[name], return_inverse=True)[1].astype(dtype)
        for name, dtype in (("molecule", np.uint64), ("scaffold", np.int32))
    }
    one, other = (
        split(by, (50, 20, 20), seed=2, **arguments),
        split(by, (50, 20, 20), seed=2, **numbers),
    )
    assert all(np.array_equal(one[name], other[name]) for name in SPLITS)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((0.8, 0.1, 0.1), (800, 100, 100)),
        ((0.25, 0.05, 0), (250, 50, 0)),
        ((1, 0, 0), (1000, 0, 0)),
        ((1.0, 0.0, 0.0), (1000, 0, 0)),
        ((1, 1, 1), (1, 1, 1)),
        ((1, 1, 0), (1, 1, 0)),
        ((6000, 2000, 2000), (600, 200, 200)),
    ],
)
def test_fractions_and_counts(counts, expected):
    parts = split("random", counts, seed=0, molecule=np.arange(1000))
    assert tuple(len(p) for p in parts.values()) == expected


def scaffold_case():
    """Scaffolds "A" of 50 molecules, "B" of 20, 30 others of one; 4 conformations per molecule."""
    scaffold = np.array(["A"] * 50 + ["B"] * 20 + [f"R{n}" for n in range(30)])
    order = np.random.default_rng(1).permutation(400)
    return {
        "molecule": np.repeat(np.arange(100), 4)[order],
        "scaffold": np.repeat(scaffold, 4)[order],
    }


@pytest.mark.parametrize(
    ("counts", "expected"), [((0.7, 0.15, 0.15), [280, 60, 60]), ((140, 28, 32), [140, 28, 32])]
)
def test_frequent_scaffolds_are_for_training_and_rare_ones_for_testing(counts, expected):
    arguments = scaffold_case()
    parts = split("scaffold", counts, seed=0, **arguments)
    scaffold = arguments["scaffold"]
    assert set(scaffold[parts["train"]]) == {"A", "B"}
    assert all(
        name.startswith("R") for name in scaffold[np.concatenate([parts["valid"], parts["test"]])]
    )
    assert [len(p) for p in parts.values()] == expected


def test_scaffolds_are_counted_by_molecules():
    """A scaffold is rare if only one molecule has it, however many conformations that has."""
    molecule = np.concatenate([np.repeat([1], 30), np.arange(10, 80)])
    scaffold = np.where(molecule == 1, "rare", "frequent")
    parts = split("scaffold", (70, 0, 30), seed=0, molecule=molecule, scaffold=scaffold)
    assert set(scaffold[parts["test"]]) == {"rare"} and len(parts["train"]) == 70


@pytest.mark.parametrize("seed", range(8))
def test_large_scaffolds_are_not_drawn_for_testing(seed):
    arguments = scaffold_case()
    parts = split("scaffold_random", (0.7, 0.15, 0.15), seed=seed, **arguments)
    assert set(arguments["scaffold"][parts["train"]]) >= {"A", "B"}
    assert 40 <= len(parts["valid"]) <= 80 and 40 <= len(parts["test"]) <= 80


def test_thinned_splits_contain_whole_molecules():
    arguments = scaffold_case()
    for by in ("scaffold", "scaffold_random"):
        parts = split(by, (80, 40, 20), seed=0, **arguments)
        assert [len(p) for p in parts.values()] == [80, 40, 20]
        for indices in parts.values():
            assert (np.unique(arguments["molecule"][indices], return_counts=True)[1] == 4).all()


@pytest.mark.parametrize("counts", [(0.8, 0.1, 0.1), (300, 40, 60), (5000, 1, 1)])
def test_sizes_go_up_from_train_to_test(counts):
    molecule = np.repeat(np.arange(200), 5)
    n_atoms = np.random.default_rng(0).integers(3, 40, 200)[molecule]
    order = np.random.default_rng(1).permutation(1000)
    parts = split("size", counts, seed=0, molecule=molecule[order], n_atoms=n_atoms[order])
    sizes = [n_atoms[order][parts[name]] for name in SPLITS]
    assert sizes[0].max() < sizes[1].min() and sizes[1].max() < sizes[2].min()
    assert sizes[2].max() >= 38  # the largest molecules are included


def test_molecule_with_two_scaffolds_is_rejected():
    molecule, scaffold = np.array(["a", "a", "b", "c", "b"]), np.array(["A", "A", "B", "C", "D"])
    with pytest.raises(
        ValueError, match=r"b has the scaffolds B \(structure 2\) and D \(structure 4\), and 1"
    ):
        split("scaffold", (2, 1, 1), seed=0, molecule=molecule, scaffold=scaffold)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": (5, 1, 1), "by": "scafold"}, "'molecule', 'random', .* received 'scafold'"),
        ({"counts": (0, 1, 1)}, "first at least 1"),
        ({"counts": (5, -1, 1)}, "received"),
        ({"counts": (5, float("nan"), 1)}, "received"),
        ({"counts": (0.8, 10, 10)}, "three integers"),
        ({"counts": (5.5, 2, 2)}, "three integers"),
        ({"counts": (0.8, 0.2, 0.1)}, "their sum is 1.1"),
        ({"counts": (0, 0.5, 0.5)}, "first above 0"),
        ({"counts": (5, 1)}, "three numbers"),
        (
            {"counts": (5, 1, 1)},
            "10 structures of 2 molecules cannot be split by molecule into 3 splits. "
            "Set --config.data.split=random",
        ),
        (
            {"counts": (5, 1, 1), "by": "scaffold"},
            "requires `scaffold` of 10 structures; received nothing",
        ),
        (
            {"counts": (5, 1, 1), "by": "size", "n_atoms": np.ones(3)},
            "`n_atoms` of 10 structures; received 3 values",
        ),
        (
            {"counts": (5, 1, 1), "by": "size", "n_atoms": np.ones(10)},
            "10 structures of 1 size cannot be split by size .*--config.data.split=random",
        ),
        (
            {"counts": (1, 1, 1), "by": "random", "molecule": np.zeros(2)},
            "2 structures .*--config.data.num_test=0",
        ),
        ({"counts": (5, 1, 1), "by": "official", "record": np.arange(10)}, "data.split_files"),
    ],
)
def test_invalid_requests_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        split(**{"by": "molecule", "seed": 0, "molecule": np.repeat(["a", "b"], 5)} | arguments)


def test_auto_splits_by_molecule_if_there_are_enough(caplog):
    """Detects a split by molecule of one molecule, or of a data set that one molecule dominates."""
    caplog.set_level("INFO")
    assert split_choice.choose(np.repeat(np.arange(10), 3)) == "molecule"
    assert "split by molecule: 10 molecules" in caplog.text
    assert split_choice.choose(np.zeros(200)) == "random"
    assert "200 structures of 1 molecule are" in caplog.text
    assert (
        split_choice.choose(np.arange(9))
        == split_choice.choose(np.repeat([0, *range(1, 12)], [30] + [1] * 11))
        == "random"
    )


def test_empty_data_are_rejected():
    with pytest.raises(ValueError, match="no structures to split"):
        split("molecule", (1, 0, 0), seed=0, molecule=np.zeros(0, "U1"))


def official_case(**parts):
    """Ten records of three structures each, without record 9; two records share each molecule."""
    record = np.repeat(np.arange(10), 3)
    return {
        "record": record,
        "molecule": record // 2,
        "official": {name: np.array(numbers) for name, numbers in parts.items()},
    }


def test_official_splits_are_used_completely():
    arguments = official_case(
        train=[4, 0, 1], valid=[2], test=[8, 6, 77]
    )  # record 77 has no structure here
    parts = split("official", (1, 1, 1), seed=0, **arguments)
    assert {name: np.unique(arguments["record"][p]).tolist() for name, p in parts.items()} == {
        "train": [0, 1, 4],
        "valid": [2],
        "test": [6, 8],
    }
    assert [len(p) for p in parts.values()] == [9, 3, 6]


@pytest.mark.parametrize(("test", "unit"), [([8], "molecules"), ([7], "records")])
def test_validation_is_drawn_from_the_official_training_split(caplog, test, unit):
    """Whole molecules are drawn unless the official split has molecules in both train and test."""
    arguments = official_case(train=range(7), test=test)
    with caplog.at_level(logging.WARNING):
        parts = split("official", (12, 6, 5), seed=3, **arguments)
    assert len(parts["valid"]) == 6 and len(parts["train"]) == 15 and len(parts["test"]) == 3
    assert f"drawing 6 structures (whole {unit}) from its training split with seed 3" in caplog.text
    values = arguments["molecule" if unit == "molecules" else "record"]
    assert not set(values[parts["train"]]) & set(values[parts["valid"]])
    other = split("official", (12, 6, 5), seed=4, **arguments)
    assert not np.array_equal(parts["valid"], other["valid"]) and np.array_equal(
        parts["test"], other["test"]
    )


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((21, 0, 5), (21, 0)),
        ((100_000, 50_000, 9), (14, 7)),
        ((0.8, 0.1, 0.1), (19, 2)),
        ((1, 10, 1), (11, 10)),
    ],
)
def test_size_of_the_drawn_validation_split(counts, expected):
    arguments = {
        "record": np.arange(24),
        "molecule": np.zeros(24, int),
        "official": {"train": np.arange(21), "test": [21, 22, 23]},
    }
    parts = split("official", counts, seed=0, **arguments)
    assert (len(parts["train"]), len(parts["valid"])) == expected and len(parts["test"]) == 3


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"train": [0, 1, 2], "test": [2, 1]},
            "2 numbers are in both 'train' and 'test', the first 1",
        ),
        ({"train": [0, -1], "test": [2]}, "'train' has 1 negative numbers, the first -1"),
        ({"train": [0, 3, 3], "test": [2]}, "'train' has 1 repeated numbers, the first 3"),
        ({"train": [0.0, 1.0]}, "list of integers; received float64"),
        ({"train": [[0]]}, "of shape"),
        ({"train": [0], "holdout": [1]}, "has the unknown split 'holdout'"),
        ({"test": [0]}, "lacks 'train'; found 'test'"),
        (
            {"train": [0], "test": [55, 56]},
            "none of the 2 records of the official split 'test' is among the 30",
        ),
        ({"train": [0], "test": [5]}, "'train' of 3 structures is one record"),
    ],
)
def test_invalid_official_splits_are_rejected(parts, message):
    with pytest.raises(ValueError, match=message):
        split("official", (5, 1, 1), seed=0, **official_case(**parts))


def test_check_parts_keeps_the_order_of_the_file():
    assert check_parts({"train": np.array([5, 1], np.uint8)}, "x")["train"].tolist() == [5, 1]


def test_describe():
    molecule = np.array(["a", "a", "b", "c"])
    assert describe(
        {"train": np.array([0, 1, 2]), "valid": np.array([], int), "test": np.array([3])}, molecule
    ) == {
        "train": {"structures": 3, "molecules": 2},
        "valid": {"structures": 0, "molecules": 0},
        "test": {"structures": 1, "molecules": 1},
    }


@settings(max_examples=100, deadline=None)
@given(
    labels=st.lists(st.integers(0, 9), max_size=40),
    dtype=st.sampled_from([np.int32, np.uint64, str]),
)
def test_group_is_the_inverse_of_unique(labels, dtype):
    labels = np.array(labels, dtype)
    number, count = group(labels)
    different, inverse = np.unique(labels, return_inverse=True)
    assert np.array_equal(number, inverse) and count == len(different)


def test_a_drawn_validation_split_leaves_training_structures():
    """Counts of (1, 1000) used to draw all structures of the official training split."""
    arguments = official_case(train=[0, 1, 2], test=[8])
    parts = split("official", (1, 1000, 1), seed=0, **arguments)
    assert len(parts["train"]) and len(parts["valid"])
