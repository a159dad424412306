"""Tests for the principal components of fingerprints."""

import numpy as np
import pytest

from mlip_jax.reports.diversity.fingerprint_map import draw, principal_components, unpack


def test_components_equal_those_of_the_singular_value_decomposition():
    bits = np.random.default_rng(0).integers(0, 2, (40, 64))
    projected, shares = principal_components(bits)
    u, s, _ = np.linalg.svd(bits - bits.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(projected), np.abs(u[:, :2] * s[:2]), atol=1e-8)
    np.testing.assert_allclose(shares, s[:2] ** 2 / (s**2).sum(), atol=1e-12)
    assert (projected[np.abs(projected).argmax(0), [0, 1]] > 0).all()


def test_identical_or_few_molecules():
    projected, shares = principal_components(np.ones((5, 8)))
    assert not projected.any() and not shares.any()
    with pytest.raises(ValueError, match="received 1"):
        principal_components(np.ones((1, 8)))


def test_fingerprints_of_rdkit_are_unpacked():
    Chem = pytest.importorskip("rdkit.Chem")
    from mlip_jax.datasets.molecules.fingerprints import morgan_fingerprint

    fingerprint = morgan_fingerprint(Chem.MolFromSmiles("CCO"))
    rows = unpack([fingerprint.ToBinary()])
    assert rows.shape == (1, 2048) and np.flatnonzero(rows[0]).tolist() == list(
        fingerprint.GetOnBits()
    )
    assert unpack([]).shape == (0, 2048)
    assert len(draw({"a": np.repeat(rows, 3, 0), "b": np.zeros((2, 2048))}).axes) == 1
