"""Neighbor lists with a skin for moving atoms, built by the device or by the host; always complete.

A list contains all pairs closer than the cutoff plus a skin. It is valid until an atom has moved by
half the skin: before that, no pair outside the list can be within the cutoff. Pairs in the skin
contribute nothing, since the messages of a model vanish at its cutoff.

The device examines all pairs of atoms of a molecule. In a cell it takes the nearest image of each
pair, so the lattice planes must be more than twice the cutoff plus skin apart. The host builds the
lists of smaller cells, and of structures whose pairs do not fit into the memory of the device.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs import slots as slot_graphs
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.neighbors import count_edges, long_range_list
from mlip_jax.graphs.shapes import EDGE_MULTIPLE, PaddingBudget, round_up
from mlip_jax.graphs.slots import Box
from mlip_jax.simulation.device_memory import available_bytes
from mlip_jax.simulation.dynamics.system import Particles, System
from mlip_jax.structure import Structure, electronic_value

# _MAX_ENTRIES: total number of entries of the distance matrices above which the host's k-d tree is
# faster, if the device is a CPU. _ENTRY_BYTES: memory of the device per entry. _INDEXED: number of
# entries that int32 can index. MAX_DISPLACEMENT: maximum displacement of an atom in one step (Å). A
# longer one is half a bond of hydrogen and breaks the molecule anyway. LONG_STEP_SKIN: skin of lists
# that cover such a step, Å.
_MAX_ENTRIES, _ENTRY_BYTES, _INDEXED = 1 << 25, 64, 1 << 30
MAX_DISPLACEMENT = 0.4
LONG_STEP_SKIN = 2.25 * MAX_DISPLACEMENT
# _SLACK: ratio of an enlarged capacity to the required one. Padding costs time, so the first
# capacity has less slack. A list that outgrows it may grow further, and each enlargement costs a
# compilation.
_SLACK = 1.15
# _WORTHWHILE: largest fraction of a list's edges within the cutoff for which selecting them saves
# time.
_WORTHWHILE = 0.92


class Cutoffs(NamedTuple):
    """Cutoffs of a neighbor list (Å).

    Attributes:
      cutoff: Cutoff of edges.
      long_range: Cutoff of long-range pairs; None for no pairs, inf for all.
      skin: Distance that lists reach beyond both.
    """

    cutoff: float
    long_range: float | None
    skin: float


class NeighborCapacity(NamedTuple):
    """Static shapes of a neighbor list.

    Attributes:
      budget: Shape of the graph that is the list, including pairs of the skin.
      near_edges: Number of edges that the model receives: those within the cutoff at the current
        step. If 0, the model receives the whole list, which is not much longer.
    """

    budget: PaddingBudget
    near_edges: int = 0

    def holds(self, wanted: jax.Array) -> jax.Array:
        """Return whether a list fits, () bool.

        Args:
          wanted: Number of edges, of long-range pairs, and of edges within the cutoff, (3,).
        """
        fits = (wanted[0] <= self.budget.n_edge) & (wanted[1] <= self.budget.n_pair)
        return fits & (wanted[2] <= self.near_edges) if self.near_edges else fits


def suits_device(system: System, cutoffs: Cutoffs) -> bool:
    """Return whether the device can build complete lists of the system."""
    sizes = [len(a) for a in system.molecules]
    if len(sizes) * max(sizes) ** 2 > max_entries(jax.local_devices()[0]):
        return False
    return not system.is_periodic or wide_enough(system.cell, system.periodic, cutoffs)


def max_entries(device: jax.Device) -> int:
    """Return the number of entries of distance matrices up to which the device builds lists.

    On a GPU or TPU, its memory sets the limit: a list of the host stops the device.
    """
    free = None if device.platform == "cpu" else available_bytes(device)
    return _MAX_ENTRIES if free is None else min(max(free // _ENTRY_BYTES, _MAX_ENTRIES), _INDEXED)


def list_radius(cutoffs: Cutoffs) -> float:
    """Return the length of the longest pairs of a list in a cell (Å)."""
    return max(cutoffs.cutoff, cutoffs.long_range or 0.0) + cutoffs.skin


def wide_enough(cell: np.ndarray, periodic: np.ndarray, cutoffs: Cutoffs) -> bool:
    """Return whether all pairs within cutoffs and skin are between nearest images."""
    return bool(
        (
            slot_graphs.heights(np.asarray(cell, np.float64), periodic) > 2 * list_radius(cutoffs)
        ).all()
    )


def on_device(
    particles: Particles,
    positions: jax.Array,
    cell: jax.Array | None,
    budget: PaddingBudget,
    cutoffs: Cutoffs,
) -> tuple[jraph.GraphsTuple, jax.Array]:
    """Build the graph of positions (N, 3) with all pairs within cutoff and skin. Pure.

    Returns:
      The graph and the numbers of edges and pairs, (2,). The list is complete if the numbers are
      within the budget.
    """
    box = None if cell is None else Box(cell, particles.periodic)
    far = None if cutoffs.long_range is None else cutoffs.long_range + cutoffs.skin
    batch = slot_graphs.build(
        particles.slots,
        positions[particles.slot_atoms],
        budget,
        cutoffs.cutoff + cutoffs.skin,
        far,
        box,
    )
    return batch.graph, jnp.stack([batch.n_edge.sum(), batch.n_pair.sum()]).astype(jnp.int32)


def on_host(
    system: System,
    positions: np.ndarray,
    cell: np.ndarray | None,
    budget: PaddingBudget,
    cutoffs: Cutoffs,
) -> jraph.GraphsTuple:
    """Build the same graph on the host from NumPy arrays.

    It must fit the budget, see `count_required`.
    """
    dtype = positions.dtype
    columns = Columns.from_structures(
        Structure(
            a.numbers,
            x.astype(np.float64),
            charge=electronic_value(a, "charge"),
            cell=None if cell is None else cell[m].astype(np.float64),
            pbc=None if cell is None else a.pbc,
        )
        for m, (a, x) in enumerate(zip(system.molecules, system.split(positions)))
    )
    far = None if cutoffs.long_range is None else cutoffs.long_range + cutoffs.skin
    graph = build_batch(
        columns,
        budget,
        cutoffs.cutoff + cutoffs.skin,
        dtype=dtype,
        long_range_cutoff=far,
        near_origin=False,  # the lattice translations must be those of the given positions
    )
    spin = np.array(
        [electronic_value(a, "num_unpaired_electrons") for a in system.molecules] + [0.0], dtype
    )
    graph_globals = {k: graph.globals[k] for k in ("charge", "cell") if k in graph.globals} | {
        "spin": spin
    }
    nodes = {"positions": positions, "numbers": graph.nodes["numbers"]}
    return graph._replace(nodes=nodes, globals=graph_globals)


def count_required(
    system: System, positions: np.ndarray, cell: np.ndarray | None, cutoffs: Cutoffs
) -> np.ndarray:
    """Count edges and pairs of the list of positions (N, 3), and edges within the cutoff, (3,)."""
    edges = pairs = close = 0
    for m, (atoms, x) in enumerate(zip(system.molecules, system.split(positions))):
        box = (None, None) if cell is None else (cell[m], atoms.pbc)
        edges += count_edges(x, cutoffs.cutoff + cutoffs.skin, *box)
        close += count_edges(x, cutoffs.cutoff, *box)
        if cutoffs.long_range is not None:
            pairs += len(long_range_list(x, cutoffs.long_range + cutoffs.skin, *box)[0])
    return np.array([edges, pairs, close])


def enlarge_capacity(
    capacity: NeighborCapacity, system: System, wanted: np.ndarray
) -> NeighborCapacity:
    """Return a capacity for `wanted` edges, pairs and edges within the cutoff, (3,), with slack.

    Numbers that are large enough are kept. A capacity without edges is the first one.
    """
    before, is_first = capacity.budget, not capacity.budget.n_edge

    def with_slack(count):
        grown = count + 2 * np.sqrt(count) if is_first else _SLACK * count
        return round_up(int(np.ceil(grown)), EDGE_MULTIPLE)

    edges, pairs = before.n_edge, before.n_pair
    if wanted[0] > edges or wanted[1] > pairs:
        sizes = np.array([len(a) for a in system.molecules])
        all_edges = int((sizes * (sizes - 1)).sum())
        limits = (
            (np.inf, np.inf)
            if system.is_periodic
            else (
                round_up(max(all_edges, 2), EDGE_MULTIPLE),
                round_up(all_edges // 2, EDGE_MULTIPLE),
            )
        )
        edges = max(edges, min(with_slack(max(wanted[0], 2)), limits[0]))
        pairs = max(pairs, min(with_slack(wanted[1]), limits[1]))
    near = capacity.near_edges
    if is_first or 0 < near < wanted[2]:
        near = with_slack(wanted[2])
    return NeighborCapacity(
        before._replace(n_edge=edges, n_pair=pairs), near if near <= _WORTHWHILE * edges else 0
    )


def has_moved(
    graph: jraph.GraphsTuple,
    particles: Particles,
    positions: jax.Array,
    cell: jax.Array | None,
    cutoffs: Cutoffs,
) -> jax.Array:
    """Return whether the list of `graph` may lack a pair within the cutoff, () bool.

    A cell may have been scaled by s since the list was built. At the scale of the list, pairs
    within the cutoff are within cutoff / s, and two atoms must not have come closer by more than
    the difference to cutoff + skin.
    """
    before = graph.nodes["positions"]
    if cell is None:
        limit, scale = cutoffs.skin / 2, 1.0
    else:
        old = graph.globals["cell"][:-1]
        ratio = jnp.cbrt(jnp.abs(jnp.linalg.det(cell) / jnp.linalg.det(old)))
        ratio = particles.of_atoms(ratio, 1.0)
        # the short cutoff is stricter if the cell has grown, the long one if it has shrunk
        limits = [
            cutoff + cutoffs.skin - cutoff / ratio
            for cutoff in {cutoffs.cutoff, cutoffs.long_range or cutoffs.cutoff}
        ]
        limit, scale = jnp.min(jnp.stack(limits), axis=0) / 2, ratio[:, None]
    moved = positions / scale - before
    # a thousandth of the skin is far more than rounding changes a distance by
    return ~((moved * moved).sum(-1) <= jnp.square(jnp.maximum(0.999 * limit, 0.0))).all()
