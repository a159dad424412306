"""Tests for neighbor lists against brute force and ASE, for cells of any shape."""

import itertools

import ase
import ase.neighborlist
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlip_jax.graphs import neighbors
from mlip_jax.graphs.neighbors import count_edges, long_range_list, neighbor_list

CUTOFF = 3.0


def brute_force(positions, cutoff, cell=None, pbc=None):
    """Return the sorted list of (receiver, sender, shifts) by trying every image."""
    pbc = np.zeros(3, bool) if pbc is None else np.asarray(pbc)
    cell = np.zeros((3, 3)) if cell is None else cell
    if len(positions) == 0:
        return []
    reach = np.zeros(3, int)
    if pbc.any():
        full = neighbors.completed_cell(cell, pbc)
        spread = np.ptp(positions @ np.linalg.inv(full), axis=0)
        reach = np.where(
            pbc, np.ceil(cutoff * np.linalg.norm(np.linalg.inv(full), axis=0) + spread) + 1, 0
        ).astype(int)
    edges = []
    for shift in itertools.product(*(range(-r, r + 1) for r in reach)):
        vectors = positions[None] + np.array(shift) @ cell - positions[:, None]
        for i, j in np.argwhere(np.linalg.norm(vectors, axis=-1) < cutoff):
            if i != j or any(shift):
                edges.append((i, j, *shift))
    return sorted(edges)


def edges_of(nb):
    shifts = np.zeros((len(nb.senders), 3), int) if nb.shifts is None else nb.shifts
    return sorted(
        (i, j, *s) for i, j, s in zip(nb.receivers.tolist(), nb.senders.tolist(), shifts.tolist())
    )


def check_contract(nb, positions, cutoff, cell=None):
    """Assert the order by receiver, and that the halves of pair_order are reverse to each other."""
    vectors = positions[nb.senders] - positions[nb.receivers]
    if nb.shifts is not None:
        vectors = vectors + nb.shifts @ cell
    assert (np.linalg.norm(vectors, axis=1) < cutoff).all()
    assert (np.diff(nb.receivers) >= 0).all()
    np.testing.assert_array_equal(np.sort(nb.pair_order), np.arange(len(nb.senders)))
    forward, backward = np.split(nb.pair_order, 2)
    np.testing.assert_array_equal(nb.senders[forward], nb.receivers[backward])
    np.testing.assert_array_equal(nb.receivers[forward], nb.senders[backward])
    np.testing.assert_allclose(vectors[forward], -vectors[backward], atol=1e-9)
    if nb.shifts is not None:
        np.testing.assert_array_equal(nb.shifts[forward], -nb.shifts[backward])
    assert nb.senders.dtype == nb.receivers.dtype == nb.pair_order.dtype == np.int32


def well_separated(positions, cutoff, cell=None, pbc=None):
    """Return whether rounding cannot decide about any pair at the cutoff."""
    return edges_count(positions, cutoff - 1e-6, cell, pbc) == edges_count(
        positions, cutoff + 1e-6, cell, pbc
    )


def edges_count(*args):
    return len(brute_force(*args))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 12), seed=st.integers(0, 10_000), size=st.floats(0.5, 12.0))
def test_open_against_brute_force(n, seed, size):
    positions = np.random.default_rng(seed).uniform(-size, size, (n, 3))
    nb = neighbor_list(positions, CUTOFF)
    assert nb.shifts is None
    assert edges_of(nb) == brute_force(positions, CUTOFF)
    assert count_edges(positions, CUTOFF) == len(nb.senders)
    check_contract(nb, positions, CUTOFF)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 60), seed=st.integers(0, 10_000))
def test_dense_and_tree_agree(n, seed):
    positions = np.random.default_rng(seed).uniform(0, 6.0, (n, 3))
    for a, b in zip(
        neighbors.dense_list(positions, CUTOFF), neighbors.tree_list(positions, CUTOFF)
    ):
        np.testing.assert_array_equal(a, b)


