"""What a model gets of a list with a skin: the edges within the cutoff. Pure."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jraph

from mlip_jax.graphs.graph import node_graph_index, pairs

# Distances that the model finds a little shorter by another order of its sums.
_ROUNDING = 1e-5


def near(graph: jraph.GraphsTuple, cutoff: float, length: int) -> tuple[jraph.GraphsTuple, jax.Array]:
    """The graph with the edges alone that are within the cutoff, in their order, and how many there are, () int32.

    Nothing is lost: longer edges add nothing to a model's messages. Distances that are no numbers count as near, so
    that they are seen. The graph is whole if there are no more than `length`.

    Args:
      graph: As graphs/graph.py lays it out, with `pair_order`; its long-range pairs stay as they are.
      cutoff: Å. length: Edges of the result, padding included; even.
    """
    order = graph.edges["pair_order"]
    num_pairs, num_edges = order.shape[0] // 2, graph.receivers.shape[0]
    vectors = pairs(graph).displacements
    close = ~((vectors * vectors).sum(-1) > (cutoff * (1 + _ROUNDING)) ** 2)
    marked = jnp.zeros(num_edges, bool).at[order].set(jnp.concatenate([close, close]))
    place, edges = _places(marked, length)
    _, chosen = _places(close, length // 2)
    count = 2 * close.sum(dtype=jnp.int32)
    used = jnp.arange(length) < count
    pad = 2 * jnp.arange(length // 2)
    forward, reverse = place[order[:num_pairs][chosen]], place[order[num_pairs:][chosen]]
    new_order = jnp.concatenate([jnp.where(used[::2], forward, pad), jnp.where(used[::2], reverse, pad + 1)])
    idle = graph.n_node[:-1].sum()  # the first padding atom, which padding edges join to itself
    receivers = jnp.where(used, graph.receivers[edges], idle)
    of = jnp.where(used, node_graph_index(graph)[receivers], graph.n_edge.shape[0] - 1)
    kept = {"pair_order": new_order.astype(jnp.int32)}
    if "shifts" in graph.edges:
        kept["shifts"] = jnp.where(used[:, None], graph.edges["shifts"][edges], 0)
    return graph._replace(
        receivers=receivers, senders=jnp.where(used, graph.senders[edges], idle), edges=graph.edges | kept,
        n_edge=jnp.zeros_like(graph.n_edge).at[of].add(1)), count


def _places(marked, length):
    """The place of each in a list of the marked ones alone, and which stand at the `length` places of that list."""
    place = jnp.cumsum(marked, dtype=jnp.int32) - 1
    which = jnp.zeros(length, jnp.int32).at[jnp.where(marked, place, length)].set(
        jnp.arange(marked.shape[0], dtype=jnp.int32), mode="drop")
    return place, which
