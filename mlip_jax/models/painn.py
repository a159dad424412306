"""PaiNN: polarizable atom interaction network (Schütt et al., ICML 2021, arXiv:2102.03150).

Every atom has scalars s (N, F) and vectors v (N, 3, F). Filters depend only on the distance. One
linear layer computes them for all interactions, once for each pair. Quantities of edges are kept in
separate arrays (P, F) that are never concatenated or split: on a CPU the derivatives of a
concatenation of edges cost more than the messages.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph

from mlip_jax.graphs.graph import Pairs, pairs, slot_geometry
from mlip_jax.graphs.neighbor_slots import ALL_PAIRS
from mlip_jax.models.layers.basic import (
    Dense,
    cutoff_function,
    gather,
    radial_basis,
    safe_norm,
    segment_sum,
    unit_vectors,
)
from mlip_jax.models.layers.embeddings import embed_state
from mlip_jax.models.layers.fused_messages import fused_messages, wants_fused
from mlip_jax.models.layers.heads import AtomicEnergy, AtomOutputs, embed_elements
from mlip_jax.models.layers.slot_messages import SlotFilters, slot_messages

_ENCODED = 0.1  # scale of encoded forces: about the size of the vectors after one layer


class Model(nn.Module):
    """PaiNN; the defaults are the published ones. New training runs use another `epsilon`.

    Attributes:
      num_features: Number of features F.
      num_layers: Number of message and update blocks.
      cutoff: Cutoff radius (Å).
      radial_basis: Name of the radial basis (layers.RADIAL_BASES).
      num_radial: Number of radial basis functions.
      radial_centers: Centers of "gaussian" (Å) or wave numbers of "bessel" (1/Å), num_radial of
        them; None: computed (layers.radial_basis).
      radial_widths: Widths of "gaussian" (Å), num_radial of them; None: computed
        (layers.radial_basis).
      cutoff_fn: Envelope of the filters (layers.CUTOFFS).
      epsilon: Constant added under the square root of the vectors' norms. The published value is so
        small that forces nearly jump at geometries where a vector vanishes: by 1 eV/Å within
        0.0005 Å in N2. New training runs use 1e-4, with which forces are smooth.
      energy_width: Hidden width of the energy head (heads.AtomicEnergy); None: half of
        num_features.
      energy_act: Activation of the energy head (layers.ACTIVATIONS).
      zero_init: Whether the last kernel of the energy head starts at zero.
      learned_scale: Whether the energy head learns a scale per element.
      learned_shift: Whether the energy head learns a shift per element.
      undirected: False computes filters for both directions of each pair; this plain form is for
        tests.
      charge_embedding: Whether the total charge, graph.globals["charge"], is embedded and added to
        the initial scalars (embeddings.StateEmbedding).
      force_encoding: Whether vectors start from nodes["encoded_forces"] (N, 3), zero if a graph has
        none. A force of length l gets the length 0.1 ln(1 + l). DeNS uses this to encode the forces
        of structures that it displaces (training/dens.py).
    """

    NEW_RUN_OPTIONS = {"epsilon": 1e-4}
    neighbor_slots = ALL_PAIRS

    num_features: int = 128
    num_layers: int = 3
    cutoff: float = 5.0
    radial_basis: str = "gaussian"
    num_radial: int = 20
    radial_centers: Sequence[float] | None = None
    radial_widths: Sequence[float] | None = None
    cutoff_fn: str = "cosine"
    epsilon: float = 1e-8
    energy_width: int | None = None
    energy_act: str = "silu"
    zero_init: bool = True
    learned_scale: bool = False
    learned_shift: bool = True
    undirected: bool = True
    # absent in digests of force fields (Potential.digest), which are older; its parameters are not
    charge_embedding: bool = dataclasses.field(default=False, repr=False)
    force_encoding: bool = False

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        width, numbers = self.num_features, graph.nodes["numbers"]
        send, dtype = self._message_passing(graph)
        # message passing: s (N, F), v (N, 3, F), None for zero
        s = embed_elements(self, numbers, width, dtype)
        if self.charge_embedding:
            s = s + embed_state(graph, "charge", width, dtype)
        v = self._encoded_forces(graph)
        for n in range(self.num_layers):
            phi = Dense(width, name=f"message_{n}_layer_1")(s)
            phi = Dense(3 * width, name=f"message_{n}_layer_2")(jax.nn.silu(phi))
            ds, dv = send(n, phi, v)
            s, v = s + ds, dv if v is None else v + dv
            s, v = Update(self.epsilon, name=f"update_{n}")(s, v)
        # atomic energies (N,) and features (N, 1, 4, F), degrees 0 and 1
        energies = AtomicEnergy(
            self.energy_width or width // 2,
            self.energy_act,
            self.zero_init,
            self.learned_scale,
            self.learned_shift,
            name="energy",
        )(s, numbers)
        return AtomOutputs(energies, jnp.concatenate([s[:, None, None, :], v[:, None]], axis=2))

    def _message_passing(self, graph):
        """Return the function (layer, phi, v) -> (ds, dv), and the dtype of positions."""
        rbf = radial_basis(self.radial_basis, self.radial_centers, self.radial_widths)

        def basis(distances):
            # (P,) -> (P, num_radial + 1), with a constant function for the bias
            values = rbf(distances, self.num_radial, self.cutoff)
            envelope = cutoff_function(self.cutoff_fn)(distances, self.cutoff)
            return append_one(values) * envelope[:, None]

        tables = FilterTables(3 * self.num_layers, self.num_features, name="filters")
        slots = slot_geometry(graph)
        if slots is None:
            # edge geometry: distances (P,), directions (P, 3)
            edge = pairs(graph, self.undirected)
            distances = safe_norm(edge.displacements)
            direction = unit_vectors(edge.displacements, distances)
            values = basis(distances)
            # filters of all layers: 3 * num_layers arrays (P, F)
            filters = [values @ table for table in tables(self.num_radial, values.dtype)]
            sums = functools.partial(messages, direction=direction, edge=edge)
        else:
            # likewise with (N, K) in the place of (P,)
            distances = safe_norm(slots.displacements)
            slots = slots._replace(directions=slots.displacements / distances[..., None])
            slot_filters = SlotFilters(basis, distances)
            if wants_fused(self.num_features, distances.dtype):
                split = tables(self.num_radial, distances.dtype)
                fused = functools.partial(
                    fused_messages, bases=slot_filters.bases, distances=distances, geometry=slots
                )
                return (lambda n, phi, v: fused(phi, v, split[3 * n : 3 * n + 3]), distances.dtype)
            split = tables(self.num_radial, distances.dtype)
            filters = []
            for n in range(self.num_layers):
                filters += slot_filters.of_layer(split[3 * n : 3 * n + 3])
            sums = functools.partial(slot_messages, geometry=slots)
        return (lambda n, phi, v: sums(phi, v, filters[3 * n : 3 * n + 3]), distances.dtype)

    def _encoded_forces(self, graph):
        """Return the initial vectors, shape (N, 3, F), or None for zero."""
        if not self.force_encoding:
            return None
        forces = graph.nodes.get("encoded_forces", jnp.zeros_like(graph.nodes["positions"]))
        # each layer is cubic in its vectors, so large forces would overflow after a few layers
        length = jnp.sqrt((forces * forces).sum(-1, keepdims=True) + 1e-12)
        forces = _ENCODED * forces * (jnp.log1p(length) / length)
        return Dense(self.num_features, use_bias=False, name="encode_forces")(forces[..., None])


class FilterTables(nn.Module):
    """Parameters of linear filters of pairs, `append_one(rbf) * envelope @ table` each.

    The parameters are split into `num` tables before the product, so no array of edges is split.

    Attributes:
      num: Number of filters.
      width: Number of features of each filter.
      kernel_init: Initializer of the kernel of all filters.
    """

    num: int
    width: int
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, num_radial, dtype):
        """Return the tables of the filters, (num_radial + 1, width) each."""
        shape = (num_radial, self.num * self.width)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, shape[1:])
        table = jnp.concatenate([kernel, bias[None]]).astype(dtype)
        return jnp.split(table, self.num, axis=-1)


def append_one(rbf):
    """Append a constant function for the bias: (P, K) -> (P, K + 1).

    The envelope multiplies these, which are smaller than the filters (P, F).
    """
    return jnp.concatenate([rbf, jnp.ones_like(rbf[:, :1])], axis=-1)


def messages(phi, v, weights, direction, edge: Pairs):
    """Sum the messages of the neighbors (eqs. 7 and 8).

    Args:
      phi: Features for messages, shape (N, 3F).
      v: Vectors, shape (N, 3, F), or None for zero.
      weights: Filters of the scalars, of the radial vectors and of the neighbors' vectors, shape
        (P, F) each.
      direction: Unit vectors of the pairs, shape (P, 3).
      edge: Pairs.

    Returns:
      Changes of s, shape (N, F), and of v, shape (N, 3, F).
    """
    num = len(phi)
    to_scalar, to_radial, to_vector = jnp.split(phi, 3, axis=-1)
    vectors = None if v is None else [to_vector * v[:, x] for x in range(3)]

    def send(source, target, unit):
        ds = segment_sum(weights[0] * gather(to_scalar, source), target, num)
        radial, dv = weights[1] * gather(to_radial, source), []
        for x in range(3):
            # one Cartesian component at a time: (P, F)
            message = radial * unit[:, x, None]
            if vectors is not None:
                message = message + weights[2] * gather(vectors[x], source)
            dv.append(segment_sum(message, target, num))
        return ds, jnp.stack(dv, axis=1)

    ds, dv = send(edge.senders, edge.receivers, direction)
    if edge.undirected:
        back_s, back_v = send(edge.receivers, edge.senders, -direction)
        ds, dv = ds + back_s, dv + back_v
    return ds, dv


class Update(nn.Module):
    """Mixing of scalars and vectors of one atom (eqs. 9 and 10).

    Attributes:
      epsilon: Constant added under the square root of the vectors' norms.
    """

    epsilon: float

    @nn.compact
    def __call__(self, s, v):
        """Update s, shape (N, F), and v, shape (N, 3, F)."""
        width = s.shape[-1]
        u, w = jnp.split(Dense(2 * width, use_bias=False, name="mix")(v), 2, axis=-1)
        norm = jnp.sqrt(jnp.sum(u * u, axis=1) + self.epsilon)
        a = Dense(width, name="layer_1")(jnp.concatenate([s, norm], axis=-1))
        a_ss, a_vv, a_sv = jnp.split(Dense(3 * width, name="layer_2")(jax.nn.silu(a)), 3, axis=-1)
        return s + a_ss + a_sv * jnp.sum(u * w, axis=1), v + a_vv[:, None, :] * w
