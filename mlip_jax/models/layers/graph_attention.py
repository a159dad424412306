"""Layers of Equiformer: linear maps, norms, gates and attention of features with even irreps.

Features are a dict {degree: array (N or E, 2l + 1, channels)}. Couplings with harmonics include the
cross product of two vectors, so mirror images are not equivalent. Signs are those of e3nn 0.4.4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.graphs.graph import Pairs
from mlip_jax.models.layers.basic import Dense, gather, segment_max, segment_sum
from mlip_jax.models.layers.tensor_products.couplings import coupling
from mlip_jax.models.layers.tensor_products.linear import normalized_activation

ByDegree = Mapping[int, jax.Array]
# Factor that gives this activation a unit second moment, estimated as in
# tensor_products.linear.NORMALIZATION.
_SMOOTH_LEAKY_RELU = 1.531320475574866


class EdgeInputs(NamedTuple):
    """Quantities of the edges that all layers share.

    Attributes:
      pairs: Directed pairs.
      harmonics: Spherical harmonics of all degrees, shape (E, M).
      radial: Radial functions, shape (E, K).
      envelope: Cutoff function, shape (E,); zero for padding edges.
    """

    pairs: Pairs
    harmonics: jax.Array
    radial: jax.Array
    envelope: jax.Array

    @property
    def max_degree(self) -> int:
        """Largest degree of the harmonics."""
        return math.isqrt(self.harmonics.shape[1]) - 1


def smooth_leaky_relu(x: jax.Array) -> jax.Array:
    """Compute the normalized smooth leaky ReLU with slope 0.2."""
    return _SMOOTH_LEAKY_RELU * x * (0.2 + 0.8 * jax.nn.sigmoid(x))


class DegreeLinear(nn.Module):
    """Linear map of the channels of each degree.

    Attributes:
      widths: Number of output channels of each degree from 0 on.
      use_bias: Whether scalars have a bias.
    """

    widths: Sequence[int]
    use_bias: bool = True

    @nn.compact
    def __call__(self, blocks: Mapping[int, Sequence[jax.Array]]) -> dict[int, jax.Array]:
        """Map features that are given as blocks of channels, which are never concatenated."""
        out = {}
        for l, width in enumerate(self.widths):
            if not (width and blocks.get(l)):
                continue
            num_in = sum(block.shape[-1] for block in blocks[l])
            kernel = self.param(f"kernel_{l}", nn.initializers.lecun_uniform(), (num_in, width))
            kernel, row, terms = kernel.astype(blocks[l][0].dtype), 0, []
            for block in blocks[l]:
                terms.append(block @ kernel[row : row + block.shape[-1]])
                row += block.shape[-1]
            out[l] = sum(terms[1:], terms[0])
        if self.use_bias and 0 in out:
            bias = self.param("bias", nn.initializers.zeros, (self.widths[0],))
            out[0] = out[0] + bias.astype(out[0].dtype)
        return out


def whole(features: ByDegree) -> dict[int, list[jax.Array]]:
    """Return features as blocks, one for each degree."""
    return {l: [values] for l, values in features.items()}


class DegreeNorm(nn.Module):
    """Division of each degree by its root mean square, and scale; scalars are centered before."""

    @nn.compact
    def __call__(self, features: ByDegree) -> dict[int, jax.Array]:
        out = {}
        for l, x in features.items():
            if l == 0:
                x = x - x.mean(axis=-1, keepdims=True)
            x = x / jnp.sqrt(jnp.square(x).mean(axis=(1, 2), keepdims=True) + 1e-5)
            x = x * self.param(f"scale_{l}", nn.initializers.ones, x.shape[-1:]).astype(x.dtype)
            if l == 0:
                x = x + self.param("bias", nn.initializers.zeros, x.shape[-1:]).astype(x.dtype)
            out[l] = x
        return out


class RadialWeights(nn.Module):
    """Network of the radial functions: twice dense, layer norm and silu, then dense.

    Attributes:
      hidden: Widths of the hidden layers.
      widths: Widths of the parts of the output.
    """

    hidden: Sequence[int]
    widths: Sequence[int]

    @nn.compact
    def __call__(self, radial: jax.Array) -> list[jax.Array]:
        """Compute the parts of the output, shape (E, width) each."""
        for n, width in enumerate(self.hidden):
            radial = Dense(width, name=f"layer_{n}")(radial)
            norm = nn.LayerNorm(epsilon=1e-5, dtype=radial.dtype, name=f"norm_{n}")
            radial = jax.nn.silu(norm(radial))
        shape = (radial.shape[-1], sum(self.widths))
        kernel = self.param("kernel", nn.initializers.lecun_uniform(), shape).astype(radial.dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[1:]).astype(radial.dtype)
        # one product for each part, so that no array of edges is split
        return [
            radial @ k + b for k, b in zip(parts(kernel, self.widths), parts(bias, self.widths))
        ]


def parts(array: jax.Array, widths: Sequence[int]) -> list[jax.Array]:
    """Split the last axis of an array."""
    return jnp.split(array, np.cumsum(widths)[:-1].tolist(), axis=-1)


class Coupling(NamedTuple):
    """Products of one degree with harmonics that have the same degree.

    Attributes:
      target: Degree of the products.
      source: Degree that is multiplied.
      harmonics: Degrees of the harmonics.
    """

    target: int
    source: int
    harmonics: tuple[int, ...]

    def __call__(self, x: jax.Array, harmonics: jax.Array) -> jax.Array:
        """Multiply each channel with the harmonics.

        Args:
          x: Features of the source degree, shape (E, 2a + 1, C).
          harmonics: Spherical harmonics of all degrees, shape (E, M).

        Returns:
          Products, shape (E, 2l + 1, number of harmonics' degrees times C).
        """
        size, count = 2 * self.target + 1, len(self.harmonics)
        tensor = np.zeros((harmonics.shape[1], 2 * self.source + 1, size, count))
        for n, b in enumerate(self.harmonics):
            values = coupling(self.source, b, self.target, old_signs=True)
            tensor[b * b : (b + 1) ** 2, :, :, n] = values.transpose(1, 0, 2)
        matrix = jnp.asarray(tensor.reshape(len(tensor), -1), x.dtype)
        # the default precision of some devices, bfloat16 or TF32, is too low for geometry
        matrix = jnp.matmul(harmonics, matrix, precision=jax.lax.Precision.HIGHEST)
        matrix = matrix.reshape(-1, *tensor.shape[1:], 1)  # (E, 2a + 1, 2l + 1, count, 1)
        # a sum of products instead of a reduction, which XLA does not vectorize on a CPU
        products = sum(matrix[:, c] * x[:, c, None, None, :] for c in range(x.shape[1]))
        return products.reshape(-1, size, count * x.shape[-1])


def couplings(num_sources: int, max_degree: int, targets: Sequence[int]) -> list[Coupling]:
    """Return the products of degrees below `num_sources` with harmonics up to `max_degree`."""
    found = []
    for target in targets:
        for a in range(num_sources):
            degrees = range(abs(a - target), min(a + target, max_degree) + 1)
            found += [Coupling(target, a, tuple(degrees))] if degrees else []
    return found


def gate(features: ByDegree, widths: Sequence[int]) -> dict[int, jax.Array]:
    """Apply silu to scalars, and multiply other degrees by the sigmoid of further scalars.

    Args:
      features: Features whose scalars are those of the output, followed by a gate for each channel
        of the other degrees.
      widths: Number of output channels of each degree.
    """
    start, out = widths[0], {0: normalized_activation("silu")(features[0][..., : widths[0]])}
    for l in sorted(set(features) - {0}):
        gates = features[0][..., start : start + widths[l]]
        out[l] = features[l] * normalized_activation("sigmoid")(gates)
        start += widths[l]
    return out


def gate_inputs(widths: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers of input channels of `gate`."""
    return (sum(widths), *widths[1:])


class GraphAttention(nn.Module):
    """Attention with messages that are products of features and harmonics (Equiformer, section 4).

    Attributes:
      widths: Number of channels of the messages for each degree.
      head_widths: Number of channels of a head for each degree.
      num_heads: Number of heads.
      out_widths: Number of output channels for each degree; 0 for none.
      radial_widths: Widths of the hidden layers of the radial network.
      rescale_degree: Whether to multiply the sum over the neighbors by their number.
    """

    widths: Sequence[int]
    head_widths: Sequence[int]
    num_heads: int
    out_widths: Sequence[int]
    radial_widths: Sequence[int]
    rescale_degree: bool = False

    @nn.compact
    def __call__(self, features: ByDegree, edge: EdgeInputs) -> dict[int, jax.Array]:
        """Compute the change of the features."""
        source = DegreeLinear(self.widths, name="merge_source")(whole(features))
        target = DegreeLinear(self.widths, use_bias=False, name="merge_target")(whole(features))
        messages = {
            l: gather(source[l], edge.pairs.senders) + gather(target[l], edge.pairs.receivers)
            for l in source
        }
        blocks = self._weighted_products(messages, edge)
        weights = self._attention(blocks[0], edge, len(features[0]))
        hidden = DegreeLinear(gate_inputs(self.widths), name="hidden")(blocks)
        values = self._values(gate(hidden, self.widths), edge)
        sums = self._sum_over_neighbors(values, weights, edge, len(features[0]))
        return DegreeLinear(self.out_widths, name="project")(whole(sums))

    def _weighted_products(self, messages, edge: EdgeInputs) -> dict[int, list[jax.Array]]:
        """Multiply messages with harmonics and with weights from the distance."""
        found = couplings(len(self.widths), edge.max_degree, range(len(self.widths)))
        widths = tuple(len(c.harmonics) * self.widths[c.source] for c in found)
        weights = RadialWeights(self.radial_widths, widths, name="radial")(edge.radial)
        blocks = {}
        for c, weight in zip(found, weights):
            product = c(messages[c.source], edge.harmonics) * weight[:, None]
            blocks.setdefault(c.target, []).append(product)
        return blocks

    def _attention(self, scalars, edge: EdgeInputs, num: int) -> jax.Array:
        """Return the weight of each edge and head, shape (E, num_heads).

        The weights of an atom's neighbors are a softmax times the envelope, whose sum is 1 if all
        envelopes are 1.
        """
        width = self.head_widths[0]
        logits = DegreeLinear((self.num_heads * width,), name="attention")({0: scalars})[0]
        init = nn.initializers.glorot_uniform()
        vector = self.param("attention_vector", init, (self.num_heads, width))
        logits = smooth_leaky_relu(logits[:, 0].reshape(-1, self.num_heads, width))
        logits = (logits * vector.astype(logits.dtype)).sum(axis=-1)
        envelope = edge.envelope[:, None]
        # edges beyond the cutoff must not determine the largest logit
        logits = jnp.where(envelope > 0, logits, jnp.finfo(logits.dtype).min)
        receivers = edge.pairs.receivers
        largest = jax.lax.stop_gradient(segment_max(logits, receivers, num))
        shares = envelope * jnp.exp(logits - gather(largest, receivers))
        total = gather(segment_sum(shares, receivers, num), receivers)
        return shares / (total + 1e-16) * envelope

    def _values(self, gated, edge: EdgeInputs) -> dict[int, jax.Array]:
        """Multiply gated messages with harmonics again, and map them to the channels of the heads."""
        widths = [
            self.num_heads * width if l < len(self.out_widths) and self.out_widths[l] else 0
            for l, width in enumerate(self.head_widths)
        ]
        found = couplings(len(self.widths), edge.max_degree, [l for l, w in enumerate(widths) if w])
        sizes = [len(c.harmonics) * self.widths[c.source] for c in found]
        table = self.param("value_weights", nn.initializers.normal(1.0), (sum(sizes),))
        blocks = {}
        for c, weight in zip(found, parts(table, sizes)):
            x = gated[c.source]
            product = c(x, edge.harmonics) * weight.astype(x.dtype)
            blocks.setdefault(c.target, []).append(product)
        return DegreeLinear(widths, name="values")(blocks)

    def _sum_over_neighbors(self, values, weights, edge: EdgeInputs, num: int):
        """Sum values times attention over the neighbors of each atom."""
        receivers, out = edge.pairs.receivers, {}
        for l, x in values.items():
            heads = x.reshape(*x.shape[:2], self.num_heads, -1) * weights[:, None, :, None]
            out[l] = segment_sum(heads.reshape(x.shape), receivers, num)
        if self.rescale_degree:
            degree = segment_sum(edge.envelope, receivers, num)[:, None, None]
            out = {l: x * degree for l, x in out.items()}
        return out


class EquiformerBlock(nn.Module):
    """Attention and feed-forward network, each after a norm.

    Attributes:
      attention: Options of GraphAttention, except the numbers of channels of the messages and of
        the output, which are those of the features.
      widths: Number of channels of the features for each degree.
      hidden_widths: Number of channels of the feed-forward network.
      out_widths: Number of output channels for each degree.
    """

    attention: Mapping[str, object]
    widths: Sequence[int]
    hidden_widths: Sequence[int]
    out_widths: Sequence[int]

    @nn.compact
    def __call__(self, features: ByDegree, edge: EdgeInputs) -> dict[int, jax.Array]:
        """Compute the features after the block."""
        attention = GraphAttention(
            widths=self.widths, out_widths=self.widths, **self.attention, name="attention"
        )
        change = attention(DegreeNorm(name="norm_1")(features), edge)
        features = {l: x + change[l] for l, x in features.items()}
        x = DegreeNorm(name="norm_2")(features)
        x = DegreeLinear(gate_inputs(self.hidden_widths), name="feed_forward_1")(whole(x))
        x = gate(x, self.hidden_widths)
        x = DegreeLinear(self.out_widths, name="feed_forward_2")(whole(x))
        if tuple(self.out_widths) != tuple(self.widths):
            features = DegreeLinear(self.out_widths, name="shortcut")(whole(features))
        return {l: features[l] + x[l] for l in x}


class DegreeEmbedding(nn.Module):
    """Sum of radial weights times harmonics over the neighbors, the first features of an atom.

    Attributes:
      widths: Number of channels for each degree.
      radial_widths: Widths of the hidden layers of the radial network.
      avg_num_neighbors: Average number of neighbors, whose root divides the sum.
    """

    widths: Sequence[int]
    radial_widths: Sequence[int]
    avg_num_neighbors: float

    @nn.compact
    def __call__(self, edge: EdgeInputs, num: int) -> dict[int, jax.Array]:
        width, receivers = self.widths[0], edge.pairs.receivers
        num_degrees = min(edge.max_degree + 1, len(self.widths))
        network = RadialWeights(self.radial_widths, [width] * num_degrees, name="radial")
        constant = self.param("constant", nn.initializers.normal(1.0), (width,))
        norm, sums = 1.0 / math.sqrt(self.avg_num_neighbors), {}
        for l, weight in enumerate(network(edge.radial)):
            weight = weight * (edge.envelope[:, None] * norm)
            harmonics = edge.harmonics[:, l * l : (l + 1) ** 2]
            total = segment_sum(weight[:, None] * harmonics[..., None], receivers, num)
            sums[l] = [total * constant.astype(total.dtype)]
        out = DegreeLinear(self.widths, use_bias=False, name="project")(sums)
        # each neighbor adds the bias of the projection
        bias = self.param("bias", nn.initializers.zeros, (width,)).astype(edge.envelope.dtype)
        degree = segment_sum(edge.envelope, receivers, num) * norm
        out[0] = out[0] + degree[:, None, None] * bias
        return out
