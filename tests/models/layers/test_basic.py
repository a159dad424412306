"""Tests for radial bases with given constants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.models.layers.basic import exponential_cutoff, radial_basis
from mlip_jax.models.layers.euclidean_variables import orthonormal_harmonics
from mlip_jax.models.layers.tensor_products.couplings import spherical_harmonics

CUTOFF, NUM = 4.0, 6
DISTANCES = np.array([0.0, 0.7, 2.3, 3.9])


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        (
            "gaussian",
            {"centers": np.linspace(0, CUTOFF, NUM), "widths": np.full(NUM, CUTOFF / (NUM - 1))},
        ),
        ("bessel", {"centers": np.pi * np.arange(1, NUM + 1) / CUTOFF}),
    ],
)
def test_given_constants_replace_the_computed_ones(name, constants):
    with jax.enable_x64(True):
        d = jnp.asarray(DISTANCES)
        computed = radial_basis(name)(d, NUM, CUTOFF)
        constants = {key: tuple(values.tolist()) for key, values in constants.items()}
        np.testing.assert_allclose(
            radial_basis(name, **constants)(d, NUM, CUTOFF), computed, rtol=1e-14, atol=1e-14
        )
        moved = {key: tuple(1.01 * value for value in values) for key, values in constants.items()}
        assert np.abs(radial_basis(name, **moved)(d, NUM, CUTOFF) - computed).max() > 1e-3


def test_values_of_given_gaussians():
    with jax.enable_x64(True):
        values = radial_basis("gaussian", (0.5, 1.0), (0.2, 0.4))(
            jnp.asarray([0.7, 1.4]), 2, CUTOFF
        )
    np.testing.assert_allclose(values, np.exp([[-0.5, -0.28125], [-10.125, -0.5]]), rtol=1e-14)


@pytest.mark.parametrize("name", ["gaussian", "bessel", "physnet", "bernstein"])
def test_single_precision_is_kept_with_x64(name):
    with jax.enable_x64(True):
        assert (
            radial_basis(name)(jnp.asarray(DISTANCES, jnp.float32), NUM, CUTOFF).dtype
            == jnp.float32
        )


def test_invalid_constants_are_reported():
    d = jnp.asarray(DISTANCES, jnp.float32)
    with pytest.raises(ValueError, match="6 functions .*received 5 centers"):
        radial_basis("gaussian", np.ones(5))(d, NUM, CUTOFF)
    with pytest.raises(ValueError, match="6 functions .*received 7 wave numbers"):
        radial_basis("bessel", np.ones(7))(d, NUM, CUTOFF)
    for name, given in (("physnet", {"centers": np.ones(6)}), ("bessel", {"widths": np.ones(6)})):
        with pytest.raises(ValueError, match=f"received them for '{name}'"):
            radial_basis(name, **given)


def test_the_exponential_cutoff():
    """Also at and beyond the cutoff, with finite derivatives."""
    with jax.enable_x64(True):
        d = jnp.asarray(np.concatenate([np.linspace(0.0, 6.0, 50), [5.0, 5.0 - 1e-9]]))
        squared = np.minimum(d / 5.0, 1.0 - 1e-16) ** 2
        expected = np.where(d < 5.0, np.exp(-squared / (1.0 - squared)), 0.0)
        np.testing.assert_allclose(exponential_cutoff(d, 5.0), expected, rtol=1e-12, atol=1e-15)
        slopes = jax.vmap(jax.grad(jax.grad(lambda x: exponential_cutoff(x, 5.0))))(d)
        assert np.isfinite(slopes).all()


@pytest.mark.parametrize("degrees", [(1, 2, 3), (0, 2, 4)])
def test_orthonormal_harmonics_are_those_of_the_tensor_products(degrees):
    """Detects another order, sign or norm of components, and wrong values of padding edges."""
    unit = np.random.default_rng(0).normal(size=(20, 3))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    with jax.enable_x64(True):
        unit = jnp.asarray(np.concatenate([unit, np.eye(3), np.zeros((1, 3))]))
        by_degree = spherical_harmonics(unit, max(degrees))  # with squared norm 2l + 1
        # in Cartesian order, m = l, -l, l - 1, ..., 0; ours is m = -l, ..., l
        order = {
            l: np.argsort([m for k in range(l, 0, -1) for m in (k, -k)] + [0]) for l in degrees
        }
        expected = np.concatenate([by_degree[l][:, order[l]] for l in degrees], axis=1)
        expected = expected / np.sqrt(4 * np.pi)
        np.testing.assert_allclose(orthonormal_harmonics(unit, degrees), expected, atol=1e-12)
        assert orthonormal_harmonics(unit.astype(jnp.float32), degrees).dtype == jnp.float32
