"""Signs of the couplings in the products of a MACE file, relative to those of models/mace.py.

A file contains the coupling tensors of its products (U_matrix). Their signs depend on the version
of e3nn, and another basis (use_reduced_cg) has another number of paths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

import numpy as np

from mlip_jax.importers.formats.weights import WeightsError
from mlip_jax.models.layers.tensor_products.couplings import e3nn_components
from mlip_jax.models.layers.tensor_products.symmetric_contraction import (
    evaluate_path,
    product_paths,
)

_TENSOR = re.compile(r"(.*\.contractions\.(\d+)\.)U_matrix_(\d+)$")


def align_products(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the state dict with weights for the signs of models/mace.py.

    Raises:
      WeightsError: A coupling tensor belongs to another basis.
    """
    state = dict(state)
    for name in list(state):
        if match := _TENSOR.match(name):
            prefix, degree, order = match[1], int(match[2]), int(match[3])
            signs = _signs(np.asarray(state[name], np.float64), degree, order, name)
            weights = _weights_name(state, prefix, order)
            if np.any(signs < 0):
                array = state[weights]
                state[weights] = array * signs[:, None].astype(array.dtype)
    return state


def _weights_name(state, prefix: str, order: int) -> str:
    """Return the name of the weights of an order; the highest order has a name of its own."""
    correlation = max(int(m[3]) for k in state if (m := _TENSOR.match(k)) and m[1] == prefix)
    below = correlation - 1 - order
    return f"{prefix}weights_max" if below < 0 else f"{prefix}weights.{below}"


def _signs(tensor: np.ndarray, degree: int, order: int, name: str) -> np.ndarray:
    """Return the sign of each path of a coupling tensor relative to ours."""
    tensor = tensor if degree else tensor[None]
    max_degree = round(np.sqrt(tensor.shape[1])) - 1
    paths = product_paths(max_degree, order, degree)
    if tensor.shape != (2 * degree + 1, *[(max_degree + 1) ** 2] * order, len(paths)):
        raise WeightsError(
            f"{name} has shape {tensor.shape}, expected {len(paths)} paths: the products have another "
            "basis (use_reduced_cg), which is not supported"
        )
    factors, expected = _path_values(max_degree, order, degree)
    values = tensor
    for _ in range(order):  # the last factor first
        values = np.einsum("...ap,a->...p", values, factors)
    # paths that are antisymmetric vanish for equal factors: their sign has no effect
    signs = np.where((values * expected).sum(0) < 0, -1.0, 1.0)
    if not np.allclose(values, signs * expected, rtol=0, atol=1e-4 * np.abs(expected).max()):
        raise WeightsError(f"{name}: the couplings are not those of MACE, which is not supported")
    return signs


@cache
def _path_values(max_degree: int, order: int, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random factors and the values of all paths for them, in the order of e3nn."""
    rng = np.random.default_rng(0)
    factors = [rng.standard_normal((1, 2 * l + 1)) for l in range(max_degree + 1)]
    paths = product_paths(max_degree, order, degree)
    values = np.stack([evaluate_path(path, factors, True)[0] for path in paths], axis=-1)
    flat = np.concatenate([x[0][e3nn_components(l)] for l, x in enumerate(factors)])
    return flat, values[e3nn_components(degree)]
