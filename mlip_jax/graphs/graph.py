"""Layout of structures as jraph.GraphsTuple, and displacement vectors of their edges.

    nodes   {"positions": (N, 3) Å, "numbers": (N,) int32, "forces": (N, 3) eV/Å or absent}
    edges   {"pair_order": (E,) int32, "shifts": (E, 3) or absent,
             "long_range": see below, or absent}
    globals {"energy": (G,) eV or absent, "charge": (G,) e, "cell": (G, 3, 3) Å or absent,
             "spin": (G,) number of unpaired electrons, or absent for 0}

    edges["long_range"] {"receivers": (P,) int32, "senders": (P,) int32,
                         "shifts": (P, 3) int32 or absent}

N, E, G and P include padding. Energies on the device are total energies minus reference energies.
The long-range list contains every pair once, in either direction; its padding pairs connect the
first padding atom to itself.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np

# _FAR: distance (Å) beyond every cutoff; its square is finite in float32 and in bfloat16.
_FAR = 1e4


class Pairs(NamedTuple):
    """Edges that a model works on.

    Attributes:
      receivers: Index of atom i of each edge, shape (P,).
      senders: Index of atom j of each edge, shape (P,).
      displacements: positions[senders] - positions[receivers] + shifts @ cell (Å), shape (P, 3).
        Padding edges, which connect an atom to itself, are longer than every cutoff.
      undirected: If True, each pair appears once and sends messages both ways (P = E / 2). If
        False, the list is directed and only the receivers get messages (P = E).
    """

    receivers: jax.Array
    senders: jax.Array
    displacements: jax.Array
    undirected: bool


def node_graph_index(graph: jraph.GraphsTuple) -> jax.Array:
    """Return the index of the graph of each node, shape (N,)."""
    n_graph = graph.n_node.shape[0]
    n = jax.tree.leaves(graph.nodes)[0].shape[0]
    return jnp.repeat(jnp.arange(n_graph), graph.n_node, total_repeat_length=n)


def displacements(graph: jraph.GraphsTuple, edges: jax.Array | None = None) -> jax.Array:
    """Compute positions[senders] - positions[receivers] + shifts @ cell (Å).

    Args:
      graph: Graph.
      edges: Indices of edges; None for all.

    Returns:
      Displacements, shape (E, 3) or (len(edges), 3).
    """
    senders, receivers, shifts = graph.senders, graph.receivers, graph.edges.get("shifts")
    if edges is not None:
        senders, receivers = senders[edges], receivers[edges]
        shifts = None if shifts is None else shifts[edges]
    return _vectors(graph, receivers, senders, shifts)


def _vectors(graph, receivers, senders, shifts):
    positions = graph.nodes["positions"]
    vectors = positions[senders] - positions[receivers]
    if shifts is not None:
        cell = graph.globals["cell"][node_graph_index(graph)[receivers]]  # (E, 3, 3)
        vectors = vectors + _translations(shifts, cell)
    return vectors


def _translations(shifts, cell):
    # the default precision of some devices, bfloat16 or TF32, would be wrong by hundredths of an Å
    return jnp.einsum(
        "ec,ecx->ex", shifts.astype(cell.dtype), cell, precision=jax.lax.Precision.HIGHEST
    )


def pairs(graph: jraph.GraphsTuple, undirected: bool = True) -> Pairs:
    """Return the edges of the graph as `Pairs`.

    Each pair appears once if `undirected` is True and the graph has a `pair_order`; otherwise the
    list is directed.
    """
    order = graph.edges.get("pair_order") if undirected else None
    if order is None:
        receivers, senders, vectors = graph.receivers, graph.senders, displacements(graph)
    else:
        forward = order[: order.shape[0] // 2]  # one edge of each pair, (E / 2,)
        receivers, senders, vectors = (
            graph.receivers[forward],
            graph.senders[forward],
            displacements(graph, forward),
        )
    # Messages of thousands of padding edges to a single atom would add up to infinity after a few
    # layers, so padding edges get a length beyond the cutoff.
    padding = (receivers == senders) & (vectors == 0).all(axis=-1)
    vectors = jnp.where(padding[:, None], jnp.asarray([_FAR, 0.0, 0.0], vectors.dtype), vectors)
    return Pairs(receivers, senders, vectors, order is not None)


def long_range_pairs(graph: jraph.GraphsTuple) -> Pairs:
    """Return the pairs of the long-range list, each once.

    Raises:
      ValueError: The graph has no long-range list.
    """
    listed = graph.edges.get("long_range")
    if listed is None:
        raise ValueError(
            "the graph has no long-range pairs: expected edges['long_range'], received "
            f"{sorted(graph.edges)}. Pass the model's long_range_cutoff to build_batch."
        )
    receivers, senders = listed["receivers"], listed["senders"]
    return Pairs(
        receivers, senders, _vectors(graph, receivers, senders, listed.get("shifts")), True
    )


def example_graph(dtype=np.float32) -> jraph.GraphsTuple:
    """Return a small padded graph, a pair of atoms and padding.

    It is sufficient to initialize any model with any terms, also models of bonds (graphs/bonds.py).
    """
    return jraph.GraphsTuple(
        nodes={
            "positions": np.array([[0, 0, 0], [0, 0, 1], [0, 0, 0]], dtype),
            "numbers": np.array([6, 1, 0], np.int32),
            "atom_features": np.zeros((3, 9), np.int32),
        },
        edges={
            "pair_order": np.array([0, 2, 1, 3], np.int32),
            "long_range": {
                "receivers": np.array([0, 2], np.int32),
                "senders": np.array([1, 2], np.int32),
            },
            "bond_features": np.zeros((4, 3), np.int32),
        },
        senders=np.array([1, 0, 2, 2], np.int32),
        receivers=np.array([0, 1, 2, 2], np.int32),
        globals={"charge": np.zeros(2, dtype), "spin": np.zeros(2, dtype)},
        n_node=np.array([2, 1], np.int32),
        n_edge=np.array([2, 2], np.int32),
    )