def test_many_atoms_use_the_tree_and_count_the_same():
    n = neighbors.DENSE_LIMIT
    positions = np.random.default_rng(0).uniform(0, 14.0, (n + 1, 3))
    nb = neighbor_list(positions, CUTOFF)
    dense = neighbors.dense_list(positions, CUTOFF)
    for a, b in zip(nb, dense):
        np.testing.assert_array_equal(a, b)
    assert count_edges(positions, CUTOFF) == len(nb.senders)
    check_contract(nb, positions, CUTOFF)


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_few_atoms(n):
    """No atom, all atoms and a chain within the cutoff: each edge has its reverse."""
    for spacing in (0.7 * CUTOFF, 2 * CUTOFF):
        positions = np.arange(n)[:, None] * np.array([spacing, 0.0, 0.0])
        nb = neighbor_list(positions, CUTOFF)
        edges = 2 * max(n - 1, 0) if spacing < CUTOFF else 0
        assert len(nb.senders) == edges == count_edges(positions, CUTOFF)
        assert nb.pair_order.shape == (edges,) and nb.shifts is None
        assert edges_of(nb) == brute_force(positions, CUTOFF)
        check_contract(nb, positions, CUTOFF)


@pytest.mark.parametrize("path", [neighbors.dense_list, neighbors.tree_list])
def test_two_atoms_at_one_position_are_neighbors(path):
    positions = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    nb = path(positions, CUTOFF)
    assert edges_of(nb) == brute_force(positions, CUTOFF)
    assert (0, 2, 0, 0, 0) in edges_of(nb) and not (nb.senders == nb.receivers).any()
    check_contract(nb, positions, CUTOFF)
    assert count_edges(positions, CUTOFF) == len(nb.senders) == 6


@pytest.mark.parametrize("extra", [0, 1])
def test_both_sides_of_the_limit_of_the_dense_path(extra, monkeypatch):
    """The last size of the matrix and the first of the k-d tree, each by its own path."""
    n = neighbors.DENSE_LIMIT + extra
    positions = np.random.default_rng(n).uniform(0, 12.0, (n, 3))
    positions[-1] = positions[0]
    used = []
    for name in ("dense_list", "tree_list"):
        path = getattr(neighbors, name)
        monkeypatch.setattr(
            neighbors, name, lambda *a, name=name, path=path: (used.append(name), path(*a))[1]
        )
    nb = neighbor_list(positions, CUTOFF)
    assert used == ["tree_list" if extra else "dense_list"]
    assert edges_of(nb) == brute_force(positions, CUTOFF)
    assert count_edges(positions, CUTOFF) == len(nb.senders)
    check_contract(nb, positions, CUTOFF)


def test_alternating_sizes_are_independent():
    """More sizes than cached tables, and the same size again with other positions."""
    rng = np.random.default_rng(0)
    for n in (*range(1, 80), 5, 79, 5, 1, 0):
        positions = rng.uniform(0, 5.0, (n, 3))
        nb = neighbor_list(positions, CUTOFF)
        assert len(nb.senders) == len(brute_force(positions, CUTOFF))
        check_contract(nb, positions, CUTOFF)


def test_a_grid_exactly_at_the_cutoff_is_excluded_on_both_paths():
    grid = np.array(list(itertools.product(range(4), repeat=3)), float)
    for path in (neighbors.dense_list, neighbors.tree_list):
        nb = path(grid, 1.0)
        assert not len(nb.senders)
        assert len(path(grid, 1.0 + 1e-9).senders) == 2 * 3 * 4 * 4 * 3


@st.composite
def crystals(draw):
    """Draw (positions, cell, pbc): cells smaller and larger than the cutoff, atoms also outside of
    them.
    """
    rng = np.random.default_rng(draw(st.integers(0, 100_000)))
    lengths = np.array([draw(st.floats(1.8, 8.0)) for _ in range(3)])
    skew = draw(st.floats(0.0, 0.6))
    cell = np.diag(lengths) + skew * rng.uniform(-1, 1, (3, 3)) * lengths[:, None]
    if abs(np.linalg.det(cell)) < 0.3 * lengths.prod():
        cell = np.diag(lengths)
    pbc = np.array(
        draw(st.sampled_from([c for c in itertools.product([False, True], repeat=3) if any(c)]))
    )
    spread = draw(st.sampled_from([1.0, 2.5]))
    positions = rng.uniform(-spread, spread, (draw(st.integers(1, 5)), 3)) @ cell
    return positions, cell, pbc


