"""Normalization of equivariant features by their root mean square."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from mlip_jax.models.layers.tensor_products.irreps import Features

_EPSILON = 1e-12


class RMSNorm(nn.Module):
    """Divide the features of an atom by one number, and scale each channel, as nequix does.

    The square of the number is a sum over irreps of the squares of all components and channels,
    divided by the number of irreps and the squared number of components. It grows with the number
    of channels: nequix adds the channels and averages over the components.
    """

    @nn.compact
    def __call__(self, features: Features) -> Features:
        """Normalize features, shape (N, 2l + 1, channels) per irrep."""
        square = sum(
            jnp.sum(values**2, axis=(1, 2), keepdims=True) / (len(features) * irrep.size**2)
            for irrep, values in features.items()
        )
        inverse = (square + _EPSILON) ** -0.5
        out = {}
        for irrep, values in features.items():
            weight = self.param(str(irrep), nn.initializers.ones, (values.shape[-1],))
            out[irrep] = values * weight.astype(values.dtype) * inverse
        return out
