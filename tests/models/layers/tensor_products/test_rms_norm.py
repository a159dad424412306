"""Tests for the normalization of equivariant features."""

import numpy as np
import pytest

from mlip_jax.models.layers.tensor_products.irreps import Irrep
from mlip_jax.models.layers.tensor_products.rms_norm import RMSNorm


@pytest.mark.usefixtures("double_precision")
def test_norm_of_an_atom():
    """Detects another weight of a degree, a norm shared by atoms, and NaN for features of zero."""
    rng = np.random.default_rng(0)
    features = {Irrep(0, 1): rng.normal(size=(3, 1, 4)), Irrep(2, 1): rng.normal(size=(3, 5, 2))}
    for values in features.values():
        values[1] = 0.0
    weights = {"0e": rng.normal(size=4), "2e": rng.normal(size=2)}
    normalized = RMSNorm().apply({"params": weights}, features)
    for atom in (0, 2):
        square = [np.mean(np.sum(v[atom] ** 2, axis=1)) / v.shape[1] for v in features.values()]
        scale = np.mean(square) ** -0.5
        for irrep, values in features.items():
            expected = values[atom] * weights[str(irrep)] * scale
            np.testing.assert_allclose(normalized[irrep][atom], expected, rtol=1e-11)
    assert not any(np.any(values[1]) for values in normalized.values())
