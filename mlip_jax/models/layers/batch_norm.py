"""Batch normalization that ignores padding, and its statistics during training."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

# STATISTICS: collection of means and variances in the variables of a model.
STATISTICS = "batch_stats"
# MOMENTUM: share of a new batch in the running statistics, as in PyTorch.
MOMENTUM = 0.1


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe and Szegedy, 2015) over the rows of a mask.

    Its statistics are the variables "mean" and "variance" of the collection STATISTICS. If the
    collection is mutable, features are normalized with the statistics of the batch, which the new
    variables contain; the training objective averages them. Otherwise the variables are used.

    Attributes:
      epsilon: Constant added to the variance.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Normalize features, (N, F), by the rows of `mask`, (N,) bool."""
        width = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, width).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, width).astype(x.dtype)
        stored = [
            self.variable(STATISTICS, name, fill, width)
            for name, fill in (("mean", jnp.zeros), ("variance", jnp.ones))
        ]
        if self.is_mutable_collection(STATISTICS) and not self.is_initializing():
            count = jnp.maximum(mask.sum().astype(x.dtype), 1.0)
            mean = jnp.where(mask[:, None], x, 0.0).sum(0) / count
            centered = jnp.where(mask[:, None], x - mean, 0.0)
            variance = (centered * centered).sum(0) / count
            unbiased = variance * count / jnp.maximum(count - 1.0, 1.0)
            for variable, value in zip(stored, (mean, unbiased)):
                variable.value = jax.lax.stop_gradient(value)
        else:
            mean, variance = (variable.value.astype(x.dtype) for variable in stored)
        return scale * (x - mean) * jax.lax.rsqrt(variance + self.epsilon) + bias