@settings(max_examples=60, deadline=None)
@given(crystal=crystals())
@example(crystal=(np.zeros((1, 3)), 2.0 * np.eye(3), np.ones(3, bool)))
@example(
    crystal=(
        np.array([[50.0, -31.0, 7.0], [0.0, 0.0, 0.0]]),
        np.diag([2.1, 3.3, 9.0]),
        np.array([True, False, True]),
    )
)
def test_periodic_against_brute_force_and_ase(crystal):
    positions, cell, pbc = crystal
    if not well_separated(positions, CUTOFF, cell, pbc):
        return
    nb = neighbor_list(positions, CUTOFF, cell, pbc)
    assert edges_of(nb) == brute_force(positions, CUTOFF, cell, pbc)
    check_contract(nb, positions, CUTOFF, cell)
    assert count_edges(positions, CUTOFF, cell, pbc) == len(nb.senders)
    atoms = ase.Atoms(numbers=np.ones(len(positions)), positions=positions, cell=cell, pbc=pbc)
    i, j, shifts = ase.neighborlist.neighbor_list("ijS", atoms, CUTOFF)
    assert edges_of(nb) == sorted(
        (a, b, *s) for a, b, s in zip(i.tolist(), j.tolist(), shifts.tolist())
    )


def test_an_atom_sees_its_own_images():
    nb = neighbor_list(np.zeros((1, 3)), 2.5, 2.0 * np.eye(3), np.ones(3, bool))
    assert len(nb.senders) == 6
    nb = neighbor_list(np.zeros((1, 3)), 2.5, 2.0 * np.eye(3), np.array([True, False, False]))
    assert sorted(nb.shifts.tolist()) == [[-1, 0, 0], [1, 0, 0]]


def test_cell_without_vectors_where_it_is_not_periodic():
    cell = np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    positions = np.array([[0.0, 0.0, 0.0], [0.5, 1.0, -1.0]])
    nb = neighbor_list(positions, 2.2, cell, np.array([True, False, False]))
    assert edges_of(nb) == brute_force(positions, 2.2, cell, np.array([True, False, False]))
    check_contract(nb, positions, 2.2, cell)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("periodic", [False, True])
def test_positions_must_be_finite(bad, periodic):
    positions = np.zeros((3, 3))
    positions[1, 2] = bad
    cell, pbc = (np.eye(3) * 5, np.ones(3, bool)) if periodic else (None, None)
    with pytest.raises(ValueError, match="NaN or infinite"):
        neighbor_list(positions, CUTOFF, cell, pbc)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (np.diag([5.0, 0.0, 5.0]), "no lattice vector"),
        (np.full((3, 3), np.nan), "must be finite"),
        (np.eye(2), "must be finite"),
    ],
)
def test_invalid_cells_are_rejected(cell, message):
    with pytest.raises(ValueError, match=message):
        neighbor_list(np.zeros((1, 3)), CUTOFF, cell, np.ones(3, bool))


def pairs_once(positions, cutoff, cell=None, pbc=None):
    """Return the smaller of each directed edge of brute force and its reverse."""
    edges = brute_force(positions, cutoff, cell, pbc)
    return sorted({min((i, j, *s), (j, i, *(-k for k in s))) for i, j, *s in edges})


def check_long_range(positions, cutoff, cell=None, pbc=None):
    receivers, senders, shifts = listed = long_range_list(positions, cutoff, cell, pbc)
    assert (shifts is None) == (pbc is None or not np.any(pbc))
    rows = np.zeros((len(senders), 3), int) if shifts is None else shifts
    listed_pairs = [
        min((i, j, *s), (j, i, *(-k for k in s)))
        for i, j, s in zip(receivers.tolist(), senders.tolist(), map(tuple, rows.tolist()))
    ]
    assert sorted(listed_pairs) == pairs_once(positions, cutoff, cell, pbc)
    assert (np.diff(receivers) >= 0).all()
    assert all(a is None or a.dtype == np.int32 for a in listed)
    assert 2 * len(receivers) == count_edges(positions, cutoff, cell, pbc)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 12), seed=st.integers(0, 10_000), size=st.floats(0.5, 12.0))
