"""Molecules as dense arrays: tokens, pairs of tokens, and shortest paths along bonds."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph

from mlip_jax.graphs.graph import node_graph_index

UNREACHABLE = 510  # path between atoms of different fragments


class TokenIndex(NamedTuple):
    """Places of the atoms of a batch in arrays of G molecules with M atoms each.

    Attributes:
      graph: Molecule of each atom, (N,).
      slot: Place of each atom in its molecule, (N,). Padding atoms can be beyond the end.
      mask: Whether a place is filled, (G, M).
    """

    graph: jax.Array
    slot: jax.Array
    mask: jax.Array

    def scatter(self, values: jax.Array) -> jax.Array:
        """Return values of atoms in dense form, zero elsewhere: (N, ...) -> (G, M, ...)."""
        empty = jnp.zeros((*self.mask.shape, *values.shape[1:]), values.dtype)
        return empty.at[self.graph, self.slot].set(values, mode="drop")

    def gather(self, values: jax.Array) -> jax.Array:
        """Return dense values by atom: (G, M, ...) -> (N, ...)."""
        return values[self.graph, jnp.minimum(self.slot, self.mask.shape[1] - 1)]


def token_index(graph: jraph.GraphsTuple, num_atoms: int) -> TokenIndex:
    """Return the places of the atoms in molecules of at most `num_atoms` atoms."""
    of_node, first = node_graph_index(graph), jnp.cumsum(graph.n_node) - graph.n_node
    slot = jnp.arange(len(of_node)) - first[of_node]
    count = jnp.where(jraph.get_graph_padding_mask(graph), graph.n_node, 0)
    return TokenIndex(of_node, slot, jnp.arange(num_atoms)[None] < count[:, None])


def dense_bonds(graph: jraph.GraphsTuple, index: TokenIndex) -> jax.Array:
    """Return the features of bonds plus one, zero for other pairs, (G, M, M, 3)."""
    features = graph.edges["bond_features"] + 1
    num = index.mask.shape[1]
    empty = jnp.zeros((index.mask.shape[0], num, num, features.shape[1]), features.dtype)
    place = index.graph[graph.senders], index.slot[graph.senders], index.slot[graph.receivers]
    return empty.at[place].set(features, mode="drop")


def shortest_paths(bonded: jax.Array) -> jax.Array:
    """Return the number of bonds between atoms, UNREACHABLE without a path: (G, M, M)."""
    num = bonded.shape[1]
    start = jnp.where(bonded, 1, UNREACHABLE)
    start = jnp.where(jnp.eye(num, dtype=bool), 0, start)

    def through(k, paths):
        row = jax.lax.dynamic_slice_in_dim(paths, k, 1, axis=1)
        column = jax.lax.dynamic_slice_in_dim(paths, k, 1, axis=2)
        return jnp.minimum(paths, column + row)

    return jnp.minimum(jax.lax.fori_loop(0, num, through, start), UNREACHABLE)
