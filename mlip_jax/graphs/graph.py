"""jraph.GraphsTuple of structures: what the fields hold, and how displacements come of them.

    nodes   {"positions": (N, 3) Å, "numbers": (N,) int32, "forces": (N, 3) eV/Å or absent}
    edges   {"pair_order": (E,) int32, "shifts": (E, 3) or absent, "long_range": see below, or absent}
    globals {"energy": (G,) eV or absent, "charge": (G,) e, "cell": (G, 3, 3) Å or absent,
             "spin": (G,) number of unpaired electrons, or absent for 0}

    edges["long_range"] {"receivers": (P,) int32, "senders": (P,) int32, "shifts": (P, 3) int32 or absent}

N, E, G and P count padding too. Energies on the device are remainders after the reference energies. The long-range
list holds every pair once, whatever its order; its padding pairs join the first padding atom to itself.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph

# Å, beyond every cutoff; its square is still a number in float32 (and in bfloat16).
_FAR = 1e4


class Pairs(NamedTuple):
    """The edges that a model works on.

    Attributes:
      receivers, senders: Shape (P,), atoms i and j.
      displacements: positions[senders] - positions[receivers] + shifts @ cell, shape (P, 3), Å; of padding edges, which
        join an atom to itself, beyond every cutoff.
      undirected: True: each pair stands here once and what flows along it flows both ways (P = E / 2).
        False: the list is directed and messages go to the receivers alone (P = E).
    """

    receivers: jax.Array
    senders: jax.Array
    displacements: jax.Array
    undirected: bool


def node_graph_index(graph: jraph.GraphsTuple) -> jax.Array:
    """Index of the graph of each node, shape (N,)."""
    n_graph = graph.n_node.shape[0]
    n = jax.tree.leaves(graph.nodes)[0].shape[0]
    return jnp.repeat(jnp.arange(n_graph), graph.n_node, total_repeat_length=n)


def displacements(graph: jraph.GraphsTuple, edges: jax.Array | None = None) -> jax.Array:
    """positions[senders] - positions[receivers] + shifts @ cell, shape (E, 3) or (len(edges), 3), Å."""
    senders, receivers, shifts = graph.senders, graph.receivers, graph.edges.get("shifts")
    if edges is not None:
        senders, receivers = senders[edges], receivers[edges]
        shifts = None if shifts is None else shifts[edges]
    return _vectors(graph, receivers, senders, shifts)


def _vectors(graph, receivers, senders, shifts):
    positions = graph.nodes["positions"]
    vectors = positions[senders] - positions[receivers]
    if shifts is not None:
        cell = graph.globals["cell"][node_graph_index(graph)[receivers]]
        vectors = vectors + _translations(shifts, cell)
    return vectors


def _translations(shifts, cell):
    # a product in bfloat16 or TF32, as some devices have it, would be off by hundredths of an Å
    return jnp.einsum("ec,ecx->ex", shifts.astype(cell.dtype), cell, precision=jax.lax.Precision.HIGHEST)


def pairs(graph: jraph.GraphsTuple, undirected: bool = True) -> Pairs:
    """The edges as pairs, each once if the graph knows its `pair_order` and `undirected` is asked for."""
    order = graph.edges.get("pair_order") if undirected else None
    if order is None:
        receivers, senders, vectors = graph.receivers, graph.senders, displacements(graph)
    else:
        forward = order[:order.shape[0] // 2]
        receivers, senders, vectors = graph.receivers[forward], graph.senders[forward], displacements(graph, forward)
    # thousands of padding edges at one atom would add up there, layer upon layer, to what is no number any more
    padding = (receivers == senders) & (vectors == 0).all(axis=-1)
    vectors = jnp.where(padding[:, None], jnp.asarray([_FAR, 0.0, 0.0], vectors.dtype), vectors)
    return Pairs(receivers, senders, vectors, order is not None)


def long_range_pairs(graph: jraph.GraphsTuple) -> Pairs:
    """The pairs of the long-range list, each once.

    Raises:
      ValueError: The graph has none.
    """
    listed = graph.edges.get("long_range")
    if listed is None:
        raise ValueError(
            f"this graph has no long-range pairs: expected edges['long_range'], found {sorted(graph.edges)}; give "
            "build_batch the long_range_cutoff of the model")
    receivers, senders = listed["receivers"], listed["senders"]
    return Pairs(receivers, senders, _vectors(graph, receivers, senders, listed.get("shifts")), True)
