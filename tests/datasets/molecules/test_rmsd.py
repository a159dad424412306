"""Tests for RMSDs after superposition against the singular value decomposition."""

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlip_jax.datasets.molecules.rmsd import Conformers, cross_rmsd, nearest_rmsd
from mlip_jax.datasets.quality.geometry import kabsch_align


def rotation(rng):
    q = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return q * np.sign(np.linalg.det(q))


def by_svd(test, train):
    a, b = (
        x - x.mean(1, keepdims=True)
        for x in (np.repeat(test, len(train), 0), np.tile(train, (len(test), 1, 1)))
    )
    return np.sqrt(((a - b @ kabsch_align(a, b)) ** 2).sum((1, 2)) / a.shape[1]).reshape(
        len(test), len(train)
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 30),
    num_test=st.integers(1, 4),
    num_train=st.integers(1, 4),
    spread=st.sampled_from([0.0, 1e-3, 0.1, 2.0]),
    flat=st.integers(0, 3),
)
@example(seed=21, n=3, num_test=1, num_train=1, spread=0.1, flat=1)  # three atoms nearly in line
def test_equals_singular_value_decomposition(seed, n, num_test, num_train, spread, flat):
    """Similar and different conformers, also planar and linear molecules and single atoms."""
    rng = np.random.default_rng(seed)
    molecule = rng.normal(size=(1, n, 3)) * 3
    test, train = (molecule + spread * rng.normal(size=(m, n, 3)) for m in (num_test, num_train))
    test[..., :flat], train[..., :flat] = 0.0, 0.0
    train = train @ rotation(rng) + rng.normal(size=3) * 20
    expected = by_svd(test, train)
    np.testing.assert_allclose(
        cross_rmsd(Conformers(test, train), dtype=np.float64), expected, atol=1e-7
    )
    # In single precision, the mean square deviation has rounding errors of the mean square size.
    size = (train - train.mean(1, keepdims=True)).var(1).sum(-1).max()
    np.testing.assert_allclose(
        cross_rmsd(Conformers(test, train)) ** 2, expected**2, rtol=1e-5, atol=1e-6 * size
    )


def test_mirror_images_are_not_superposed():
    rng = np.random.default_rng(0)
    molecule = rng.normal(size=(1, 12, 3)) * 2
    mirrored = (molecule * [1, 1, -1]) @ rotation(rng)
    actual = cross_rmsd(Conformers(molecule, mirrored), dtype=np.float64)
    np.testing.assert_allclose(actual, by_svd(molecule, mirrored), atol=1e-10)
    assert actual[0, 0] > 0.5
    flat = molecule * [1, 1, 0]  # which is its own mirror image
    assert cross_rmsd(Conformers(flat, flat * [-1, 1, 1]), dtype=np.float64)[0, 0] < 1e-7


def test_minimum_over_permutations():
    rng = np.random.default_rng(1)
    train = rng.normal(size=(3, 7, 3)) * 2
    orders = np.array([rng.permutation(7) for _ in range(5)] + [np.arange(7)])
    test = (train[:2, orders[3]] + 0.01 * rng.normal(size=(2, 7, 3))) @ rotation(rng)
    actual = cross_rmsd(Conformers(test, train, orders), dtype=np.float64)
    expected = np.min([by_svd(test, train[:, order]) for order in orders], 0)
    np.testing.assert_allclose(actual, expected, atol=1e-10)
    assert (np.diag(actual) < 0.05).all()


def test_molecules_of_all_sizes_keep_their_order():
    """There are more pairs than one program takes, so they are processed in several calls."""
    rng = np.random.default_rng(2)
    molecules = [
        Conformers(rng.normal(size=(t, n, 3)), rng.normal(size=(r, n, 3)))
        for t, r, n in zip(
            rng.integers(0, 60, 80), rng.integers(1, 60, 80), rng.integers(1, 30, 80)
        )
    ]
    actual = list(nearest_rmsd(iter(molecules)))
    assert len(actual) == 80 and sum(len(m.test) * len(m.train) for m in molecules) > 65_536
    for molecule, nearest in zip(molecules, actual):
        assert nearest.shape == (len(molecule.test),) and nearest.dtype == np.float64
        if len(molecule.test):
            np.testing.assert_allclose(
                nearest, by_svd(molecule.test, molecule.train).min(1), atol=1e-5
            )


def test_molecule_with_more_pairs_than_a_batch(monkeypatch):
    from mlip_jax.datasets.molecules import rmsd

    rng = np.random.default_rng(4)
    test, train = rng.normal(size=(7, 9, 3)), rng.normal(size=(5, 9, 3))
    molecule = Conformers(
        test, train, np.array([np.arange(9), *(rng.permutation(9) for _ in range(5))])
    )
    cross, small = cross_rmsd(molecule), Conformers(test[:2], train)
    for ahead in (1, 4, 13, 70):
        monkeypatch.setattr(rmsd, "_AHEAD", ahead)
        np.testing.assert_allclose(cross_rmsd(molecule), cross, atol=1e-6)
        several = list(nearest_rmsd([small, molecule, small]))
        np.testing.assert_allclose(several[1], cross.min(1), atol=1e-6)
        np.testing.assert_allclose(several[0], several[2], atol=1e-6)


def test_no_training_conformers_and_no_atoms():
    assert next(nearest_rmsd([Conformers(np.zeros((2, 4, 3)), np.zeros((0, 4, 3)))])).tolist() == [
        np.inf,
        np.inf,
    ]
    assert np.isnan(
        next(nearest_rmsd([Conformers(np.zeros((2, 0, 3)), np.zeros((1, 0, 3)))]))
    ).all()
    assert list(nearest_rmsd([])) == []


@pytest.mark.parametrize(
    "test, train, orders, message",
    [
        ((2, 4, 3), (2, 5, 3), None, r"received \(2, 4, 3\) and \(2, 5, 3\)"),
        ((4, 3), (4, 3), None, "expected conformers"),
        ((2, 4, 3), (2, 4, 3), (2, 3), r"permutations of shape \(Q, 4\)"),
        ((2, 4, 3), (2, 4, 3), (0, 4), "Q at least 1"),
    ],
)
def test_invalid_shapes_are_rejected(test, train, orders, message):
    orders = None if orders is None else np.zeros(orders, int)
    with pytest.raises(ValueError, match=message):
        cross_rmsd(Conformers(np.zeros(test), np.zeros(train), orders))


@pytest.mark.slow
def test_speed_of_a_million_pairs():
    """Molecules with 25 heavy atoms and 16 training conformers, as in a typical study."""
    rng = np.random.default_rng(0)
    molecules = [
        Conformers(rng.normal(size=(4, 25, 3)), rng.normal(size=(16, 25, 3))) for _ in range(15_625)
    ]
    list(nearest_rmsd(molecules[:300]))  # compiles
    start = time.process_time()
    assert sum(map(len, nearest_rmsd(molecules))) == 62_500
    assert time.process_time() - start < 60
