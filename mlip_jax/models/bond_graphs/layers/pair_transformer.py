"""Transformer with features of tokens and of pairs of tokens, as in Uni-Mol+."""

from __future__ import annotations

from math import sqrt

import flax.linen as nn
import jax
import jax.numpy as jnp

from mlip_jax.models.layers.basic import Dense

_zeros, _ones = nn.initializers.zeros, nn.initializers.ones


def gelu(x: jax.Array) -> jax.Array:
    """Compute the exact Gaussian error linear unit."""
    return jax.nn.gelu(x, approximate=False)


def layer_norm(name: str) -> nn.LayerNorm:
    """Return a layer norm with the constant of PyTorch."""
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)


class PairAttention(nn.Module):
    """Weights and values of the attention of tokens, per head, with a bias from pairs.

    Attributes:
      num_heads: Number of heads, H.
    """

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array, pairs: jax.Array, mask: jax.Array):
        """Compute attention weights (G, H, T, T) and values (G, H, T, F / H).

        Args:
          x: Features of tokens, (G, T, F).
          pairs: Features of pairs, (G, T, T, C).
          mask: Whether a token exists, (G, T).
        """
        width = x.shape[-1]

        def heads(name):
            y = Dense(width, use_bias=False, name=name)(x)
            return y.reshape(*y.shape[:2], self.num_heads, -1).transpose(0, 2, 1, 3)

        q, k, v = heads("query") / sqrt(width // self.num_heads), heads("key"), heads("value")
        bias = Dense(self.num_heads, name="bias")(pairs).transpose(0, 3, 1, 2)
        logits = jnp.einsum("ghid,ghjd->ghij", q, k) + bias
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(x.dtype).min)
        return jax.nn.softmax(logits, axis=-1), v


class FeedForward(nn.Module):
    """Dense layer, gelu, and a dense layer that starts at zero.

    Attributes:
      width: Width of the hidden layer.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute features of the same width."""
        hidden = gelu(Dense(self.width, name="layer_1")(x))
        return Dense(x.shape[-1], kernel_init=_zeros, name="layer_2")(hidden)


class TriangleProduct(nn.Module):
    """Update of pairs from the other two sides of all triangles, both directions together.

    Attributes:
      width: Width of the products.
      num_tokens: Number of tokens in the normalization.
    """

    width: int
    num_tokens: int

    @nn.compact
    def __call__(self, pairs: jax.Array, mask: jax.Array) -> jax.Array:
        """Compute the update of pairs (G, T, T, C); `mask` (G, T, T) marks pairs that exist."""
        gates = Dense(2 * self.width, kernel_init=_zeros, bias_init=_ones, name="gate")(pairs)
        both = Dense(2 * self.width, name="product")(pairs) / sqrt(self.num_tokens)
        both = jnp.where(mask[..., None], both * jax.nn.sigmoid(gates), 0.0)
        a, b = jnp.split(both, 2, axis=-1)
        sums = jnp.einsum("gikd,gjkd->gijd", a, b) + jnp.einsum("gkid,gkjd->gijd", a, b)
        outputs = Dense(pairs.shape[-1], kernel_init=_zeros, name="out")(layer_norm("norm")(sums))
        scale = Dense(pairs.shape[-1], kernel_init=_zeros, bias_init=_ones, name="scale")(pairs)
        return scale * outputs


class PairTransformerLayer(nn.Module):
    """Layer of Uni-Mol+: attention, feed-forward, and three updates of the pairs.

    Attributes:
      num_heads: Number of heads.
      hidden_width: Width of the feed-forward layer of tokens.
      pair_width: Width of the outer and triangle products.
      num_tokens: Number of tokens in the normalization of the products.
    """

    num_heads: int
    hidden_width: int
    pair_width: int
    num_tokens: int

    @nn.compact
    def __call__(self, x: jax.Array, pairs: jax.Array, mask: jax.Array):
        """Update features of tokens (G, T, F) and of pairs (G, T, T, C)."""
        weights, values = PairAttention(self.num_heads, name="attention")(x, pairs, mask)
        mixed = jnp.einsum("ghij,ghjd->gihd", weights, values).reshape(x.shape)
        x = x + Dense(x.shape[-1], kernel_init=_zeros, name="attention_out")(mixed)
        x = layer_norm("attention_norm")(x)
        x = layer_norm("norm")(x + FeedForward(self.hidden_width, name="feed_forward")(x))
        pairs = layer_norm("outer_norm")(pairs + self._outer(x, pairs.shape[-1]))
        of_pairs = mask[:, :, None] & mask[:, None, :]
        triangle = TriangleProduct(self.pair_width, self.num_tokens, name="triangle")
        pairs = layer_norm("triangle_norm")(pairs + triangle(pairs, of_pairs))
        update = FeedForward(pairs.shape[-1], name="pair_feed_forward")(pairs)
        return x, layer_norm("pair_norm")(pairs + update)

    def _outer(self, x: jax.Array, width: int) -> jax.Array:
        """Return the outer products of the features of two tokens, (G, T, T, C)."""
        both = Dense(2 * self.pair_width, name="outer_in")(x) / sqrt(self.num_tokens)
        a, b = jnp.split(both, 2, axis=-1)
        outer = jnp.einsum("gia,gjb->gijab", a, b).reshape(*x.shape[:2], x.shape[1], -1)
        outer = Dense(width, kernel_init=_zeros, name="outer_out")(outer)
        return outer / (1e-3 + 1.0 / self.num_tokens)
