"""Tests for the domain: distances, border, expected errors, and round trips."""

import numpy as np
import pytest

from mlip_jax.checkpoint import CheckpointError
from mlip_jax.simulation.trust.domain import Domain


def fitted_domain(scale=1.0):
    rng = np.random.default_rng(0)
    train, valid = scale * rng.normal(size=(400, 6)), scale * rng.normal(size=(200, 6))
    far = np.linalg.norm(valid, axis=1) / scale
    return Domain.fit(train, valid, {"gap": 0.1 * far + 0.01 * rng.random(200)}), train, valid, far


def test_distance_is_to_the_nearest_samples():
    domain, train, valid, _ = fitted_domain()
    apart = np.linalg.norm((valid[:7, None] - train[None]) / train.std(0), axis=-1)
    np.testing.assert_allclose(
        domain.distance(valid[:7]), np.sort(apart, axis=1)[:, :5].mean(1), rtol=1e-4
    )


def test_distances_have_no_unit():
    np.testing.assert_allclose(fitted_domain(1e-4)[0].border, fitted_domain()[0].border, rtol=1e-4)


def test_far_molecules_are_outside_and_have_no_expected_error():
    domain, train, valid, _ = fitted_domain()
    distance = domain.distance(np.concatenate([valid, 20 + valid]))
    outside = domain.outside(distance)
    assert outside[:200].mean() == pytest.approx(0.01, abs=0.006) and outside[200:].all()
    expected = domain.expected_error("gap", distance)
    assert (np.diff(expected[~outside][np.argsort(distance[~outside])]) >= 0).all()
    assert np.nanmax(expected) > np.nanmin(expected)
    # no validation molecules are as far away, so that a number would be too small
    assert (np.isnan(expected) == outside).all()


def test_samples_nearer_than_all_of_validation_have_an_expected_error():
    # All smallest distances are equal, so the first edge of the bins is one of them.
    valid = np.concatenate([np.full((20, 1), 0.5), np.linspace(2, 3, 20)[:, None]])
    domain = Domain.fit(np.array([[-1.0], [1.0]] * 5), valid, {"gap": np.full(40, 0.1)})
    near = domain.distance(np.array([[1.0]]))
    assert near < domain.distance(valid).min()
    assert domain.expected_error("gap", near) == pytest.approx(0.1)


def test_round_trip(tmp_path):
    domain, _, valid, _ = fitted_domain()
    domain.save(tmp_path / "domain.npz")
    again = Domain.load(tmp_path / "domain.npz")
    distance = domain.distance(valid)
    np.testing.assert_array_equal(again.distance(valid), distance)
    np.testing.assert_array_equal(
        again.expected_error("gap", distance), domain.expected_error("gap", distance)
    )
    assert again.border == domain.border


def test_few_or_no_molecules(tmp_path):
    few = Domain.fit(np.eye(3)[:2], np.eye(3)[2:], {"gap": np.array([0.3])})
    np.testing.assert_equal(few.expected_error("gap", np.array([0.0, np.inf])), [0.3, np.nan])
    with pytest.raises(ValueError, match="needs training and validation molecules"):
        Domain.fit(np.eye(3), np.zeros((0, 3)), {})
    with pytest.raises(CheckpointError, match="no such file"):
        Domain.load(tmp_path / "domain.npz")


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:200] + b"x" * 50 + b[250:]]
)
def test_a_corrupted_file_is_reported(tmp_path, damage):
    path = tmp_path / "domain.npz"
    fitted_domain()[0].save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="domain.npz: corrupted .*Remove it"):
        Domain.load(path)
