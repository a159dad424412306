"""Tests for the uncertainty of structures and for the error that is expected from it."""

import numpy as np
import pytest

from mlip_jax.datasets.columns import Columns
from mlip_jax.label_budget.uncertainty import (
    ErrorScale,
    Prediction,
    Uncertainty,
    force_errors,
    leverage,
)
from mlip_jax.structure import Structure


def test_leverage_is_that_of_a_linear_fit():
    """Detects a missing inverse or root: compared with f^T (F^T F / N)^-1 f of NumPy."""
    rng = np.random.default_rng(0)
    known, new = rng.normal(size=(200, 4)) * [1, 2, 3, 4], rng.normal(size=(5, 4))
    inverse = np.linalg.inv(known.T @ known / len(known))
    expected = np.sqrt(np.einsum("ai,ij,aj->a", new, inverse, new))
    np.testing.assert_allclose(leverage(known, new), expected, rtol=0.02)
    assert leverage(known, 10 * new) == pytest.approx(10 * leverage(known, new))


def test_leverage_is_finite_for_features_that_never_vary():
    known = np.ones((10, 3))
    assert np.isfinite(leverage(known, np.array([[1.0, 1, 1], [1, 2, 3]]))).all()


def test_the_expected_error_has_the_true_mean_over_the_atoms():
    """Detects a mean over structures in place of atoms, and a floor that shifts the mean."""
    rng = np.random.default_rng(1)
    uncertainty, n_atoms = rng.uniform(0, 1, 300), rng.integers(3, 40, 300)
    errors = 0.3 * uncertainty * rng.uniform(0.5, 1.5, 300)
    errors[0] = np.nan  # a structure without a label
    scale = ErrorScale.fit(errors, uncertainty, n_atoms)
    expected = scale.expected(uncertainty)
    assert (expected * n_atoms)[1:].sum() == pytest.approx((errors * n_atoms)[1:].sum())
    assert expected.min() == pytest.approx(scale.factor * np.quantile(uncertainty[1:], 0.1))


def test_spread_and_errors_are_means_over_the_atoms_of_a_structure():
    columns = Columns.from_structures(
        Structure(np.ones(n, np.int32), np.zeros((n, 3)), forces=np.zeros((n, 3)), energy=0.0)
        for n in (1, 2)
    )
    forces = np.zeros((2, 3, 3))
    forces[1, 1] = 2.0  # one of two members, the first atom of the second structure
    spread = Uncertainty("ensemble", (), columns).of(columns, Prediction(np.zeros((2, 2)), forces))
    np.testing.assert_allclose(spread, [0, 2**0.5 / 2])
    np.testing.assert_allclose(force_errors(columns, forces.mean(0)), [0, 0.5])
