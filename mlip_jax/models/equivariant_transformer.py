"""Equivariant transformer of TorchMD-Net (Thölke, De Fabritiis, ICLR 2022, arXiv:2202.02541).

Every atom has scalars s (N, F) and vectors v (N, 3, F). Attention without softmax sums over the
neighbors and the atom itself; filters that depend only on the distance weight keys and values.
Filters are equal for i -> j and j -> i and are computed once for each pair, in separate arrays
(P, F) that are never concatenated or split. Messages of an atom to itself are computed on atoms.
The model agrees with TorchMD-Net 3.1.0 if the options are the same (importers/torchmdnet.py).

Two of the defaults here differ from those of TorchMD-Net, with which the energy is not smooth:

- `vector_cutoff=False` does not apply the cutoff to the messages to the vectors. Without a filter
  on the values, or with one whose bias is not zero, these messages end abruptly at the cutoff (and
  start abruptly at `cutoff_lower`), and the energy jumps.
- `epsilon=0` uses plain norms of vectors in the gated head. They have a kink where the vectors of
  an atom vanish, so forces jump at a neighborhood with inversion symmetry.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import jraph

from mlip_jax.graphs.graph import Pairs, pairs
from mlip_jax.models.layers.basic import (
    Dense,
    activation,
    gather,
    safe_norm,
    segment_sum,
    unit_vectors,
)
from mlip_jax.models.layers.distance_filters import (
    FilterNetwork,
    RadialBasis,
    cutoff_envelope,
    filter_names,
    value_names,
    with_cut,
)
from mlip_jax.models.layers.gated_energy import GatedEnergy, packed_xavier, xavier
from mlip_jax.models.layers.heads import AtomicEnergy, AtomOutputs, embed_elements
from mlip_jax.models.layers.splines import SplineGrid

CHOICES = {
    "radial_basis": ("expnorm", "gaussian"),
    "distance_influence": ("both", "keys", "values", "none"),
    "head": ("gated", "scalar"),
    "radial_filter": ("exact", "spline"),
}


class Model(nn.Module):
    """Equivariant transformer.

    The defaults are the published ones except `vector_cutoff` and `epsilon`. New training runs use
    another `epsilon`.

    Attributes:
      num_features: Number of features F, even and divisible by num_heads.
      num_layers: Number of attention layers.
      num_heads: Number of attention heads.
      cutoff: Cutoff radius (Å).
      cutoff_lower: Distance below which pairs do not interact (Å).
      cutoff_fn: Envelope of the messages (layers.CUTOFFS); it must be "cosine" if there is a
        `cutoff_lower`. With "phys" and "exponential" second derivatives are continuous at the
        cutoff.
      radial_basis: Functions of the distance: "expnorm" or "gaussian".
      num_radial: Number of radial basis functions.
      trainable_rbf: Whether centers and widths of the functions are parameters.
      radial_centers: Centers of the functions, or their initial values if they are trainable,
        num_radial of them; None: the published ones. These are centers (Å) for "gaussian" and means
        for "expnorm".
      radial_widths: Widths of the functions, or their initial values if they are trainable; None:
        the published ones. These are a single width (Å) for "gaussian" and num_radial betas for
        "expnorm".
      activation: Activation in the filters and in the head (layers.ACTIVATIONS).
      attn_activation: Activation of the attention (layers.ACTIVATIONS).
      distance_influence: Quantities that filters of the distance weight, in addition to the cutoff:
        "keys", "values", "both" or "none".
      neighbor_embedding: Whether the initial features combine the elements of the atom and of its
        neighbors.
      vector_cutoff: Whether messages to the vectors go to zero at the cutoff.
      epsilon: Constant added under the square root of the vectors' norms in the gated head.
        New training runs use 1e-4, with which forces are smooth where a vector vanishes.
      head: Energy head: "gated", two gated equivariant blocks on scalars and vectors, or "scalar",
        heads.AtomicEnergy on the scalars.
      zero_init: Whether the last kernel of the head starts at zero.
      radial_filter: Evaluation of the filters: "exact", or "spline", on `num_knots` knots with
        interpolation by cubic B-splines (twice continuously differentiable).
      num_knots: Number of knots of the splines.
      undirected: False computes filters for both directions of each pair; this plain form is for
        tests.
    """

    NEW_RUN_OPTIONS = {"epsilon": 1e-4}

    neighbor_slots = True  # see graphs/neighbor_slots.py

    num_features: int = 128
    num_layers: int = 8
    num_heads: int = 8
    cutoff: float = 5.0
    cutoff_lower: float = 0.0
    cutoff_fn: str = "cosine"
    radial_basis: str = "expnorm"
    num_radial: int = 64
    trainable_rbf: bool = False
    radial_centers: Sequence[float] | None = None
    radial_widths: Sequence[float] | None = None
    activation: str = "silu"
    attn_activation: str = "silu"
    distance_influence: str = "both"
    neighbor_embedding: bool = True
    vector_cutoff: bool = True
    epsilon: float = 1e-8
    head: str = "gated"
    zero_init: bool = True
    radial_filter: str = "exact"
    num_knots: int = 48
    undirected: bool = True

    def _check_options(self):
        if self.num_features % self.num_heads or self.num_features % 2:
            raise ValueError(
                f"num_features={self.num_features} must be even and divisible by "
                f"num_heads={self.num_heads}"
            )
        if not 0 <= self.cutoff_lower < self.cutoff:
            raise ValueError(
                f"cutoff_lower={self.cutoff_lower} must be between 0 and cutoff={self.cutoff}"
            )
        if self.cutoff_lower > 0 and self.cutoff_fn != "cosine":
            raise ValueError(
                f"with a cutoff_lower, cutoff_fn must be 'cosine', received {self.cutoff_fn!r}"
            )
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field} must be one of {allowed}, received {getattr(self, field)!r}"
                )

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        self._check_options()
        width, numbers = self.num_features, graph.nodes["numbers"]
        # edge geometry: distances (P,), directions (P, 3)
        edge = pairs(graph, self.undirected, slots=True)
        distances = safe_norm(edge.displacements)
        direction = unit_vectors(edge.displacements, distances)
        basis = RadialBasis(
            self.radial_basis,
            self.num_radial,
            self.cutoff_lower,
            self.cutoff,
            self.trainable_rbf,
            self.radial_centers,
            self.radial_widths,
            name="radial_basis",
        )
        # initial features: s (N, F), v None for zero
        s, v = embed_elements(self, numbers, width, direction.dtype), None
        envelope = cutoff_envelope(distances, self.cutoff_fn, self.cutoff_lower, self.cutoff)[
            :, None
        ]
        if self.neighbor_embedding:
            s = NeighborEmbedding(name="neighbors")(s, numbers, basis(distances), envelope, edge)
        # filters of all layers, of pairs and of an atom with itself
        cuts, self_cuts = self._cuts(distances, envelope)
        filters, self_filters = self._filters(basis, distances, cuts["vector_cut"])
        # attention layers
        for n in range(self.num_layers):
            s, v = TransformerLayer(self.num_heads, self.attn_activation, name=f"layer_{n}")(
                s, v, filters[n] | cuts, self_filters[n] | self_cuts, direction, edge
            )
        # atomic energies (N,) and features (N, 1, 4, F), degrees 0 and 1
        s = layer_norm(s, "norm")
        if self.head == "gated":
            energies = GatedEnergy(self.activation, self.epsilon, self.zero_init, name="energy")(
                s, v
            )
        else:
            energies = AtomicEnergy(
                width // 2, self.activation, self.zero_init, learned_shift=False, name="energy"
            )(s, numbers)
        return AtomOutputs(energies, jnp.concatenate([s[:, None, None, :], v[:, None]], axis=2))

    def _filters(self, basis, distances, vector_cut):
        """Compute the distance-dependent factors of the messages of every layer.

        A missing name is a factor of 1. The factor "along_vectors" includes the cutoff of the
        vectors.

        Returns:
          For each layer {name: factor} of pairs, (P, F), and of an atom with itself, (1, F).
        """
        names = [filter_names(self.distance_influence, n > 0) for n in range(self.num_layers)]
        networks = [
            FilterNetwork(parts, self.num_features, self.activation, name=f"layer_{n}_filters")
            for n, parts in enumerate(names)
        ]
        if not names[0]:
            return [{}] * self.num_layers, [{}] * self.num_layers
        self_filters = [network(basis(jnp.zeros((1,), distances.dtype))) for network in networks]
        if self.radial_filter == "exact":
            rbf = basis(distances)
            return [with_cut(network(rbf), vector_cut) for network in networks], self_filters
        grid = SplineGrid(self.num_knots, self.cutoff)
        rbf, splines = basis(grid.distances(distances.dtype)), grid.basis(distances)
        cut_splines = splines * vector_cut
        return [
            {
                part: (cut_splines if part == "along_vectors" else splines)
                @ grid.coefficients(values)
                for part, values in network(rbf).items()
            }
            for network in networks
        ], self_filters

    def _cuts(self, distances, envelope):
        """Compute the cutoffs of the messages to scalars and to vectors.

        Returns:
          {name: cutoff} of pairs, (P, 1), and of an atom with itself.
        """
        # an atom is at distance 0 from itself, below any `cutoff_lower`
        at_zero = 0.0 if self.cutoff_lower > 0 else 1.0
        if self.vector_cutoff:
            return (
                {"scalar_cut": envelope, "vector_cut": envelope},
                {"scalar_cut": at_zero, "vector_cut": at_zero},
            )
        within = (distances >= self.cutoff_lower) & (distances < self.cutoff)
        return (
            {"scalar_cut": envelope, "vector_cut": within[:, None].astype(distances.dtype)},
            {"scalar_cut": at_zero, "vector_cut": 1.0},
        )


class NeighborEmbedding(nn.Module):
    """Initial features that combine s (N, F) with the elements of the neighbors (eq. 3).

    A filter of the distance weights the neighbors.
    """

    @nn.compact
    def __call__(self, s, numbers, rbf, envelope, edge: Pairs):
        num, width = s.shape
        weights = Dense(width, kernel_init=xavier, name="filter")(rbf) * envelope
        elements = embed_elements(self, numbers, width, s.dtype)
        total = segment_sum(weights * gather(elements, edge.senders), edge.receivers, num)
        if edge.undirected:
            total = total + segment_sum(
                weights * gather(elements, edge.receivers), edge.senders, num
            )
        return Dense(width, kernel_init=xavier, name="mix")(jnp.concatenate([s, total], axis=-1))


class TransformerLayer(nn.Module):
    """One attention layer (eqs. 4 to 10): it updates s (N, F) and v (N, 3, F), or None for zero.

    Attributes:
      num_heads: Number of attention heads.
      attn_activation: Activation of the attention.
    """

    num_heads: int
    attn_activation: str

    @nn.compact
    def __call__(self, s, v, weights: dict, self_weights: dict, direction, edge: Pairs):
        num, width = s.shape
        parts = ("query", "key", *value_names(v is not None))
        init = packed_xavier((2 * width, width), ((len(parts) - 2) * width, 3 * width))
        projected = Dense(len(parts) * width, kernel_init=init, name="projections")(
            layer_norm(s, "norm")
        )
        # query and everything that an atom sends: (N, F) each, "vectors" (N, 3, F)
        sent = dict(zip(parts, jnp.split(projected, len(parts), axis=-1)))
        if v is not None:
            sent["vectors"] = sent.pop("along_vectors")[:, None, :] * v
        ds, dv = self._aggregate(sent, weights, self_weights, direction, edge)
        if v is None:
            return s + Dense(width, kernel_init=packed_xavier((width, 3 * width)), name="output")(
                ds
            ), dv
        v_1, v_2, v_3 = jnp.split(
            Dense(3 * width, use_bias=False, kernel_init=xavier, name="vectors")(v), 3, axis=-1
        )
        o_1, o_2, o_3 = jnp.split(
            Dense(3 * width, kernel_init=xavier, name="output")(ds), 3, axis=-1
        )
        return s + o_2 * jnp.sum(v_1 * v_2, axis=1) + o_3, v + dv + o_1[:, None, :] * v_3

    def _attention(self, query, sent, weights):
        """Return the values to the scalars times attention, shape (P, F)."""

        def heads(x):
            return x.reshape(len(x), self.num_heads, -1)

        products = query * sent["key"] * weights.get("key", 1.0)
        attention = (
            activation(self.attn_activation)(heads(products).sum(-1)) * weights["scalar_cut"]
        )
        values = sent["to_scalars"] * weights.get("to_scalars", 1.0)
        return (attention[:, :, None] * heads(values)).reshape(values.shape)

    def _aggregate(self, sent, weights, self_weights, direction, edge: Pairs):
        """Sum messages of the neighbors and of the atom itself: (N, F), (N, 3, F)."""
        num, vectors = len(sent["query"]), None
        if "vectors" in sent:
            vectors = [sent["vectors"][:, x] for x in range(3)]
            along_vectors = weights.get("along_vectors", weights["vector_cut"])

        def send(source, target, unit):
            received = {
                name: gather(sent[name], source) for name in ("key", "to_scalars", "along_pairs")
            }
            ds = segment_sum(
                self._attention(gather(sent["query"], target), received, weights), target, num
            )
            along_pairs, dv = received["along_pairs"] * weights.get("along_pairs", 1.0), []
            for x in range(3):  # one Cartesian component at a time: (P, F)
                message = along_pairs * unit[:, x, None]
                if vectors is not None:
                    message = message + along_vectors * gather(vectors[x], source)
                dv.append(segment_sum(message, target, num))
            return ds, jnp.stack(dv, axis=1)

        unit = direction * weights["vector_cut"]
        ds, dv = send(edge.senders, edge.receivers, unit)
        if edge.undirected:
            back_s, back_v = send(edge.receivers, edge.senders, -unit)
            ds, dv = ds + back_s, dv + back_v
        ds = ds + self._attention(sent["query"], sent, self_weights)
        if "vectors" in sent:
            dv = (
                dv
                + self_weights.get("along_vectors", 1.0)
                * self_weights["vector_cut"]
                * sent["vectors"]
            )
        return ds, dv


def layer_norm(x, name: str):
    """Apply a layer norm with the published epsilon.

    The variance is computed from differences to the mean, so the last digits agree with
    TorchMD-Net.
    """
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=x.dtype, name=name)(x)
