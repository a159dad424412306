"""Neighbors of a padded graph in slots: K places per atom, for sums without scatter operations.

    N   atoms of the graph            K   slots per atom

The edges of a graph are sorted by receiver, so the neighbors of an atom are consecutive. With K
slots per atom, the sum over the neighbors of each atom is a sum along an axis. On devices that add
with atomic operations, this is faster and has the same result in every run.

A batch has slots if `add_neighbor_slots` was called; graphs/graph.py describes its edges, which
remain. Models that declare `neighbor_slots` (True or ALL_PAIRS) use them.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.graphs.graph import Pairs
from mlip_jax.graphs.shapes import round_up
from mlip_jax.graphs.slot_sums import SlotIndex
from mlip_jax.target_device import target_platform

# _MULTIPLE: granularity of K; sums over slots are in parts of equal length.
_MULTIPLE = 8
# _MAX_WASTE: slots per edge above which sums over slots move more bytes than those over edges.
_MAX_WASTE = 2.0
# _MAX_ATOMS: number of atoms, with padding, up to which slots for all pairs need no list.
_MAX_ATOMS = 72
# ALL_PAIRS: value of `neighbor_slots` of models whose neighbors may be beyond the cutoff.
ALL_PAIRS = "all_pairs"


class NeighborSlots(NamedTuple):
    """Slots of all atoms.

    Attributes:
      senders: Neighbor in each slot, shape (N, K), int32; the atom itself in empty slots.
      used: Whether the slot has an edge, shape (N, K), bool.
      reverse: Slot of the reverse edge in the flat array of slots, shape (N, K), int32; the slot
        itself if it is empty.
      edge: Index of the edge of each slot, shape (N, K), int32; any edge in empty slots. None if the
        slots are those of `all_pairs`, which do not depend on edges.
      place: Index of this edge in the pair order, shape (N, K), int32, or None likewise.
    """

    senders: jax.Array
    used: jax.Array
    reverse: jax.Array
    edge: jax.Array | None = None
    place: jax.Array | None = None

    def slot_senders(self) -> SlotIndex:
        """Return the index of the senders of all slots, as pairs in the flat array (N K,)."""
        return SlotIndex(self.senders.ravel(), self.reverse, self.used)

    def pair_indices(self, pairs: Pairs) -> tuple[SlotIndex, SlotIndex]:
        """Return the indices of receivers and senders of a list of pairs.

        Args:
          pairs: Pairs of the graph, each once or directed.
        """
        if not pairs.undirected:
            half = self.place.shape  # the reverse edge is the one whose sender is this atom
            back = self.edge.ravel()[self.reverse].reshape(half)
            return (
                SlotIndex(pairs.receivers, self.edge, self.used),
                SlotIndex(pairs.senders, back, self.used),
            )
        num = len(pairs.receivers)
        forward = self.place < num
        return (
            SlotIndex(pairs.receivers, jnp.where(forward, self.place, 0), self.used & forward),
            SlotIndex(pairs.senders, jnp.where(forward, 0, self.place - num), self.used & ~forward),
        )


def wants_slots(model: nn.Module | None) -> bool:
    """Return whether batches of a model should have slots on the device that programs are for.

    On a TPU, reading the rows of neighbors in slots would take many copies.
    """
    return bool(getattr(model, "neighbor_slots", False)) and target_platform() == "gpu"


def choose_capacity(model: nn.Module | None, max_neighbors: int, mean_neighbors: float) -> int:
    """Return the number of slots per atom (K), 0 if batches should have none.

    Args:
      model: Model, or None for no slots.
      max_neighbors: Largest number of neighbors of an atom.
      mean_neighbors: Mean number of neighbors of an atom.
    """
    capacity = round_up(max(max_neighbors, 1), _MULTIPLE)
    if not wants_slots(model) or capacity > _MAX_WASTE * max(mean_neighbors, 1.0):
        return 0
    return capacity


def max_neighbors(receivers: np.ndarray, first_edge: np.ndarray) -> int:
    """Return the largest number of neighbors of an atom.

    Args:
      receivers: Receiving atoms of the edges of all structures, sorted in each structure and
        numbered from 0 there, shape (E,).
      first_edge: Index of the first edge of each structure, then E; shape (S + 1,).
    """
    if not len(receivers):
        return 0
    begins = np.flatnonzero(np.diff(receivers.astype(np.int64))) + 1
    begins = np.union1d(np.concatenate([[0], begins]), first_edge)
    return int(np.diff(begins).max())


def add_neighbor_slots(graph: jraph.GraphsTuple, capacity: int) -> jraph.GraphsTuple:
    """Return the graph with `capacity` slots per atom in edges["slots"].

    The function is pure; call it under jit. If an atom has more neighbors all positions are NaN,
    since an error cannot be raised under jit. Choose the capacity such that they fit.

    Args:
      graph: Padded graph with `pair_order`.
      capacity: Number of slots per atom (K), at least 1; 0 returns the graph as it is.
    """
    if not capacity:
        return graph
    receivers, senders = graph.receivers, graph.senders
    num_nodes, num_edges = graph.nodes["positions"].shape[0], receivers.shape[0]
    atoms = jnp.arange(num_nodes, dtype=jnp.int32)
    first = _first_edges(receivers, num_nodes)
    count = first[1:] - first[:-1]
    # padding edges connect an atom to itself within the cell
    padding = receivers == senders
    if "shifts" in graph.edges:
        padding &= (graph.edges["shifts"] == 0).all(-1)
    slot = jnp.arange(capacity, dtype=jnp.int32)
    edge = jnp.minimum(first[:-1, None] + slot, num_edges - 1)  # (N, K)
    used = (slot < count[:, None]) & ~padding[edge]
    overflow = ((count > capacity) & ~padding[jnp.minimum(first[:-1], num_edges - 1)]).any()
    order = graph.edges["pair_order"]
    place = _inverse(order)
    back = order[(place + num_edges // 2) % num_edges][edge]  # the reverse edge, (N, K)
    reverse = receivers[back] * capacity + back - first[receivers[back]]
    slots = NeighborSlots(
        jnp.where(used, senders[edge], atoms[:, None]),
        used,
        jnp.where(used, reverse, atoms[:, None] * capacity + slot).astype(jnp.int32),
        edge,
        place[edge],
    )
    positions = jnp.where(overflow, jnp.nan, graph.nodes["positions"])
    return graph._replace(
        nodes={**graph.nodes, "positions": positions}, edges={**graph.edges, "slots": slots}
    )


def with_slots(model: nn.Module, graph: jraph.GraphsTuple) -> jraph.GraphsTuple:
    """Return the graph, with slots for all pairs of its atoms if `uses_all_pairs`.

    No neighbor list is read then. Batches have slots of their neighbors instead; see
    `add_neighbor_slots`.
    """
    if not uses_all_pairs(model, graph):
        return graph
    return graph._replace(edges={**graph.edges, "slots": all_pairs(graph)})


def uses_all_pairs(model: nn.Module, graph: jraph.GraphsTuple) -> bool:
    """Return whether a model is to read all pairs of a graph: a small open structure on a device.

    Args:
      model: Model. Its `neighbor_slots` is ALL_PAIRS if neighbors beyond the cutoff are allowed.
      graph: Padded graph.
    """
    is_small = len(graph.n_node) == 2 and graph.nodes["positions"].shape[0] <= _MAX_ATOMS
    is_known = "slots" in graph.edges or "shifts" in graph.edges
    allowed = getattr(model, "neighbor_slots", False) == ALL_PAIRS
    return is_small and not is_known and allowed and wants_slots(model)


def all_pairs(graph: jraph.GraphsTuple) -> NeighborSlots:
    """Return slots for all pairs of atoms of a single open structure, near or far."""
    num = graph.nodes["positions"].shape[0]
    atom = jnp.arange(num, dtype=jnp.int32)
    real = atom < graph.n_node[0]
    used = real[:, None] & real & (atom[:, None] != atom)
    senders = jnp.where(used, atom, atom[:, None])
    itself = atom[:, None] * num + atom
    return NeighborSlots(senders, used, jnp.where(used, itself.T, itself))


def _first_edges(receivers: jax.Array, num_nodes: int) -> jax.Array:
    """Return the index of the first edge of each atom, then the number of edges, (N + 1,)."""
    atoms = jnp.arange(num_nodes + 1, dtype=receivers.dtype)
    # unrolled, so it is one kernel
    return jnp.searchsorted(receivers, atoms, method="scan_unrolled").astype(jnp.int32)


def _inverse(order: jax.Array) -> jax.Array:
    """Return the inverse of a permutation."""
    # every index occurs once, so nothing is added
    return (
        jnp.zeros_like(order)
        .at[order]
        .set(jnp.arange(len(order), dtype=order.dtype), unique_indices=True)
    )
