"""Layout of structures as jraph.GraphsTuple, and displacement vectors of their edges.

    nodes   {"positions": (N, 3) Å, "numbers": (N,) int32, "forces": (N, 3) eV/Å or absent}
    edges   {"pair_order": (E,) int32, "shifts": (E, 3) or absent,
             "long_range": see below, or absent,
             "slots": NeighborSlots (graphs/neighbor_slots.py), or absent}
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

from mlip_jax.graphs.slot_sums import SlotIndex, take
from mlip_jax.target_device import target_platform

# _FAR: distance (Å) beyond every cutoff; its square is finite in float32 and in bfloat16.
_FAR = 1e4
# _MAX_MASK: number of graphs times nodes up to which sums by graph are sums of masked values.
_MAX_MASK = 2**28


class Pairs(NamedTuple):
    """Edges that a model works on.

    Attributes:
      receivers: Index of atom i of each edge, shape (P,); a `SlotIndex` if slots were requested.
      senders: Index of atom j of each edge, likewise.
      displacements: positions[senders] - positions[receivers] + shifts @ cell (Å), shape (P, 3).
        Padding edges, which connect an atom to itself, are longer than every cutoff.
      undirected: If True, each pair appears once and sends messages both ways (P = E / 2). If
        False, the list is directed and only the receivers get messages (P = E).
    """

    receivers: jax.Array | SlotIndex
    senders: jax.Array | SlotIndex
    displacements: jax.Array
    undirected: bool


class SlotGeometry(NamedTuple):
    """Neighbors in slots with their displacements.

    Attributes:
      senders: `NeighborSlots.senders`, shape (N, K).
      displacements: As in `Pairs` (Å), shape (N, K, 3).
      directions: Unit vectors, shape (N, K, 3); see `with_directions`.
    """

    senders: jax.Array
    displacements: jax.Array
    directions: jax.Array | None = None


def node_graph_index(graph: jraph.GraphsTuple) -> jax.Array:
    """Return the index of the graph of each node, shape (N,)."""
    n_graph = graph.n_node.shape[0]
    n = jax.tree.leaves(graph.nodes)[0].shape[0]
    if target_platform() == "cpu":
        return jnp.repeat(jnp.arange(n_graph), graph.n_node, total_repeat_length=n)
    # the form above has a scatter operation
    end, node = jnp.cumsum(graph.n_node)[:-1], jnp.arange(n, dtype=jnp.int32)
    return jnp.searchsorted(end, node, side="right", method="compare_all").astype(jnp.int32)


def sum_by_graph(values: jax.Array, node_graph: jax.Array, num: int) -> jax.Array:
    """Sum values of the nodes of each graph: (N, ...) -> (num, ...).

    Args:
      values: Values of the nodes.
      node_graph: Graph of each node, ascending; nodes of other graphs do not count.
      num: Number of graphs.
    """
    if target_platform() == "cpu" or num * values.size > _MAX_MASK:
        return jax.ops.segment_sum(values, node_graph, num, indices_are_sorted=True)
    # without atomic operations, so that the result is the same in every run
    return _of_graph(values, node_graph, num, jnp.zeros((), values.dtype)).sum(1)


def max_by_graph(values: jax.Array, node_graph: jax.Array, num: int, lowest: int) -> jax.Array:
    """Return the largest integer of the nodes of each graph, `lowest` without any: (N,) -> (num,).

    Args:
      values: Values of the nodes, at least `lowest`.
      node_graph: Graph of each node; nodes of other graphs do not count.
      num: Number of graphs.
      lowest: Smallest value.
    """
    if target_platform() == "cpu" or num * len(values) > _MAX_MASK:
        return jnp.maximum(jax.ops.segment_max(values, node_graph, num), lowest)
    return _of_graph(values, node_graph, num, lowest).max(1, initial=lowest)


def spread_by_graph(values: jax.Array, node_graph: jax.Array) -> jax.Array:
    """Return the value of the graph of each node: (G, ...) -> (N, ...), the transpose of sum_by_graph.

    Args:
      values: Values of the graphs.
      node_graph: Graph of each node.
    """
    if target_platform() == "cpu" or len(node_graph) * values.size > _MAX_MASK:
        return values[node_graph]
    # not a product with zeros, which would spread NaN to other graphs
    mask = node_graph == jnp.arange(len(values), dtype=node_graph.dtype)[:, None]
    mask = mask.reshape(*mask.shape, *[1] * (values.ndim - 1))
    found = jnp.where(mask, values[:, None], jnp.zeros((), values.dtype)).sum(0)
    return found.astype(values.dtype)


def _of_graph(values, node_graph, num, other):
    """Return the values of the nodes of each graph, `other` for nodes of others, (num, N, ...)."""
    mask = node_graph == jnp.arange(num, dtype=node_graph.dtype)[:, None]
    return jnp.where(mask.reshape(*mask.shape, *[1] * (values.ndim - 1)), values, other)


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
    if isinstance(senders, SlotIndex):
        vectors, receivers = take(positions, senders) - take(positions, receivers), receivers.atoms
    else:
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


def pairs(graph: jraph.GraphsTuple, undirected: bool = True, slots: bool = False) -> Pairs:
    """Return the edges of the graph as `Pairs`.

    Each pair appears once if `undirected` is True and the graph has a `pair_order`; otherwise the
    list is directed.

    Args:
      graph: Graph.
      undirected: Whether to list each pair once.
      slots: Whether the indices are `SlotIndex` if the graph has slots. `layers.basic.gather` and
        `segment_sum` accept them.
    """
    order = graph.edges.get("pair_order") if undirected else None
    receivers, senders, shifts = graph.receivers, graph.senders, graph.edges.get("shifts")
    if order is not None:
        forward = order[: order.shape[0] // 2]  # one edge of each pair, (E / 2,)
        receivers, senders = receivers[forward], senders[forward]
        shifts = None if shifts is None else shifts[forward]
    found = Pairs(receivers, senders, None, order is not None)
    neighbor_slots = graph.edges.get("slots") if slots else None
    if neighbor_slots is not None:
        found = Pairs(*neighbor_slots.pair_indices(found), None, found.undirected)
    if neighbor_slots is None:
        # indices of its own: So3krates is a fifth slower on CPUs if XLA shares them with the sums
        vectors = displacements(graph, None if order is None else forward)
    else:
        vectors = _vectors(graph, found.receivers, found.senders, shifts)
    # Messages of thousands of padding edges to a single atom would add up to infinity after a few
    # layers, so padding edges get a length beyond the cutoff.
    padding = (receivers == senders) & (vectors == 0).all(axis=-1)
    vectors = jnp.where(padding[:, None], jnp.asarray([_FAR, 0.0, 0.0], vectors.dtype), vectors)
    return found._replace(displacements=vectors)


def slot_geometry(graph: jraph.GraphsTuple) -> SlotGeometry | None:
    """Return neighbors and displacements in slots, None if the graph has no slots.

    In empty slots, displacements are longer than every cutoff.
    """
    slots = graph.edges.get("slots")
    if slots is None:
        return None
    positions, shape = graph.nodes["positions"], slots.senders.shape
    vectors = take(positions, slots.slot_senders()).reshape(*shape, 3) - positions[:, None]
    shifts = graph.edges.get("shifts")
    if shifts is not None:
        cell = graph.globals["cell"][node_graph_index(graph)]  # (N, 3, 3)
        vectors = vectors + jnp.einsum(
            "nkc,ncx->nkx",
            shifts[slots.edge].astype(cell.dtype),
            cell,
            precision=jax.lax.Precision.HIGHEST,
        )
    far = jnp.asarray([_FAR, 0.0, 0.0], vectors.dtype)
    return SlotGeometry(slots.senders, jnp.where(slots.used[..., None], vectors, far))


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
