"""So3krates: the Euclidean transformer of Frank et al. (Nature Communications 15, 6539, 2024).

Every atom has features f, shape (N, F), and Euclidean variables x, shape (N, D), with D the sum of
2l + 1 over the degrees. Both are updated by attention without softmax. A filter of the distance and
of the per-degree invariants of x_j - x_i weights the products of queries and keys. Filters are
equal for i -> j and j -> i and are computed once for each pair. The model agrees with mlff v1.0
(sparse form) if the options are the same.

Without softmax or norms a layer is cubic in its features, so their growth accelerates with each
layer: before training, their root mean square after 1, 2, ... 6 layers is 1.2, 1.8, 2.5, 4.3, 1e3,
infinite (ethanol, published defaults). More than four layers need layer_norm_1 or layer_norm_2,
which keep it between 1 and 1.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.graphs.graph import Pairs, pairs
from mlip_jax.models.layers.basic import (
    Dense,
    ResidualMLP,
    TwoLayers,
    activation,
    cutoff_function,
    gather,
    radial_basis,
    safe_norm,
    segment_sum,
    unit_vectors,
)
from mlip_jax.models.layers.embeddings import embed_state
from mlip_jax.models.layers.euclidean_variables import (
    degree_invariants,
    orthonormal_harmonics,
    parity,
    repeat_degrees,
)
from mlip_jax.models.layers.heads import AtomicEnergy, AtomOutputs, embed_elements
from mlip_jax.models.layers.splines import SplineGrid

NORMALIZATIONS = ("identity", "sqrt_num_features", "avg_num_neighbors")
RADIAL_FILTERS = ("exact", "spline")


class Model(nn.Module):
    """So3krates; the defaults are the published ones.

    Attributes:
      num_features: Number of features F, divisible by num_heads and by the number of degrees.
      num_layers: Number of attention and exchange blocks.
      degrees: Degrees l of the Euclidean variables.
      num_heads: Number of heads of the feature branch; the Euclidean branch has one head per
        degree.
      cutoff: Cutoff radius (Å).
      radial_basis: Name of the radial basis (layers.RADIAL_BASES).
      num_radial: Number of radial basis functions.
      cutoff_fn: Envelope of the attention (layers.CUTOFFS).
      qk_activation: Activation of queries and keys (layers.ACTIVATIONS).
      message_normalization: Divisor of the attention: 1 ("identity"), the square root of the
        channels of a head ("sqrt_num_features") or `avg_num_neighbors` ("avg_num_neighbors").
      avg_num_neighbors: Average number of neighbors, for `message_normalization`. Training runs
        that need it set it from their data.
      layer_norm_1: Whether there is a layer norm after attention. More than four layers need a
        layer norm, this one or layer_norm_2.
      residual_mlp_1: Whether there is a residual MLP after attention.
      residual_mlp_2: Whether there is a residual MLP after the exchange block.
      layer_norm_2: Whether there is a layer norm after the exchange block.
      ev_init: Initial Euclidean variables: "zeros", or "neighborhood", the cutoff-weighted mean of
        the neighbors' harmonics. In eq. 4 the divisor is the sum of the weights; here one is added
        to it, since otherwise the energy jumps when the last neighbor of an atom leaves the cutoff.
      charge_embedding: Whether the total charge, graph.globals["charge"], is embedded
        (embeddings.StateEmbedding). Embeddings are added and divided by the square root of their
        number.
      spin_embedding: Whether the number of unpaired electrons, graph.globals["spin"], is embedded
        likewise; 0 if it is absent.
      energy_width: Hidden width of the energy head (heads.AtomicEnergy); None: num_features.
      energy_act: Activation of the energy head (layers.ACTIVATIONS).
      zero_init: Whether the last kernel of the energy head starts at zero.
      learned_scale: Whether the energy head learns a scale per element.
      learned_shift: Whether the energy head learns a shift per element.
      radial_filter: Evaluation of the radial filter networks: "exact", or "spline", on `num_knots`
        knots with interpolation by cubic B-splines (twice continuously differentiable), which costs
        a third.
      num_knots: Number of knots of the splines.
      undirected: False computes filters for both directions of each pair; this plain form is for
        tests.
    """

    neighbor_slots = True  # see graphs/neighbor_slots.py

    num_features: int = 132
    num_layers: int = 3
    degrees: Sequence[int] = (1, 2, 3)
    num_heads: int = 4
    cutoff: float = 5.0
    radial_basis: str = "physnet"
    num_radial: int = 32
    cutoff_fn: str = "cosine"
    qk_activation: str = "silu"
    message_normalization: str = "sqrt_num_features"
    avg_num_neighbors: float = 1.0
    layer_norm_1: bool = False
    residual_mlp_1: bool = False
    residual_mlp_2: bool = False
    layer_norm_2: bool = False
    ev_init: str = "zeros"
    charge_embedding: bool = False
    spin_embedding: bool = False
    energy_width: int | None = None
    energy_act: str = "identity"
    zero_init: bool = True
    learned_scale: bool = False
    learned_shift: bool = True
    radial_filter: str = "exact"
    num_knots: int = 48
    undirected: bool = True

    def _check_options(self):
        if self.num_features % self.num_heads or self.num_features % len(self.degrees):
            raise ValueError(
                f"num_features={self.num_features} must be divisible by num_heads={self.num_heads} "
                f"and by the number of degrees ({len(self.degrees)})"
            )
        for field, allowed in (
            ("message_normalization", NORMALIZATIONS),
            ("radial_filter", RADIAL_FILTERS),
            ("ev_init", ("zeros", "neighborhood")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field} must be one of {allowed}, received {getattr(self, field)!r}"
                )

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        self._check_options()
        degrees = tuple(self.degrees)
        options = LayerOptions(**{name: getattr(self, name) for name in LayerOptions._fields})
        # edge geometry: distances (P,), harmonics (P, D), envelope (P,)
        edge = pairs(graph, self.undirected, slots=True)
        distances = safe_norm(edge.displacements)
        harmonics = orthonormal_harmonics(unit_vectors(edge.displacements, distances), degrees)
        envelope = cutoff_function(self.cutoff_fn)(distances, self.cutoff)
        numbers = graph.nodes["numbers"]
        # initial features f (N, F) and Euclidean variables x (N, D)
        f = self._embed(graph, edge.displacements.dtype)
        x = self._initial_ev(edge, harmonics, envelope, len(numbers), degrees)
        filters = self._radial_filters(distances)
        for n in range(self.num_layers):
            f, x = So3kratesLayer(options, degrees, name=f"layer_{n}")(
                f, x, edge, harmonics, envelope, filters[n], n == 0 and self.ev_init == "zeros"
            )
        energies = AtomicEnergy(
            self.energy_width or self.num_features,
            self.energy_act,
            self.zero_init,
            self.learned_scale,
            self.learned_shift,
            name="energy",
        )(f, numbers)
        return AtomOutputs(energies, f[:, None, None, :])

    def _embed(self, graph, dtype):
        """Return the initial features, shape (N, F)."""
        numbers = graph.nodes["numbers"]
        parts = [embed_elements(self, numbers, self.num_features, dtype)]
        for name, wanted in (("charge", self.charge_embedding), ("spin", self.spin_embedding)):
            if wanted:
                parts.append(embed_state(graph, name, self.num_features, dtype))
        return sum(parts) / float(np.sqrt(len(parts))) if len(parts) > 1 else parts[0]

    def _initial_ev(self, edge: Pairs, harmonics, envelope, num, degrees):
        """Return the initial Euclidean variables, shape (N, D)."""
        zeros = jnp.zeros((num, harmonics.shape[-1]), harmonics.dtype)
        if self.ev_init == "zeros":
            return zeros
        weighted = envelope[:, None] * harmonics
        total = scatter_pairs(weighted, weighted * parity(degrees, weighted.dtype), edge, num)
        norm = scatter_pairs(envelope, envelope, edge, num)
        return total / (1.0 + norm)[:, None]

    def _radial_filters(self, distances):
        """Compute the radial parts of the filters of every layer.

        Returns:
          For each layer, the filters of the feature branch and of the Euclidean branch, shape
          (P, F) each.
        """
        widths = (self.num_features, self.num_features)
        basis = radial_basis(self.radial_basis)
        networks = [
            [TwoLayers(widths, name=f"layer_{n}_radial_{b}") for b in ("features", "ev")]
            for n in range(self.num_layers)
        ]
        if self.radial_filter == "exact":
            rbf = basis(distances, self.num_radial, self.cutoff)
            return [[network(rbf) for network in both] for both in networks]
        grid = SplineGrid(self.num_knots, self.cutoff)
        rbf = basis(grid.distances(distances.dtype), self.num_radial, self.cutoff)
        splines = grid.basis(distances)
        return [
            [splines @ grid.coefficients(network(rbf)) for network in both] for both in networks
        ]


class LayerOptions(NamedTuple):
    """Options of `Model` that its layers need."""

    num_heads: int
    qk_activation: str
    message_normalization: str
    avg_num_neighbors: float
    layer_norm_1: bool
    residual_mlp_1: bool
    residual_mlp_2: bool
    layer_norm_2: bool


class So3kratesLayer(nn.Module):
    """One attention block and one exchange block.

    Attributes:
      options: Options of the model.
      degrees: Degrees l of the Euclidean variables.
    """

    options: LayerOptions
    degrees: tuple[int, ...]

    @nn.compact
    def __call__(self, f, x, edge: Pairs, harmonics, envelope, radial, ev_is_zero: bool):
        """Update features and Euclidean variables.

        Args:
          f: Features, shape (N, F).
          x: Euclidean variables, shape (N, D).
          edge: Pairs.
          harmonics: Spherical harmonics of the pairs, shape (P, D).
          envelope: Cutoff envelope of the pairs, shape (P,).
          radial: Radial parts of the two filters, shape (P, F) each.
          ev_is_zero: Whether x is known to be zero.

        Returns:
          Updated f and x.
        """
        o = self.options
        num, width = f.shape
        # filters of the two branches: (P, F)
        invariants = degree_invariants(
            jnp.zeros_like(x[:1])
            if ev_is_zero
            else gather(x, edge.senders) - gather(x, edge.receivers),
            self.degrees,
        )
        spherical_widths = (width // 4, width)
        filter_f = radial[0] + TwoLayers(spherical_widths, name="spherical_features")(invariants)
        filter_x = radial[1] + TwoLayers(spherical_widths, name="spherical_ev")(invariants)
        # attention block
        q1, k1, q2, k2 = self._queries_and_keys(f)
        v1 = PerHead(o.num_heads, name="v_features")(f)
        attention_f = self._attention(q1, k1, filter_f, edge, envelope, o.num_heads)
        attention_x = self._attention(q2, k2, filter_x, edge, envelope, len(self.degrees))
        f = f + aggregate_features(attention_f, v1, edge, num)
        x = x + aggregate_ev(attention_x, harmonics, edge, num, self.degrees)
        if o.layer_norm_1:
            f = nn.LayerNorm(dtype=f.dtype, name="layer_norm_1")(f)
        if o.residual_mlp_1:
            f = ResidualMLP(name="residual_mlp_1")(f)
        # exchange block: features and invariants of x update each other
        exchanged = Dense(width + len(self.degrees), name="exchange")(
            jnp.concatenate([f, degree_invariants(x, self.degrees)], axis=-1)
        )
        f = f + exchanged[:, :width]
        x = x + x * repeat_degrees(exchanged[:, width:], self.degrees)
        if o.residual_mlp_2:
            f = ResidualMLP(name="residual_mlp_2")(f)
        if o.layer_norm_2:
            f = nn.LayerNorm(dtype=f.dtype, name="layer_norm_2")(f)
        return f, x

    def _queries_and_keys(self, f):
        """Return q and k of the feature branch, then of the Euclidean branch, shape (N, F) each."""
        act = activation(self.options.qk_activation)
        heads, degrees = self.options.num_heads, len(self.degrees)
        return (
            act(PerHead(heads, name="q_features")(f)),
            act(PerHead(heads, name="k_features")(f)),
            act(PerHead(degrees, name="q_ev")(f)),
            act(PerHead(degrees, name="k_ev")(f)),
        )

    def _attention(self, q, k, weights, edge: Pairs, envelope, heads):
        """Compute the attention of the receivers and, for undirected pairs, of the senders.

        Returns:
          Two arrays, shape (P, heads) each; the second is None for directed edges.
        """
        o = self.options
        divisor = {
            "identity": 1.0,
            "sqrt_num_features": float(np.sqrt(q.shape[-1] // heads)),
            "avg_num_neighbors": o.avg_num_neighbors,
        }[o.message_normalization]
        scale = (envelope / divisor)[:, None]

        def weigh(query, key):
            product = (query * weights * key).reshape(len(weights), heads, -1)
            return scale * product.sum(-1)

        at_receiver = weigh(gather(q, edge.receivers), gather(k, edge.senders))
        if not edge.undirected:
            return at_receiver, None
        return at_receiver, weigh(gather(q, edge.senders), gather(k, edge.receivers))


class PerHead(nn.Module):
    """One square matrix per head, without bias: (N, F) -> (N, F).

    Attributes:
      heads: Number of heads.
    """

    heads: int

    @nn.compact
    def __call__(self, f):
        width = f.shape[-1] // self.heads
        kernel = self.param(
            "kernel",
            nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=(0,)),
            (self.heads, width, width),
        )
        y = jnp.einsum("nhd,hcd->nhc", f.reshape(-1, self.heads, width), kernel.astype(f.dtype))
        return y.reshape(f.shape)


def scatter_pairs(to_receivers, to_senders, edge: Pairs, num: int) -> jax.Array:
    """Sum the messages of pairs per atom: (P, ...) -> (num, ...).

    Messages to the senders count only if the pairs are undirected.
    """
    total = segment_sum(to_receivers, edge.receivers, num)
    return total + segment_sum(to_senders, edge.senders, num) if edge.undirected else total


def aggregate_features(attention, values, edge: Pairs, num: int) -> jax.Array:
    """Sum attention times value over the neighbors: (P, H), (N, F) -> (N, F)."""

    def message(weights, v):
        heads = weights.shape[-1]
        return (weights[:, :, None] * v.reshape(len(v), heads, -1)).reshape(v.shape)

    at_receiver, at_sender = attention
    to_receivers = message(at_receiver, gather(values, edge.senders))
    to_senders = None if at_sender is None else message(at_sender, gather(values, edge.receivers))
    return scatter_pairs(to_receivers, to_senders, edge, num)


def aggregate_ev(attention, harmonics, edge: Pairs, num: int, degrees) -> jax.Array:
    """Sum attention times harmonics over the neighbors.

    The shapes (P, number of degrees) and (P, D) become (N, D).
    """
    at_receiver, at_sender = attention
    to_receivers = repeat_degrees(at_receiver, degrees) * harmonics
    to_senders = (
        None
        if at_sender is None
        else repeat_degrees(at_sender, degrees) * (harmonics * parity(degrees, harmonics.dtype))
    )
    return scatter_pairs(to_receivers, to_senders, edge, num)
