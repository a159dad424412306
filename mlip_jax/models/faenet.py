"""FAENet: frame averaging equivariant network (Duval et al., ICML 2023, arXiv:2305.05577).

Messages depend on Cartesian coordinates in a frame of the molecule, so the network is not invariant
itself. Its outputs are averaged over the frames of layers/frames.py. This is the variant "simple"
of the paper, which Force2Geo trains; with the options of importers/faenet.py it agrees with the
authors' code.

Two properties of the published method remain, whatever the options:

- Forces are derivatives at fixed frames, as published. Frames turn with the atoms, so forces are
  not the gradient of the energy. They deviate from it by 10 to 100 %, and dynamics do not conserve
  energy.
- Energy and forces jump where two principal moments of the molecule are equal.

The energy is not extensive: frames and graph norms depend on the whole structure. In a crystal they
also depend on the choice of the cell.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph

from mlip_jax.config import unknown_name
from mlip_jax.graphs.element_rows import element_rows
from mlip_jax.graphs.graph import Pairs, node_graph_index, pairs, spread_by_graph
from mlip_jax.models.layers.basic import (
    STEP,
    Dense,
    cutoff_function,
    gather,
    gaussian_basis,
    safe_norm,
    segment_sum,
)
from mlip_jax.models.layers.element_properties import GROUPS, PERIODS, PROPERTIES
from mlip_jax.models.layers.frames import FRAMES, GraphNorm, principal_axes
from mlip_jax.models.layers.gated_energy import xavier
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER, AtomOutputs, embed_elements

SKIPS = ("concat", "add", "none")


class Model(nn.Module):
    """FAENet with simple messages; the defaults are the published ones except `cutoff_fn`.

    Published messages do not vanish at the cutoff. The default multiplies them by a cutoff
    function.

    Attributes:
      num_features: Number of features F, also of the filters.
      num_layers: Number of interaction blocks.
      cutoff: Cutoff radius (Å).
      num_radial: Number of Gaussians of the distance, from 0 to the cutoff.
      cutoff_fn: Factor of the filters (layers.CUTOFFS); "step" as published.
      frames: "all": 8 frames; energies are invariant under rotation and reflection. "proper": the 4
        frames that are rotations; energies are invariant under rotation only.
      element_features: "properties": features of an element are learned vectors for the element,
        its period and its group, and tabulated physical properties, mixed by one or two layers.
        "table": one learned vector per element.
      num_period_features: Number of features of the period, and of the group.
      two_layers: Whether the embeddings of elements and edges have a second layer.
      two_layer_updates: Whether the update of an interaction block has a second layer.
      graph_norm: Whether sums of messages are normalized over the atoms of a molecule.
      skip: Energies of the features before each interaction: "concat": weighted by learned numbers,
        "add": added, "none": not used.
      weighted: Whether atomic energies are multiplied by a linear function of the features.
      graph_bias: Whether a learned number is added to the energy of each structure, whatever its
        size; only with "concat".
      zero_init: Whether the last kernel of the energy head starts at zero.
      learned_shift: Whether there is a learned energy per element.
      undirected: False computes filters for both directions of each pair; this plain form is for
        tests. The frames "proper" always use it.
    """

    neighbor_slots = True  # see graphs/neighbor_slots.py

    num_features: int = 128
    num_layers: int = 4
    cutoff: float = 6.0
    num_radial: int = 50
    cutoff_fn: str = "cosine"
    frames: str = "all"
    element_features: str = "properties"
    num_period_features: int = 32
    two_layers: bool = True
    two_layer_updates: bool = False
    graph_norm: bool = True
    skip: str = "concat"
    weighted: bool = False
    graph_bias: bool = False
    zero_init: bool = True
    learned_shift: bool = True
    undirected: bool = True

    conservative = False  # forces are derivatives at fixed frames
    extensive = False  # frames and graph norms depend on the whole structure

    @property
    def smooth(self) -> bool:
        """Whether energies and forces are continuous where a pair crosses the cutoff."""
        return self.cutoff_fn != STEP

    @property
    def mirror_symmetric(self) -> bool:
        """Whether a mirror image has the same energy."""
        return self.frames == "all"

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        for option, value, known in (
            ("frames", self.frames, FRAMES),
            ("skip", self.skip, SKIPS),
            ("element_features", self.element_features, ("properties", "table")),
        ):
            if value not in known:
                raise ValueError(unknown_name(option, value, known))
        width, numbers = self.num_features, graph.nodes["numbers"]
        # axis 1 are the frames: filters (P, K, F), features h (N, K, F), at first equal in all
        edge = pairs(graph, self.undirected and self.frames == "all", slots=True)
        filters = self._filters(edge, graph)
        h = self._embed(numbers, filters.dtype)[:, None, :]
        head = FrameEnergy(self.weighted, self.zero_init, name="energy")
        energies = [head(h)]
        for n in range(self.num_layers):
            m = frame_messages(h, filters, edge)
            if self.graph_norm:
                m = jax.nn.silu(GraphNorm(name=f"norm_{n}")(m, graph))
            for layer in range(1 + self.two_layer_updates):
                m = jax.nn.silu(
                    Dense(width, kernel_init=xavier, name=f"update_{n}_layer_{layer + 1}")(m)
                )
            h = h + m
            energies.append(head(h))
        # averages over the frames: atomic energies (N,), features (N, 1, 1, F)
        atomic = self._combine([e.mean(1) for e in energies], graph)
        if self.learned_shift:
            shift = self.param("shift", nn.initializers.zeros, (MAX_ATOMIC_NUMBER + 1,))
            atomic = atomic + element_rows(shift, numbers, atomic.dtype)
        return AtomOutputs(atomic, h.mean(1)[:, None, None, :])

    def _filters(self, edge: Pairs, graph):
        """Return the filters of the pairs in each frame, shape (P, K, F)."""
        width, distances = self.num_features, safe_norm(edge.displacements)
        axes = spread_by_graph(principal_axes(graph), node_graph_index(graph))
        axes = gather(axes, edge.receivers)  # (P, 3, 3)
        exact = jax.lax.Precision.HIGHEST
        local = jnp.einsum("px,pxy->py", edge.displacements, axes, precision=exact)
        local = local[:, None, :] * FRAMES[self.frames].astype(local.dtype)  # (P, K, 3)
        rbf = gaussian_basis(distances, self.num_radial, self.cutoff)
        vectors = Dense(width // 2, kernel_init=xavier, name="edge_vectors")(local)
        lengths = Dense(width - width // 2, kernel_init=xavier, name="edge_distances")(rbf)[
            :, None, :
        ]
        lengths = jnp.broadcast_to(lengths, (*vectors.shape[:2], lengths.shape[-1]))
        e = jax.nn.silu(jnp.concatenate([vectors, lengths], axis=-1))
        if self.two_layers:
            e = jax.nn.silu(Dense(width, kernel_init=xavier, name="edge_layer_2")(e))
        return e * cutoff_function(self.cutoff_fn)(distances, self.cutoff)[:, None, None]

    def _embed(self, numbers, dtype):
        """Return the initial features of atoms, shape (N, F)."""
        width = self.num_features
        if self.element_features == "table":
            return embed_elements(self, numbers, width, dtype)
        # F features in total as published, but some learned ones also if F is small
        used = PROPERTIES.shape[1] + 2 * self.num_period_features
        learned = max(width - used, width // 4)
        parts = [
            embed_elements(self, numbers, learned, dtype),
            jnp.asarray(PROPERTIES, dtype)[numbers],
        ]
        if self.num_period_features:
            for name, table in (("period", PERIODS), ("group", GROUPS)):
                shape = (int(table.max()) + 1, self.num_period_features)
                vectors = self.param(name, nn.initializers.normal(1.0), shape)
                parts.append(element_rows(vectors, jnp.asarray(table)[numbers], dtype))
        h = jnp.concatenate(parts, axis=-1)
        for layer in range(1 + self.two_layers):
            h = jax.nn.silu(Dense(width, kernel_init=xavier, name=f"embed_layer_{layer + 1}")(h))
        return h

    def _combine(self, energies, graph):
        """Return atomic energies (N,) from those before each interaction and after the last one."""
        if self.skip == "none":
            return energies[-1]
        if self.skip == "add":
            return sum(energies)
        init = nn.initializers.constant(1.0 / len(energies))
        weights = self.param("skip_weights", init, (len(energies),)).astype(energies[0].dtype)
        atomic = sum(w * e for w, e in zip(weights, energies))
        if self.graph_bias:
            share = self.param("graph_bias", nn.initializers.zeros, ()).astype(
                atomic.dtype
            ) / jnp.maximum(graph.n_node, 1)
            atomic = atomic + spread_by_graph(share, node_graph_index(graph))
        return atomic


class FrameEnergy(nn.Module):
    """Energy head, Dense -> SiLU -> Dense(1): (N, K, F) -> (N, K).

    Attributes:
      weighted: Whether the result is multiplied by a linear function of the features.
      zero_init: Whether the last kernel starts at zero.
    """

    weighted: bool
    zero_init: bool

    @nn.compact
    def __call__(self, h):
        init = nn.initializers.zeros if self.zero_init else xavier
        hidden = jax.nn.silu(Dense(h.shape[-1] // 2, kernel_init=xavier, name="hidden")(h))
        energies = Dense(1, kernel_init=init, name="final")(hidden)
        if self.weighted:
            energies = energies * Dense(1, kernel_init=xavier, name="weight")(h)
        return energies[..., 0]


def frame_messages(h, filters, edge: Pairs):
    """Sum features times filters over the neighbors in each frame.

    The shapes (N, K, F) and (P, K, F) become (N, K, F).

    The vector of a pair in the reverse direction has the coordinates of the inverse frame, so the
    filters of the reverse direction are those of the frames in reverse order.
    """
    total = segment_sum(gather(h, edge.senders) * filters, edge.receivers, len(h))
    if edge.undirected:
        total = total + segment_sum(
            gather(h, edge.receivers) * filters[:, ::-1], edge.senders, len(h)
        )
    return total
