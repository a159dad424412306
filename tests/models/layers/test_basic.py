"""Tests for radial bases with given constants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.models.layers.basic import radial_basis

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
