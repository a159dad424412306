"""Tests for couplings and harmonics: published numbers, and e3x.

e3nn's numbers are in another basis for degrees above 1, so they are compared through a matrix that
relates the harmonics of both.
"""

import e3x
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.models.layers.tensor_products.couplings import (
    coupling,
    e3nn_coupling,
    opposite,
    spherical_harmonics,
)

pytestmark = pytest.mark.usefixtures("double_precision")

harmonics = jax.jit(spherical_harmonics, static_argnums=1)
DEGREES = [
    (a, b, c) for a in range(5) for b in range(5) for c in range(abs(a - b), min(a + b, 4) + 1)
]


def test_couplings_are_those_of_e3x():
    """Catches a wrong sign, norm or order of components."""
    table = np.asarray(e3x.so3.clebsch_gordan(4, 4, 4))
    for a, b, c in DEGREES:
        expected = table[a * a : (a + 1) ** 2, b * b : (b + 1) ** 2, c * c : (c + 1) ** 2]
        np.testing.assert_allclose(coupling(a, b, c), expected, atol=1e-12, err_msg=f"{a} {b} {c}")


def e3nn_harmonics(vectors):
    """Degrees 0 to 2 as e3nn writes them, its polar axis being y."""
    x, y, z = vectors.T
    return [
        np.ones((len(x), 1)),
        np.sqrt(3) * vectors,
        np.stack(
            [
                np.sqrt(15) * x * z,
                np.sqrt(15) * x * y,
                np.sqrt(5) * (y * y - (x * x + z * z) / 2),
                np.sqrt(15) * y * z,
                np.sqrt(15) / 2 * (z * z - x * x),
            ],
            axis=-1,
        ),
    ]


def unit_vectors(num):
    vectors = np.random.default_rng(0).normal(size=(num, 3))
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_couplings_are_those_of_e3nn():
    """Values of "wigner_3j" of e3nn 0.6.0, and the signs of 0.4.4."""
    vectors = unit_vectors(40)
    ours = harmonics(jnp.asarray(vectors), 2)
    bases = [
        np.linalg.lstsq(np.asarray(a), b, rcond=None)[0]
        for a, b in zip(ours, e3nn_harmonics(vectors))
    ]
    for degrees, index, value in (
        ((1, 1, 1), (0, 1, 2), 1 / np.sqrt(6)),
        ((1, 1, 0), (1, 1, 0), 1 / np.sqrt(3)),
        ((2, 2, 1), (0, 1, 0), -0.182574186),
        ((1, 2, 2), (0, 0, 1), -0.182574186),
        ((2, 2, 2), (0, 0, 2), -0.239045722),
        ((1, 1, 2), (0, 1, 1), 0.316227766),
    ):
        theirs = np.einsum("abc,ai,bj,ck->ijk", coupling(*degrees), *(bases[l] for l in degrees))
        assert theirs[index] == pytest.approx(value * np.sqrt(2 * degrees[2] + 1), abs=1e-8), (
            degrees
        )
        assert e3nn_coupling(*degrees)[index] == pytest.approx(value, abs=1e-8)
    for degrees in DEGREES:
        low, middle, high = sorted(degrees)
        sign = -1 if low == 1 and middle == high > 1 else 1
        np.testing.assert_array_equal(coupling(*degrees, old_signs=True), sign * coupling(*degrees))
    assert (
        coupling(3, 4, 6, True)[0].any() and not (coupling(4, 3, 6, True) + coupling(4, 3, 6)).any()
    )


def test_degrees_that_do_not_couple():
    with pytest.raises(ValueError, match="degrees 1 and 1 do not couple to 3"):
        coupling(1, 1, 3)


def test_harmonics_are_those_of_e3x():
    vectors = jnp.asarray(unit_vectors(5))
    expected = jax.jit(
        lambda v: e3x.so3.spherical_harmonics(v, 4, r_is_normalized=True, normalization="4pi")
    )(vectors)
    ours = harmonics(vectors, 4)
    np.testing.assert_allclose(jnp.concatenate(ours, axis=-1), expected, atol=1e-12)
    for l, values in enumerate(ours):
        np.testing.assert_allclose((values**2).sum(-1), 2 * l + 1, rtol=1e-12)
    for a, b in zip(opposite(ours), harmonics(-vectors, 4)):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_harmonics_are_polynomials():
    """Of other lengths too (SevenNet can leave vectors as they are), and the dtype stays."""
    vectors = jnp.asarray(unit_vectors(3))
    for l, (a, b) in enumerate(zip(harmonics(2 * vectors, 3), harmonics(vectors, 3))):
        np.testing.assert_allclose(a, 2.0**l * b, rtol=1e-12)
    single = harmonics(vectors.astype(jnp.float32), 3)
    assert all(values.dtype == jnp.float32 for values in single)
    assert not np.asarray(harmonics(jnp.zeros((3, 3)), 3)[2]).any()
