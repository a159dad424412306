"""Selection of the edges within the cutoff from a list with a skin. Pure."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jraph

from mlip_jax.graphs.graph import node_graph_index, pairs

# _ROUNDING: relative difference of a distance by another order of summation in the model.
_ROUNDING = 1e-5


def edges_within_cutoff(
    graph: jraph.GraphsTuple, cutoff: float, length: int
) -> tuple[jraph.GraphsTuple, jax.Array]:
    """Return the graph with only the edges within the cutoff, in order, and their number, () int32.

    The result of a model is unchanged: the messages of longer edges are zero. NaN distances count
    as within the cutoff, so that they reach the result. The graph is complete if the number is at
    most `length`.

    Args:
      graph: Graph in the layout of graphs/graph.py, with `pair_order`. Its long-range pairs are
        kept.
      cutoff: Cutoff radius (Å).
      length: Number of edges of the result, including padding; even.
    """
    order = graph.edges["pair_order"]
    num_pairs, num_edges = order.shape[0] // 2, graph.receivers.shape[0]
    vectors = pairs(graph).displacements
    # (pairs,); negated, so that NaN counts as close
    close = ~((vectors * vectors).sum(-1) > (cutoff * (1 + _ROUNDING)) ** 2)
    marked = jnp.zeros(num_edges, bool).at[order].set(jnp.concatenate([close, close]))
    rank, edges = _rank(marked, length)
    _, chosen = _rank(close, length // 2)
    count = 2 * close.sum(dtype=jnp.int32)
    used = jnp.arange(length) < count
    pad = 2 * jnp.arange(length // 2)
    forward, reverse = rank[order[:num_pairs][chosen]], rank[order[num_pairs:][chosen]]
    new_order = jnp.concatenate(
        [jnp.where(used[::2], forward, pad), jnp.where(used[::2], reverse, pad + 1)]
    )
    idle = graph.n_node[:-1].sum()  # the first padding atom; padding edges are self-loops on it
    receivers = jnp.where(used, graph.receivers[edges], idle)
    owner = jnp.where(used, node_graph_index(graph)[receivers], graph.n_edge.shape[0] - 1)
    kept = {"pair_order": new_order.astype(jnp.int32)}
    if "shifts" in graph.edges:
        kept["shifts"] = jnp.where(used[:, None], graph.edges["shifts"][edges], 0)
    return graph._replace(
        receivers=receivers,
        senders=jnp.where(used, graph.senders[edges], idle),
        edges=graph.edges | kept,
        n_edge=jnp.zeros_like(graph.n_edge).at[owner].add(1),
    ), count


def _rank(marked: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Return the rank of each item among the marked ones, and the first `length` marked items."""
    rank = jnp.cumsum(marked, dtype=jnp.int32) - 1
    items = (
        jnp.zeros(length, jnp.int32)
        .at[jnp.where(marked, rank, length)]
        .set(jnp.arange(marked.shape[0], dtype=jnp.int32), mode="drop")
    )
    return rank, items
