"""First features from the elements, readouts, and features of heads, shared by MACE and PACE."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np

from mlip_jax.models.layers.tensor_products.gates import layout
from mlip_jax.models.layers.tensor_products.irreps import SCALAR, Features
from mlip_jax.models.layers.tensor_products.linear import (
    element_index,
    normalized_activation,
    table_rows,
)


def embed(module: nn.Module, numbers, elements, width, dtype) -> Features:
    """Return a trainable vector per element for each atom, as scalars (N, 1, width).

    The table is the parameter "embedding" of `module`.
    """
    index, num = element_index(numbers, elements)
    table = module.param("embedding", nn.initializers.normal(1.0), (num, width))
    return {SCALAR: table_rows(table.astype(dtype), index)[:, None]}


class ScalarReadout(nn.Module):
    """Energy of each atom from its scalars: (N, F) -> (N,).

    Attributes:
      width: Width of the hidden layer; None for a linear readout.
      zero_init: Whether the last kernel starts at zero.
    """

    width: int | None
    zero_init: bool

    @nn.compact
    def __call__(self, x):
        if self.width is not None:
            kernel = self.param("hidden", nn.initializers.normal(1.0), (x.shape[-1], self.width))
            x = normalized_activation("silu")(x @ (kernel / np.sqrt(x.shape[-1])).astype(x.dtype))
        init = nn.initializers.zeros if self.zero_init else nn.initializers.normal(1.0)
        kernel = self.param("final", init, (x.shape[-1],))
        return x @ (kernel / np.sqrt(x.shape[-1])).astype(x.dtype)


def features_of_heads(layers: list[Features]) -> jax.Array:
    """Return scalars of the last layer and higher degrees of the last layer that has them.

    The result has e3x's layout, (N, 1, (max_degree + 1)**2, F).
    """
    features = {irrep: values for layer in layers for irrep, values in layer.items()}
    return layout(features, max(irrep.degree for irrep in features), has_parity=False)
