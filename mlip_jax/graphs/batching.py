"""Padded batches of static shape, planned from known sizes.

A plan is a pure function of the order of the structures, their sizes and the budget: the same on every run and every
host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jraph
import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.edge_counts import count_all
from mlip_jax.graphs.neighbors import neighbor_list

# Structures that compete for the gap which the in-order ones leave in a batch.
_WINDOW = 256


class Sizes(NamedTuple):
    """Atoms and directed edges of each structure, both shape (S,), int64."""

    n_node: np.ndarray
    n_edge: np.ndarray


class Budget(NamedTuple):
    """Static shape of a batch, its padding graph and padding atom included."""

    nodes: int
    edges: int
    graphs: int


def measure(columns: Columns, cutoff: float) -> Sizes:
    """Atoms and edges of every structure."""
    return Sizes(columns.n_atoms.astype(np.int64), count_all(columns, cutoff).astype(np.int64))


def choose_budget(sizes: Sizes, batch_size: int) -> Budget:
    """A budget that holds about `batch_size` average structures with little padding.

    Edges are what costs, so that they are made to be the limit that fills up: atoms and graphs get some slack.
    """
    if not len(sizes.n_node):
        raise ValueError("a batch budget needs at least one structure")
    edges = max(int(np.ceil(batch_size * sizes.n_edge.mean())), int(sizes.n_edge.max()), 2)
    few = 1 + 1.5 / np.sqrt(batch_size)
    nodes = max(int(np.ceil(batch_size * sizes.n_node.mean() * min(few, 1.1))), int(sizes.n_node.max())) + 1
    graphs = max(int(np.ceil(batch_size * min(few, 1.5))), 1) + 1
    return Budget(_round_up(nodes, 8), _round_up(edges, 16), graphs)


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def check_sizes(sizes: Sizes, budget: Budget, name: Callable[[int], str] = "structure {}".format) -> None:
    """Raises ValueError where a structure does not fit into an empty batch; `name` tells what it is called."""
    too_large = (sizes.n_node > budget.nodes - 1) | (sizes.n_edge > budget.edges)
    if too_large.any():
        s = int(np.flatnonzero(too_large)[0])
        raise ValueError(
            f"{name(s)} has {sizes.n_node[s]} atoms and {sizes.n_edge[s]} edges and does not fit into a batch of "
            f"{budget.nodes - 1} atoms and {budget.edges} edges; {too_large.sum()} such structures. "
            "Give a larger batch size or leave them out with data.max_atoms.")


def plan_window(order: np.ndarray, sizes: Sizes, budget: Budget) -> list[np.ndarray]:
    """Batches that together hold every structure of `order` once: in that order, but that gaps are filled.

    Args:
      order: Numbers of structures, (W,).
      sizes: Of all structures.
      budget: Of one batch.

    Raises:
      ValueError: A structure does not fit into an empty batch.
    """
    n_node, n_edge = (np.asarray(s[order], np.int64) for s in sizes)
    check_sizes(Sizes(n_node, n_edge), budget, lambda s: f"structure {order[s]}")
    batches, pool, position = [], np.zeros(0, np.int64), 0
    while position < len(order) or len(pool):
        fresh = np.arange(position, min(position + _WINDOW - len(pool), len(order)))
        position += len(fresh)
        pool = np.concatenate([pool, fresh])
        chosen = _fill(n_node[pool], n_edge[pool], budget)
        batches.append(order[pool[chosen]])
        pool = np.delete(pool, chosen)
    return batches


def _fill(n_node, n_edge, budget) -> np.ndarray:
    """Positions in the pool that make one batch: in order while they fit, then the largest that fit the gap."""
    room_node, room_edge, room_graph = budget.nodes - 1, budget.edges, budget.graphs - 1
    run = (np.cumsum(n_node) <= room_node) & (np.cumsum(n_edge) <= room_edge)
    count = min(len(run) if run.all() else int(np.argmin(run)), room_graph)
    free = np.ones(len(n_node), bool)
    free[:count] = False
    room_node -= int(n_node[:count].sum())
    room_edge -= int(n_edge[:count].sum())
    room_graph -= count
    chosen = list(range(count))
    while room_graph > 0:
        fits = free & (n_node <= room_node) & (n_edge <= room_edge)
        if not fits.any():
            break
        best = int(np.argmax(np.where(fits, n_edge, -1)))
        chosen.append(best)
        free[best] = False
        room_node, room_edge, room_graph = room_node - n_node[best], room_edge - n_edge[best], room_graph - 1
    return np.array(chosen, np.int64)


def fill(plan: list[np.ndarray], sizes: Sizes, budget: Budget) -> dict[str, float]:
    """Shares of the padded atoms, edges and graphs of a plan that are real."""
    n, chosen = len(plan), np.concatenate(plan)
    return {"nodes": float(sizes.n_node[chosen].sum() / (n * budget.nodes)),
            "edges": float(sizes.n_edge[chosen].sum() / (n * budget.edges)),
            "graphs": float(len(chosen) / (n * budget.graphs))}


def build_batch(columns: Columns, budget: Budget, cutoff: float, reference: np.ndarray | None = None,
                dtype=np.float32) -> jraph.GraphsTuple:
    """One padded batch (NumPy arrays) of all structures of `columns`, laid out as graphs/graph.py says.

    Args:
      reference: Reference energy of every element, shape (119,), eV: subtracted in float64.
      dtype: Of all that is floating.

    Raises:
      ValueError: The structures do not fit into the budget.
    """
    n_node = columns.n_atoms
    neighbors = [_neighbors_of(columns, s, cutoff) for s in range(len(columns))]
    n_edge = np.array([len(nb.senders) for nb in neighbors], np.int64)
    if n_node.sum() > budget.nodes - 1 or n_edge.sum() > budget.edges or len(columns) > budget.graphs - 1:
        raise ValueError(f"{len(columns)} structures with {n_node.sum()} atoms and {n_edge.sum()} edges do not "
                         f"fit into {budget}")
    energy = np.array(columns.energy)
    if reference is not None and len(columns):
        energy -= np.add.reduceat(reference[columns.numbers], columns.offsets[:-1])
    pad = budget.graphs - len(columns)
    edges = _concatenate_edges(neighbors, n_node, n_edge, budget, columns.cell is not None)
    cell = None if columns.cell is None else _pad(columns.cell.astype(dtype), budget.graphs)
    return jraph.GraphsTuple(
        nodes={"positions": _pad(columns.positions.astype(dtype), budget.nodes),
               "numbers": _pad(columns.numbers.astype(np.int32), budget.nodes),
               "forces": _pad(columns.forces.astype(dtype), budget.nodes)},
        edges={k: edges[k] for k in ("pair_order", "shifts") if edges[k] is not None},
        senders=edges["senders"], receivers=edges["receivers"],
        globals={"energy": _pad(energy.astype(dtype), budget.graphs),
                 "charge": _pad(columns.charge.astype(dtype), budget.graphs),
                 **({} if cell is None else {"cell": cell})},
        n_node=np.concatenate([n_node, [budget.nodes - n_node.sum()], np.zeros(pad - 1)]).astype(np.int32),
        n_edge=np.concatenate([n_edge, [budget.edges - n_edge.sum()], np.zeros(pad - 1)]).astype(np.int32))


def _neighbors_of(columns, s, cutoff):
    atoms = slice(columns.offsets[s], columns.offsets[s + 1])
    if columns.pbc is None or not columns.pbc[s].any():
        return neighbor_list(columns.positions[atoms], cutoff)
    return neighbor_list(columns.positions[atoms], cutoff, columns.cell[s], columns.pbc[s])


def _pad(array: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((length - len(array), *array.shape[1:]), array.dtype)])


def _concatenate_edges(neighbors, n_node, n_edge, budget, periodic) -> dict[str, np.ndarray | None]:
    """Edges of the batch; padding edges join the first padding atom to itself, in pairs."""
    first_atom = np.concatenate([[0], np.cumsum(n_node)]).astype(np.int32)
    first_edge = np.concatenate([[0], np.cumsum(n_edge)]).astype(np.int32)
    total, atom = int(first_edge[-1]), first_atom[-1]
    padding = np.full(budget.edges - total, atom, np.int32)
    idle = np.arange(total, budget.edges, dtype=np.int32)

    def joined(name, add):
        return [getattr(nb, name) + a for nb, a in zip(neighbors, add)]

    halves = [np.split(o, 2) for o in joined("pair_order", first_edge)]
    shifts = None
    if periodic:
        rows = [np.zeros((len(nb.senders), 3), np.int32) if nb.shifts is None else nb.shifts for nb in neighbors]
        shifts = _pad(np.concatenate([np.zeros((0, 3), np.int32), *rows]), budget.edges)
    return {
        "senders": np.concatenate(joined("senders", first_atom) + [padding]),
        "receivers": np.concatenate(joined("receivers", first_atom) + [padding]),
        "pair_order": np.concatenate([h[0] for h in halves] + [idle[0::2]] + [h[1] for h in halves] + [idle[1::2]]),
        "shifts": shifts}
