"""Tests for distances, alignment and fingerprints against plain implementations."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from scipy.spatial.transform import Rotation

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality import geometry
from mlip_jax.structure import Structure


def columns_of(positions, **fields):
    return Columns.from_structures(
        Structure(np.full(len(p), 6, np.int32), np.asarray(p, float), **fields) for p in positions
    )


def brute_periodic(positions, cell, pbc, reach=6):
    """Return the shortest distance over many images, without wrapping."""
    shifts = np.array(
        list(itertools.product(*[range(-reach, reach + 1) if p else (0,) for p in pbc]))
    )
    best = np.inf
    for shift in shifts:
        d = np.linalg.norm(positions[:, None] + shift @ cell - positions, axis=-1)
        if not shift.any():
            np.fill_diagonal(d, np.inf)
        best = min(best, d.min())
    return best


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    scale=st.sampled_from([0.1, 2.0, 30.0]),
    seed=st.integers(0, 999),
)
def test_shortest_distance_is_the_minimum_over_all_pairs(sizes, scale, seed):
    rng = np.random.default_rng(seed)
    positions = [rng.normal(size=(n, 3)) * scale + rng.normal(size=3) * 100 for n in sizes]
    actual = geometry.shortest_distances(columns_of(positions))
    for d, p in zip(actual, positions):
        assert d == np.inf if len(p) < 2 else abs(d**2 - pdist(p).min() ** 2) < 3e-4


@pytest.mark.parametrize(
    ("n", "size"), [(300, 20.0), (200, 900.0)]
)  # many atoms; few, spread too far for float32
def test_shortest_distance_of_large_structures(n, size):
    positions = np.random.default_rng(1).random((n, 3)) * size
    assert geometry.shortest_distances(columns_of([positions, positions[:50]]))[0] == pytest.approx(
        pdist(positions).min(), rel=1e-12
    )


def test_coinciding_atoms_and_positions_that_are_not_finite():
    good = np.random.default_rng(0).normal(size=(5, 3)) * 3
    twice, bad, all_bad = np.concatenate([good, good[:1]]), good.copy(), np.full((5, 3), np.nan)
    bad[2, 1] = np.nan
    lone = np.array([[np.inf, 0, 0]])
    actual = geometry.shortest_distances(columns_of([good, twice, bad, all_bad, lone]))
    assert actual[0] == pytest.approx(pdist(good).min()) and actual[1] == 0.0
    assert np.isnan(actual[2:]).all()


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 6),
    pbc=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any),
    skew=st.floats(-1.2, 1.2),
    seed=st.integers(0, 999),
)
def test_periodic_shortest_distance(n, pbc, skew, seed):
    rng = np.random.default_rng(seed)
    cell = np.diag(rng.uniform(2.0, 5.0, 3))
    cell[1, 0], cell[2, 0], cell[2, 1] = skew * cell[0, 0], rng.uniform(-1, 1), skew
    positions = rng.normal(size=(n, 3)) * 4
    actual = geometry.shortest_periodic(positions, cell, np.array(pbc))
    assert actual == pytest.approx(brute_periodic(positions, cell, pbc, reach=9), abs=1e-9)
    columns = columns_of([positions], cell=cell, pbc=np.array(pbc))
    assert geometry.shortest_distances(columns)[0] == actual


def test_images_of_the_same_atom_in_a_tiny_cell():
    """The shortest lattice vector of a skewed cell need not be one of its three vectors."""
    cell = np.array([[3.0, 0, 0], [2.9, 0.5, 0], [0, 0, 9.0]])
    actual = geometry.shortest_periodic(np.zeros((1, 3)), cell, np.ones(3, bool))
    assert actual == pytest.approx(np.hypot(0.1, 0.5))


def test_open_and_periodic_structures_in_one_block():
    p = np.array([[0.0, 0, 0], [4.0, 0, 0]])
    structures = [
        Structure(np.array([6, 6]), p),
        Structure(np.array([6, 6]), p, cell=np.eye(3) * 5, pbc=np.array([True, False, False])),
    ]
    np.testing.assert_allclose(
        geometry.shortest_distances(Columns.from_structures(structures)), [4.0, 1.0]
    )


def test_degenerate_cell_gives_nan():
    assert np.isnan(
        geometry.shortest_periodic(np.zeros((2, 3)), np.zeros((3, 3)), np.ones(3, bool))
    )


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 12), m=st.integers(1, 5), seed=st.integers(0, 999))
def test_alignment_undoes_a_rotation(n, m, seed):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(m, n, 3))
    turn = Rotation.random(m, random_state=seed).as_matrix()
    b = a @ turn + rng.normal(size=(m, 1, 3))
    rotation = geometry.kabsch_align(a, b)
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0)
    np.testing.assert_allclose(
        rotation @ rotation.transpose(0, 2, 1), np.tile(np.eye(3), (m, 1, 1)), atol=1e-12
    )
    np.testing.assert_allclose(
        (b - b.mean(1, keepdims=True)) @ rotation, a - a.mean(1, keepdims=True), atol=1e-9
    )


def test_alignment_is_optimal_and_never_a_reflection():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(20, 7, 3)), rng.normal(size=(20, 7, 3))
    b[0] = a[0] * [1, 1, -1]
    rotation = geometry.kabsch_align(a, b)
    for x, y, r in zip(a, b, rotation):
        x, y = x - x.mean(0), y - y.mean(0)
        best, rssd = Rotation.align_vectors(x, y)
        assert np.linalg.norm(y @ r - x) == pytest.approx(rssd)
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0)


def make_block(seed=0, sizes=(3, 1, 8, 8, 20)):
    rng = np.random.default_rng(seed)
    return Columns.from_structures(
        Structure(
            rng.integers(1, 9, n).astype(np.int32),
            rng.normal(size=(n, 3)) * 3,
            cell=np.eye(3) * 20 if k % 2 else None,
            pbc=np.ones(3, bool) if k % 2 else None,
        )
        for k, n in enumerate(sizes)
    )


def test_fingerprints_equal_recorded_values():
    """Fingerprints are stored, so they must not change. Positions are multiples of 1/1024."""
    p = np.arange(12).reshape(4, 3) / 1024
    columns = Columns.from_structures(
        [Structure(np.array([6, 1, 1, 8], np.int32), p), Structure(np.array([1], np.int32), p[:1])]
    )
    assert [hex(f) for f in geometry.fingerprints(columns)] == [
        "0xf1c8a52bd938d9ea",
        "0xce3f4fe162dc00c8",
    ]


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(5)), chunk=st.integers(1, 40))
def test_fingerprints_depend_only_on_the_structure(order, chunk):
    columns = make_block()
    whole = geometry.fingerprints(columns)
    np.testing.assert_array_equal(
        geometry.fingerprints(columns.take(np.array(order))), whole[order]
    )
    alone = [geometry.fingerprints(columns.take([s]))[0] for s in range(5)]
    np.testing.assert_array_equal(alone, whole)
    assert [
        c for s, _, _ in geometry.chunks(columns, chunk) for c in range(s.start, s.stop)
    ] == list(range(5))


@pytest.mark.parametrize("change", ["position", "element", "cell", "pbc", "swap"])
def test_fingerprints_detect_every_change(change):
    columns = make_block()
    whole = geometry.fingerprints(columns)
    p, z, cell, pbc = (getattr(columns, k).copy() for k in ("positions", "numbers", "cell", "pbc"))
    atom = int(columns.offsets[3]) + 2
    if change == "position":
        p[atom, 1] += 2e-4
    elif change == "element":
        z[atom] += 1
    elif change == "cell":
        cell[3, 0, 1] += 0.01
    elif change == "pbc":
        pbc[3, 2] = False
    else:
        p[[atom, atom + 1]], z[[atom, atom + 1]] = p[[atom + 1, atom]], z[[atom + 1, atom]]
    changed = dataclasses.replace(columns, positions=p, numbers=z, cell=cell, pbc=pbc)
    assert np.flatnonzero(geometry.fingerprints(changed) != whole).tolist() == [3]


def test_fingerprints_ignore_changes_below_the_rounding():
    columns = make_block()
    rounded = dataclasses.replace(columns, positions=np.round(columns.positions, 4))
    moved = dataclasses.replace(columns, positions=rounded.positions + 3e-5)
    np.testing.assert_array_equal(geometry.fingerprints(rounded), geometry.fingerprints(moved))
    zero = [columns_of([[[z, 0, 0]]]) for z in (0.0, -0.0, -1e-9)]
    assert len({int(geometry.fingerprints(c)[0]) for c in zero}) == 1
    bad = columns_of([[[np.nan, 0, 0]], [[np.inf, 0, 0]], [[1e300, 0, 0]]])
    assert len(geometry.fingerprints(bad)) == 3  # no warning, no undefined cast


def test_fingerprints_of_many_differ():
    grid = np.array(list(itertools.product(range(30), repeat=3))) * 1e-4
    actual = geometry.fingerprints(columns_of([[p, [1.0, 2, 3]] for p in grid]))
    assert len(np.unique(actual)) == len(grid)


def test_empty_input_gives_empty_output():
    columns = columns_of([])
    assert (
        geometry.shortest_distances(columns).shape == geometry.fingerprints(columns).shape == (0,)
    )


def test_sums_of_segments_with_empty_ones():
    values = np.arange(12.0).reshape(6, 2)
    actual = geometry.segment_sum(values, np.array([0, 0, 2, 6]))
    np.testing.assert_array_equal(actual, [[0, 0], values[:2].sum(0), values[2:].sum(0), [0, 0]])
    assert geometry.segment_sum(np.zeros((0, 3)), np.array([0, 0])).tolist() == [[0, 0, 0]] * 2


@given(st.integers(0, 2**20), st.integers(2, 9))
@settings(max_examples=40)
def test_superpose_minimizes_the_distance(seed, size):
    rng = np.random.default_rng(seed)
    points, target = rng.normal(size=(size, 3)), rng.normal(size=(size, 3))
    actual = geometry.superpose(points, target)
    np.testing.assert_allclose(actual.mean(0), target.mean(0), atol=1e-9)
    turn, error = Rotation.align_vectors(target - target.mean(0), points - points.mean(0))
    assert np.sqrt(((actual - target) ** 2).sum()) == pytest.approx(error, abs=1e-6)
    # a rotation: distances stay
    np.testing.assert_allclose(
        np.linalg.norm(actual - actual[0], axis=1),
        np.linalg.norm(points - points[0], axis=1),
        atol=1e-9,
    )
