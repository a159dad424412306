"""Tests for the convolution with cuEquivariance: the same results as without it."""

import importlib.metadata
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.compilation_cache import EXTERNAL_KERNELS
from mlip_jax.graphs.graph import Pairs
from mlip_jax.models.layers.tensor_products import chunks, convolution
from mlip_jax.models.layers.tensor_products.chunks import PathGroup, Spec
from mlip_jax.models.layers.tensor_products.cuequivariance_products import is_chosen
from mlip_jax.target_device import compiling_for, portable_programs

installed = pytest.mark.skipif(
    importlib.util.find_spec("cuequivariance_jax") is None,
    reason="cuequivariance is not installed: pip install -e '.[cuequivariance]'",
)
# 1 x 2 -> 2 is a coupling whose sign depends on the version
GROUPS = (PathGroup(0, ((1, 1),)), PathGroup(1, ((1, 0), (0, 1), (2, 2))))


@installed
@pytest.mark.parametrize(("undirected", "old_signs"), [(False, True), (True, False)])
def test_same_sums_and_derivatives(undirected, old_signs, double_precision, monkeypatch):
    """Signs of the opposite direction, order of weights and outputs; training on forces."""
    monkeypatch.setenv(EXTERNAL_KERNELS, "cuequivariance")
    rng = np.random.default_rng(0)
    x = [jnp.asarray(rng.normal(size=(4, 2 * group.degree + 1, 2))) for group in GROUPS]
    y = jnp.asarray(rng.normal(size=(6, 9)))
    w = [[jnp.asarray(rng.normal(size=(6, 2))) for _ in group.paths] for group in GROUPS]
    senders, receivers = jnp.asarray(rng.integers(0, 4, (2, 6)))

    def theirs(x, y, w):
        edge = Pairs(receivers, senders, None, undirected)
        harmonics = jnp.split(y, [1, 4], axis=-1)
        return convolution.sum_products(GROUPS, x, harmonics, w, edge, old_signs)

    def ours(x, y, w):
        spec = Spec(GROUPS, undirected, old_signs, block=6)
        return chunks.forward(spec, x, y, w, senders, receivers)

    def results(function):
        def loss(*args):
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(function(*args)))

        def force_loss(x, y, w):
            return jnp.sum(jnp.sin(jax.grad(loss, 1)(x, y, w)))

        return (
            function(x, y, w),
            jax.grad(loss, (0, 1, 2))(x, y, w),
            jax.grad(force_loss, 2)(x, y, w),
        )

    program = jax.jit(lambda: (results(theirs), results(ours)))
    assert "segmented_polynomial" in str(program.trace().jaxpr)
    found, expected = program()
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_unknown_name_is_an_error(monkeypatch):
    """Otherwise a typing error would silently run the other program."""
    monkeypatch.setenv(EXTERNAL_KERNELS, "cuEq")
    with pytest.raises(ValueError, match="received 'cuEq', expected one of jax, cuequivariance"):
        is_chosen()


@pytest.mark.parametrize(
    ("platform", "missing", "extra"),
    [
        ("cpu", "cuequivariance_jax", "cuequivariance"),
        ("gpu", "cuequivariance_ops_jax", "cuequivariance-cuda13"),
    ],
)
def test_missing_package_is_an_error(monkeypatch, platform, missing, extra):
    """On a GPU, the kernels are a package of their own; without them only the slow form runs."""
    monkeypatch.setenv(EXTERNAL_KERNELS, "cuequivariance")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else name)
    with compiling_for(platform), pytest.raises(ImportError, match=rf"{missing}.*\[{extra}\]"):
        is_chosen()


def pretend_installed(monkeypatch):
    monkeypatch.setenv(EXTERNAL_KERNELS, "cuequivariance")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.13.0")


def test_incompatible_versions_are_an_error(monkeypatch):
    """Otherwise the training step fails with an error about the number of arguments."""
    pretend_installed(monkeypatch)
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    with pytest.raises(ImportError, match="0.13.0 does not work with JAX"):
        is_chosen()


def test_programs_for_other_processes_do_not_use_it(monkeypatch):
    """Its kernels on a GPU exist only in the process that compiled them."""
    pretend_installed(monkeypatch)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    assert is_chosen()
    with portable_programs():
        assert not is_chosen()
