"""Directed edges with the index of their reverse, and the edges into each atom."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph

from mlip_jax.graphs.graph import pairs
from mlip_jax.models.layers.basic import gather, segment_sum


class DirectedEdges(NamedTuple):
    """Directed edges.

    Attributes:
      receivers: Index of atom i, (E,).
      senders: Index of atom j, (E,).
      vectors: r_i - r_j (Å), (E, 3).
      reverse: Index of the reverse of each edge, (E,). None: the second half reverses the first.
    """

    receivers: jax.Array
    senders: jax.Array
    vectors: jax.Array
    reverse: jax.Array | None

    def reversed(self, values: jax.Array) -> jax.Array:
        """Return the values of the reversed edges."""
        if self.reverse is None:
            return jnp.roll(values, len(values) // 2, axis=0)
        return gather(values, self.reverse)

    def undirected(self, values: jax.Array) -> jax.Array:
        """Return the values of the undirected pairs, (P, ...), of values equal in both directions.

        P is E / 2 if the second half reverses the first, and E otherwise.
        """
        return values[: len(values) // 2] if self.reverse is None else values

    def directed(self, values: jax.Array) -> jax.Array:
        """Return values of undirected pairs, (P, ...), for all edges, (E, ...)."""
        return jnp.concatenate([values, values]) if self.reverse is None else values

    def times(self, values: jax.Array, factors: jax.Array) -> jax.Array:
        """Multiply values of edges, (E, F), with factors of their undirected pairs, (P, F)."""
        # a product without copies of the factors
        halves = values.reshape(1 + (self.reverse is None), *factors.shape)
        return (halves * factors).reshape(values.shape)

    def plus(self, values: jax.Array, terms: jax.Array) -> jax.Array:
        """Add terms of undirected pairs, (P, F), to values of edges, (E, F)."""
        halves = values.reshape(1 + (self.reverse is None), *terms.shape)
        return (halves + terms).reshape(values.shape)


def directed_edges(graph: jraph.GraphsTuple) -> DirectedEdges:
    """Return both directions of all pairs."""
    edge = pairs(graph)
    i, j, d = edge.receivers, edge.senders, edge.displacements
    if edge.undirected:
        return DirectedEdges(
            jnp.concatenate([i, j]), jnp.concatenate([j, i]), jnp.concatenate([-d, d]), None
        )
    # Edges, sorted by their atoms and cells, and their reverses, sorted likewise, correspond.
    shifts = graph.edges.get("shifts")
    cells = [] if shifts is None else list(shifts.T)
    order = jnp.lexsort([*cells, j, i])
    reverse_order = jnp.lexsort([*(-n for n in cells), i, j])
    return DirectedEdges(i, j, -d, jnp.zeros_like(order).at[order].set(reverse_order))


class EdgesOfAtoms(NamedTuple):
    """Edges within the cutoff, grouped by the atom that they point to.

    Attributes:
      senders: Index of atom j of each edge, (E,).
      reverse: Index of the reverse of each edge, (E,).
      order: Indices of edges, sorted by receiver, (E,).
      first: Position in `order` of the first edge into each atom, (N,).
      count: Number of edges into each atom, (N,).
    """

    senders: jax.Array
    reverse: jax.Array
    order: jax.Array
    first: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, edge: DirectedEdges, within: jax.Array, num_atoms: int) -> EdgesOfAtoms:
        """Group edges.

        Args:
          edge: Edges.
          within: Whether each edge is shorter than the cutoff, (E,). Neighbor lists can contain
            longer ones, and padding.
          num_atoms: Number of atoms, N.
        """
        order = jnp.argsort(jnp.where(within, edge.receivers, num_atoms)).astype(jnp.int32)
        count = segment_sum(within.astype(jnp.int32), edge.receivers, num_atoms)
        reverse = edge.reversed(jnp.arange(len(order), dtype=jnp.int32))
        return cls(edge.senders, reverse, order, jnp.cumsum(count) - count, count)

    def into_senders(self, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return edges into the sender of each edge: (S,) -> indices and validity, (E, S).

        Args:
          slots: Positions among the edges into an atom.
        """
        place = gather(self.first, self.senders)[:, None] + slots
        edges = gather(self.order, jnp.minimum(place, len(self.order) - 1))
        is_edge = slots < gather(self.count, self.senders)[:, None]
        return edges, is_edge & (edges != self.reverse[:, None])
