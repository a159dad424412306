"""PaiNN: polarizable atom interaction network (Schütt, Unke, Gastegger, ICML 2021, arXiv:2102.03150).

Every atom carries scalars s (N, F) and vectors v (N, 3, F). Filters come from the distance alone, from one linear
layer for all interactions, and are computed once for each pair.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph

from mlip_jax.graphs.graph import Pairs, pairs
from mlip_jax.models.heads import AtomicEnergy, AtomOutputs, embed_elements
from mlip_jax.models.layers import Dense, cutoff_function, gather, radial_basis, safe_norm, segment_sum, unit_vectors


class Model(nn.Module):
    """PaiNN; the defaults are the published ones.

    Attributes:
      num_features: F. num_layers: Message and update blocks.
      cutoff: Å.
      radial_basis, num_radial: Basis of the distance (layers.RADIAL_BASES) and its size.
      cutoff_fn: Envelope of the filters (layers.CUTOFFS).
      epsilon: Added under the square root of the vectors' norms.
      energy_width, energy_act, zero_init, learned_scale, learned_shift: Of the energy head (heads.AtomicEnergy).
      undirected: False computes filters for both directions of each pair; the plain form, for tests.
    """

    num_features: int = 128
    num_layers: int = 3
    cutoff: float = 5.0
    radial_basis: str = "gaussian"
    num_radial: int = 20
    cutoff_fn: str = "cosine"
    epsilon: float = 1e-8
    energy_width: int | None = None
    energy_act: str = "silu"
    zero_init: bool = True
    learned_scale: bool = False
    learned_shift: bool = True
    undirected: bool = True

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        width, numbers = self.num_features, graph.nodes["numbers"]
        edge = pairs(graph, self.undirected)
        distances = safe_norm(edge.displacements)
        direction = unit_vectors(edge.displacements, distances)
        envelope = cutoff_function(self.cutoff_fn)(distances, self.cutoff)
        rbf = radial_basis(self.radial_basis)(distances, self.num_radial, self.cutoff)
        filters = Dense(3 * width * self.num_layers, name="filters")(rbf) * envelope[:, None]
        s = embed_elements(self, numbers, width, direction.dtype)
        v = jnp.zeros((len(numbers), 3, width), s.dtype)
        for n, weights in enumerate(jnp.split(filters, self.num_layers, axis=-1)):
            phi = Dense(width, name=f"message_{n}_layer_1")(s)
            phi = Dense(3 * width, name=f"message_{n}_layer_2")(jax.nn.silu(phi))
            ds, dv = messages(phi, None if n == 0 else v, weights, direction, edge)
            s, v = s + ds, v + dv
            s, v = Update(self.epsilon, name=f"update_{n}")(s, v)
        energies = AtomicEnergy(
            self.energy_width or width // 2, self.energy_act, self.zero_init, self.learned_scale, self.learned_shift,
            name="energy")(s, numbers)
        return AtomOutputs(energies, jnp.concatenate([s[:, None, None, :], v[:, None]], axis=2))


def messages(phi, v, weights, direction, edge: Pairs):
    """Messages of the neighbours (eqs. 7 and 8): (N, 3F), (N, 3, F) or None for zero, (P, 3F), (P, 3)
    -> (N, F), (N, 3, F)."""
    num, width = phi.shape[0], phi.shape[1] // 3

    def one_way(source, target, unit):
        x = gather(phi, source) * weights
        ds, dv_radial, dv_own = jnp.split(x, 3, axis=-1)
        dv = dv_radial[:, None, :] * unit[:, :, None]
        if v is not None:
            dv = dv + dv_own[:, None, :] * gather(v, source)
        packed = jnp.concatenate([ds[:, None, :], dv], axis=1).reshape(len(unit), 4 * width)
        return segment_sum(packed, target, num)

    total = one_way(edge.senders, edge.receivers, direction)
    if edge.undirected:
        total = total + one_way(edge.receivers, edge.senders, -direction)
    total = total.reshape(num, 4, width)
    return total[:, 0], total[:, 1:]


class Update(nn.Module):
    """Mixing of scalars and vectors of one atom (eqs. 9 and 10)."""

    epsilon: float

    @nn.compact
    def __call__(self, s, v):
        width = s.shape[-1]
        u, w = jnp.split(Dense(2 * width, use_bias=False, name="mix")(v), 2, axis=-1)
        norm = jnp.sqrt(jnp.sum(u * u, axis=1) + self.epsilon)
        a = Dense(width, name="layer_1")(jnp.concatenate([s, norm], axis=-1))
        a_ss, a_vv, a_sv = jnp.split(Dense(3 * width, name="layer_2")(jax.nn.silu(a)), 3, axis=-1)
        return s + a_ss + a_sv * jnp.sum(u * w, axis=1), v + a_vv[:, None, :] * w
