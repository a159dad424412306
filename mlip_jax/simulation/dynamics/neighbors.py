"""Neighbour lists with a skin, for atoms that move: made by the device or by the host, always complete.

A list holds all pairs closer than the cutoff and a skin. It serves until an atom has moved by half the skin, since no
pair outside of it can have come within the cutoff before. Pairs in the skin add nothing: a model's messages end at its
cutoff.

The device looks at all pairs of atoms of a molecule. In a cell it takes the nearest image of each, so that its lattice
planes must stand more than twice the cutoff and skin apart; smaller cells, and structures of very many atoms, have
lists from the host.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs import slots as slot_graphs
from mlip_jax.graphs.batching import Budget, build_batch
from mlip_jax.graphs.neighbors import count_edges, long_range_list
from mlip_jax.graphs.slots import Box
from mlip_jax.simulation.dynamics.system import Particles, System
from mlip_jax.structure import Structure, electronic_value

# Places of all matrices of distances together, above which the host's k-d tree is the better way.
_MOST_PLACES = 1 << 25
_LONGEST_MOVE = 0.4
# The model works on what is left empty, too: at first there is room for what comes and goes. A list that outgrows it
# may go on growing, and each time costs a compilation.
_ROOM, _EDGE_MULTIPLE = 1.15, 64
# Of a list's edges: if more than that may be within the cutoff, choosing them costs what the model saves.
_WORTHWHILE = 0.92


class Reach(NamedTuple):
    """Å: cutoff of edges, that of long-range pairs (None for none, inf for all), and the skin of both."""

    cutoff: float
    long_range: float | None
    skin: float


class Room(NamedTuple):
    """Static shapes.

    Attributes:
      list: Of the graph that is the list, pairs of the skin included.
      near: Edges that the model gets: those of the list that are within the cutoff at the step. 0: it gets the whole
        list, which is not much longer.
    """

    list: Budget
    near: int = 0

    def holds(self, wanted: jax.Array) -> jax.Array:
        """Whether there is room for so many edges and pairs of the list and edges within the cutoff, (3,); () bool."""
        fits = (wanted[0] <= self.list.edges) & (wanted[1] <= self.list.pairs)
        return fits & (wanted[2] <= self.near) if self.near else fits


def suits_device(system: System, reach: Reach) -> bool:
    """Whether the device can make complete lists of the system."""
    sizes = [len(a) for a in system.molecules]
    if len(sizes) * max(sizes) ** 2 > _MOST_PLACES:
        return False
    return not system.is_periodic or wide_enough(system.cell, system.periodic, reach)


def longest_move(on_device: bool, reach: Reach) -> float:
    """How far an atom may move in one step, Å. Half a bond of hydrogen is a wreck already; see md_loop.Loop.

    A step from where a list of the host was made must not ask for another list, or it would be asked for for ever.
    """
    return _LONGEST_MOVE if on_device else min(_LONGEST_MOVE, 0.45 * reach.skin)


def longest(reach: Reach) -> float:
    """Length of the longest pairs that a list has where cells are concerned, Å."""
    return max(reach.cutoff, reach.long_range or 0.0) + reach.skin


def wide_enough(cell: np.ndarray, periodic: np.ndarray, reach: Reach) -> bool:
    """Whether every pair within the cutoffs and the skin is one of an atom and the nearest image of another."""
    return bool((slot_graphs.heights(np.asarray(cell, np.float64), periodic) > 2 * longest(reach)).all())


def on_device(particles: Particles, positions: jax.Array, cell: jax.Array | None, budget: Budget,
              reach: Reach) -> tuple[jraph.GraphsTuple, jax.Array]:
    """The graph of positions (N, 3) with all pairs within cutoff and skin, and the numbers of edges and pairs, (2,).

    Pure. The list is complete if the numbers are within the budget.
    """
    box = None if cell is None else Box(cell, particles.periodic)
    far = None if reach.long_range is None else reach.long_range + reach.skin
    batch = slot_graphs.build(particles.slots, positions[particles.places], budget, reach.cutoff + reach.skin, far, box)
    return batch.graph, jnp.stack([batch.n_edge.sum(), batch.n_pair.sum()]).astype(jnp.int32)


def on_host(system: System, positions: np.ndarray, cell: np.ndarray | None, budget: Budget,
            reach: Reach) -> jraph.GraphsTuple:
    """The same by the host, of NumPy arrays; the budget must hold it, see `needed`."""
    dtype = positions.dtype
    columns = Columns.from_structures(
        Structure(a.numbers, x.astype(np.float64), charge=electronic_value(a, "charge"),
                  cell=None if cell is None else cell[m].astype(np.float64), pbc=None if cell is None else a.pbc)
        for m, (a, x) in enumerate(zip(system.molecules, system.split(positions))))
    far = None if reach.long_range is None else reach.long_range + reach.skin
    graph = build_batch(columns, budget, reach.cutoff + reach.skin, dtype=dtype, long_range_cutoff=far)
    spin = np.array([electronic_value(a, "num_unpaired_electrons") for a in system.molecules] + [0.0], dtype)
    graph_globals = {k: graph.globals[k] for k in ("charge", "cell") if k in graph.globals} | {"spin": spin}
    nodes = {"positions": positions, "numbers": graph.nodes["numbers"]}
    return graph._replace(nodes=nodes, globals=graph_globals)


def needed(system: System, positions: np.ndarray, cell: np.ndarray | None, reach: Reach) -> np.ndarray:
    """Edges and pairs of the list of positions (N, 3), and edges within the cutoff, (3,)."""
    edges = pairs = close = 0
    for m, (atoms, x) in enumerate(zip(system.molecules, system.split(positions))):
        box = (None, None) if cell is None else (cell[m], atoms.pbc)
        edges += count_edges(x, reach.cutoff + reach.skin, *box)
        close += count_edges(x, reach.cutoff, *box)
        if reach.long_range is not None:
            pairs += len(long_range_list(x, reach.long_range + reach.skin, *box)[0])
    return np.array([edges, pairs, close])


def enlarged(room: Room, system: System, wanted: np.ndarray) -> Room:
    """Room for so many edges, pairs and edges within the cutoff, (3,), and some more: they come and go.

    What there is room for already stays as it is. A room without edges is the first one.
    """
    before, is_first = room.list, not room.list.edges

    def with_room(count):
        return _up(int(np.ceil(count + 2 * np.sqrt(count) if is_first else _ROOM * count)))

    edges, pairs = before.edges, before.pairs
    if wanted[0] > edges or wanted[1] > pairs:
        sizes = np.array([len(a) for a in system.molecules])
        all_edges = int((sizes * (sizes - 1)).sum())
        most = (np.inf, np.inf) if system.is_periodic else (_up(max(all_edges, 2)), _up(all_edges // 2))
        edges = max(edges, min(with_room(max(wanted[0], 2)), most[0]))
        pairs = max(pairs, min(with_room(wanted[1]), most[1]))
    near = room.near
    if is_first or 0 < near < wanted[2]:
        near = with_room(wanted[2])
    return Room(before._replace(edges=edges, pairs=pairs), near if near <= _WORTHWHILE * edges else 0)


def _up(value: int) -> int:
    return -(-value // _EDGE_MULTIPLE) * _EDGE_MULTIPLE


def has_moved(graph: jraph.GraphsTuple, particles: Particles, positions: jax.Array, cell: jax.Array | None,
              reach: Reach) -> jax.Array:
    """Whether the list of `graph` may lack a pair that is within the cutoff at these positions, () bool.

    A cell has been scaled by s since the list was made. Seen at the scale of the list, pairs within the cutoff are
    within cutoff / s, and two atoms must not have come closer by more than what is left to cutoff + skin.
    """
    before = graph.nodes["positions"]
    if cell is None:
        limit, scale = reach.skin / 2, 1.0
    else:
        old = graph.globals["cell"][:-1]
        ratio = jnp.cbrt(jnp.abs(jnp.linalg.det(cell) / jnp.linalg.det(old)))
        ratio = jnp.append(ratio, 1.0)[particles.molecule]
        # where the cell has grown the short cutoff is the stricter one, where it has shrunk the long one
        limits = [cutoff + reach.skin - cutoff / ratio for cutoff in {reach.cutoff, reach.long_range or reach.cutoff}]
        limit, scale = jnp.min(jnp.stack(limits), axis=0) / 2, ratio[:, None]
    moved = positions / scale - before
    # rounding may make a distance a little longer; a thousandth of the skin is far more than that
    return ~((moved * moved).sum(-1) <= jnp.square(jnp.maximum(0.999 * limit, 0.0))).all()