def test_long_range_pairs_against_brute_force(n, seed, size):
    check_long_range(np.random.default_rng(seed).uniform(-size, size, (n, 3)), CUTOFF)


@settings(max_examples=60, deadline=None)
@given(crystal=crystals())
@example(crystal=(np.zeros((1, 3)), 2.0 * np.eye(3), np.ones(3, bool)))
@example(
    crystal=(
        np.array([[7.9, 0.1, -5.0], [0.3, 0.0, 0.0], [4.1, 9.0, 2.0]]),
        1.9 * np.eye(3),
        np.array([True, False, True]),
    )
)
def test_periodic_long_range_pairs_against_brute_force(crystal):
    positions, cell, pbc = crystal
    if well_separated(positions, CUTOFF, cell, pbc):
        check_long_range(positions, CUTOFF, cell, pbc)


def test_an_atom_and_its_own_image_are_one_pair():
    receivers, senders, shifts = long_range_list(
        np.zeros((1, 3)), 2.5, 2.0 * np.eye(3), np.ones(3, bool)
    )
    assert receivers.tolist() == senders.tolist() == [0, 0, 0]
    assert len({tuple(s) for s in np.concatenate([shifts, -shifts]).tolist()}) == 6


def test_distances_exactly_at_the_cutoff_keep_both_directions():
    """A cubic cell as long as the cutoff: rounding must treat both directions of a pair alike."""
    cutoff, rng = 3.3, np.random.default_rng(0)
    for _ in range(50):
        cell, positions = cutoff * np.eye(3), rng.uniform(-9, 9, (2, 3))
        nb = neighbor_list(positions, cutoff, cell, np.ones(3, bool))
        order, middle = nb.pair_order, len(nb.pair_order) // 2
        forward, backward = order[:middle], order[middle:]
        np.testing.assert_array_equal(nb.senders[forward], nb.receivers[backward])
        np.testing.assert_array_equal(nb.shifts[forward], -nb.shifts[backward])
        assert 2 * len(long_range_list(positions, cutoff, cell, np.ones(3, bool))[0]) == len(
            nb.senders
        )


@pytest.mark.parametrize("n", [0, 1, 2, 7, neighbors.DENSE_LIMIT, neighbors.DENSE_LIMIT + 1])
def test_without_a_cutoff_all_pairs_are_listed(n):
    receivers, senders, shifts = long_range_list(np.zeros((n, 3)), np.inf)
    expected = np.triu_indices(n, 1)
    np.testing.assert_array_equal(receivers, expected[0])
    np.testing.assert_array_equal(senders, expected[1])
    assert shifts is None and receivers.dtype == senders.dtype == np.int32


def test_blocks_of_the_matrix_and_the_tree_agree(monkeypatch):
    positions = np.random.default_rng(1).uniform(0, 8.0, (97, 3))
    tree = neighbors.tree_pairs(positions, CUTOFF)
    for block in (1, 200, 97 * 96, 1 << 18):
        monkeypatch.setattr(neighbors, "BLOCK", block)
        for path in (neighbors.dense_pairs, neighbors.select_close_pairs):
            for a, b in zip(path(positions, CUTOFF), tree):
                np.testing.assert_array_equal(a, b)
    for name in ("DENSE_LIMIT", "TREE_LIMIT"):
        monkeypatch.setattr(neighbors, name, 50)
        check_long_range(positions, CUTOFF)


def test_invalid_long_range_lists_are_rejected():
    with pytest.raises(ValueError, match="infinitely many pairs.*cutoff must be finite"):
        long_range_list(np.zeros((2, 3)), np.inf, np.eye(3), np.array([False, True, False]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        long_range_list(np.full((2, 3), np.nan), CUTOFF)
    assert len(long_range_list(np.eye(3), np.inf, None, np.zeros(3, bool))[0]) == 3
