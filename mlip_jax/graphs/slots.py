"""Padded graphs that are built on the device from molecules in slots of equal size.

    M   number of slots            n   atoms per slot

Between two evaluations atoms move and molecules are added or removed, but the shape of the graph
stays the same. Neighbors are found again at each evaluation. Slots take part in their order as long
as their atoms, edges and pairs fit into the budget. The others wait for a later evaluation, so no
neighbor is ever omitted.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.graphs.shapes import PaddingBudget


class Slots(NamedTuple):
    """Open molecules in slots.

    Attributes:
      numbers: Atomic numbers, shape (M, n), int32.
      count: Number of atoms per slot, shape (M,), int32; 0 for an empty slot.
      charge: Total charges (e), shape (M,).
      spin: Numbers of unpaired electrons, shape (M,).
    """

    numbers: jax.Array
    count: jax.Array
    charge: jax.Array
    spin: jax.Array


class Box(NamedTuple):
    """Periodic boundaries of slots with the minimum-image convention.

    Each pair of atoms interacts through its nearest image only. This is exact if the lattice planes
    are more than twice the longest cutoff apart, see `heights`.

    Attributes:
      cell: Lattice vectors as rows (Å), shape (M, 3, 3). Directions that are not periodic have a
        vector that completes the basis.
      periodic: Whether each direction is periodic, shape (M, 3), bool.
    """

    cell: jax.Array
    periodic: jax.Array

    def translations(self, vectors: jax.Array, slot: jax.Array) -> jax.Array:
        """Return the lattice translations that make vectors as short as possible.

        Args:
          vectors: Vectors between atoms (Å), shape (..., 3).
          slot: Slot of each vector, shape (...).

        Returns:
          Translations in lattice vectors, whole numbers, shape (..., 3).
        """
        fractions = jnp.einsum(
            "...x,...xc->...c",
            vectors,
            jnp.linalg.inv(self.cell)[slot],
            precision=jax.lax.Precision.HIGHEST,
        )
        return jnp.where(self.periodic[slot], -jnp.round(fractions), 0.0)


def heights(cell: np.ndarray, periodic: np.ndarray) -> np.ndarray:
    """Return the distances between the lattice planes (Å), inf for directions without periodicity.

    Args:
      cell: Lattice vectors as rows (Å), shape (..., 3, 3).
      periodic: Whether each direction is periodic, shape (..., 3).

    Returns:
      Distances, shape (..., 3).
    """
    return np.where(periodic, 1 / np.linalg.norm(np.linalg.inv(cell), axis=-2), np.inf)


class SlotBatch(NamedTuple):
    """Padded graph of the slots that take part.

    Attributes:
      graph: Graph in the layout of graphs/graph.py. Graph m is slot m, without atoms if it does not
        take part.
      takes_part: Whether each slot takes part, shape (M,), bool.
      nearest: Smallest distance between two atoms of each slot (Å), shape (M,); inf for fewer than
        two atoms.
      max_nearest_distance: Largest distance from an atom to its nearest neighbor in each slot (Å),
        shape (M,); 0 for fewer than two atoms.
      begin: Index of the first atom of each slot in the graph, shape (M,).
      n_edge: Number of edges of each slot, whether it takes part or not, shape (M,). A slot that
        exceeds the budget by itself never takes part, and neither do the slots after it: it needs a
        larger budget.
      n_pair: Number of long-range pairs of each slot, likewise, shape (M,).
    """

    graph: jraph.GraphsTuple
    takes_part: jax.Array
    nearest: jax.Array
    max_nearest_distance: jax.Array
    begin: jax.Array
    n_edge: jax.Array
    n_pair: jax.Array


def build(
    slots: Slots,
    positions: jax.Array,
    budget: PaddingBudget,
    cutoff: float,
    long_range_cutoff: float | None = None,
    box: Box | None = None,
) -> SlotBatch:
    """Build the padded graph of the slots, with all pairs closer than the cutoffs.

    The function is pure; call it under jit.

    Args:
      slots: Molecules.
      positions: Positions (Å), shape (M, n, 3).
      budget: Static shape of the graph: more than n atoms and an even number of edges.
      cutoff: Cutoff radius (Å).
      long_range_cutoff: Cutoff of long-range pairs (Å), inf for all pairs; None for no list of
        them.
      box: Cells of periodic structures, for which the graph gets shifts and cells; None for open
        boundaries.

    Raises:
      ValueError: The budget has too few atoms or an odd number of edges.
    """
    size = slots.numbers.shape[1]
    if budget.n_node <= size or budget.n_edge % 2:
        raise ValueError(
            f"a graph of slots with {size} atoms needs a budget for more than {size} atoms and "
            f"an even number of edges, received {budget}"
        )
    is_atom = jnp.arange(size) < slots.count[:, None]  # (M, n)
    are_atoms = is_atom[:, :, None] & is_atom[:, None, :] & ~jnp.eye(size, dtype=bool)
    # squared distances of pairs of real atoms, inf for others, (M, n, n)
    squared = jnp.where(are_atoms, _squared_distances(positions, box), jnp.inf)
    close = squared < cutoff * cutoff
    upper = jnp.triu(jnp.ones((size, size), bool), 1)
    n_edge, n_pair = close.sum((1, 2)), jnp.zeros_like(slots.count)
    # slots take part in their order while their atoms, edges and pairs fit into the budget
    fits = (jnp.cumsum(slots.count) < budget.n_node) & (jnp.cumsum(n_edge) <= budget.n_edge)
    if long_range_cutoff is not None:
        far = are_atoms & upper & (squared < long_range_cutoff * long_range_cutoff)
        n_pair = far.sum((1, 2))
        fits &= jnp.cumsum(n_pair) <= budget.n_pair
    takes_part = fits & (slots.count > 0)
    count = jnp.where(takes_part, slots.count, 0)
    begin = jnp.cumsum(count) - count
    close &= takes_part[:, None, None]
    nodes = slot_nodes(slots, positions, count, begin, budget.n_node)
    receivers, senders, order = _edges(close, begin, count.sum(), budget.n_edge)
    edges = {"pair_order": order}
    if long_range_cutoff is not None:
        edges["long_range"] = _long_range(
            far & takes_part[:, None, None], begin, count.sum(), budget.n_pair
        )
    graph_globals = {"charge": append_zero(slots.charge), "spin": append_zero(slots.spin)}
    if box is not None:
        graph_globals["cell"] = jnp.concatenate([box.cell, jnp.zeros((1, 3, 3), box.cell.dtype)])
        edges["shifts"] = _shifts(box, nodes["positions"], receivers, senders, begin + count)
        if long_range_cutoff is not None:
            far = edges["long_range"]
            far["shifts"] = _shifts(
                box, nodes["positions"], far["receivers"], far["senders"], begin + count
            )
    graph = jraph.GraphsTuple(
        nodes=nodes,
        edges=edges,
        receivers=receivers,
        senders=senders,
        globals=graph_globals,
        n_node=jnp.append(count, budget.n_node - count.sum()).astype(jnp.int32),
        n_edge=with_rest(jnp.where(takes_part, n_edge, 0), budget.n_edge),
    )
    nearest_of_atom = squared.min(2)
    nearest = nearest_of_atom.min(1)
    max_nearest_distance = jnp.where(
        is_atom & jnp.isfinite(nearest_of_atom), nearest_of_atom, 0.0
    ).max(1)
    return SlotBatch(
        graph, takes_part, jnp.sqrt(nearest), jnp.sqrt(max_nearest_distance), begin, n_edge, n_pair
    )


def to_slots(batch: SlotBatch, values: jax.Array, size: int) -> jax.Array:
    """Convert values of the atoms of the graph, shape (N, ...), to slots.

    Returns:
      Values, shape (M, n, ...); zero if a slot does not take part or has no such atom.
    """
    count = batch.graph.n_node[:-1, None]
    local = jnp.arange(size)
    index = jnp.where(local < count, batch.begin[:, None] + local, 0)
    taken = values.at[index].get(mode="promise_in_bounds")
    used = (local < count).reshape(*index.shape, *[1] * (values.ndim - 1))
    return jnp.where(used, taken, jnp.zeros((), values.dtype))


def _squared_distances(positions, box):
    """Return the squared distances of all pairs in each slot, nearest images, shape (M, n, n)."""
    # Differences instead of the Gram matrix: |a|²+|b|²-2ab loses digits right at the cutoff.
    d = [positions[:, :, None, x] - positions[:, None, :, x] for x in range(3)]
    if box is not None:
        vectors, slot = jnp.stack(d, -1), jnp.arange(len(positions))[:, None, None]
        vectors += jnp.einsum(
            "mijc,mcx->mijx",
            box.translations(vectors, slot),
            box.cell,
            precision=jax.lax.Precision.HIGHEST,
        )
        d = [vectors[..., x] for x in range(3)]
    return d[0] * d[0] + d[1] * d[1] + d[2] * d[2]


def slot_nodes(slots, positions, count, begin, length):
    """Return positions and atomic numbers of the atoms of the graph, zero in padding."""
    end = begin + count
    row = jnp.arange(length, dtype=jnp.int32)
    slot = jnp.searchsorted(end, row, side="right", method="compare_all")
    used = row < end[-1]
    slot = jnp.where(used, slot, 0)
    local = jnp.where(used, row - begin[slot], 0)
    return {
        "positions": jnp.where(used[:, None], positions[slot, local], 0.0),
        "numbers": jnp.where(used, slots.numbers[slot, local], 0).astype(jnp.int32),
    }


def _shifts(box, positions, receivers, senders, end):
    """Return translations of the senders; padding edges connect an atom to itself and have none."""
    slot = jnp.searchsorted(end, receivers, side="right", method="compare_all").clip(
        max=len(end) - 1
    )
    return box.translations(positions[senders] - positions[receivers], slot).astype(jnp.int32)


def true_indices(mask, length):
    """Return flat indices of the first `length` true values, and the number of true values."""
    indices = jnp.nonzero(mask.ravel(), size=length, fill_value=0)[0].astype(jnp.int32)
    return indices, mask.sum()


def _edges(close, begin, num_atoms, length):
    """Return receivers, senders and pair order; padding joins the first padding atom to itself."""
    num, size, _ = close.shape
    indices, total = true_indices(close, length)
    row, column = indices // size, indices % size
    slot = row // size
    used = jnp.arange(length) < total
    receivers = jnp.where(used, begin[slot] + row % size, num_atoms).astype(jnp.int32)
    senders = jnp.where(used, begin[slot] + column, num_atoms).astype(jnp.int32)
    # the index of an edge is its rank among the true values of `close`, which finds its reverse
    rank = jnp.cumsum(close.ravel()) - 1
    forward, _ = true_indices(receivers < senders, length // 2)
    reverse = rank[(slot[forward] * size + column[forward]) * size + row[forward] % size]
    pad = 2 * jnp.arange(length // 2)  # padding edges form pairs, since the number of edges is even
    real = pad < total
    order = jnp.concatenate([jnp.where(real, forward, pad), jnp.where(real, reverse, pad + 1)])
    return receivers, senders, order.astype(jnp.int32)


def _long_range(far, begin, num_atoms, length):
    """Return receivers and senders of long-range pairs, padded like edges."""
    size = far.shape[1]
    indices, total = true_indices(far, length)
    row, column = indices // size, indices % size
    used = jnp.arange(length) < total
    first = begin[row // size]
    return {
        "receivers": jnp.where(used, first + row % size, num_atoms).astype(jnp.int32),
        "senders": jnp.where(used, first + column, num_atoms).astype(jnp.int32),
    }


def append_zero(values):
    """Append zero for the padding graph."""
    return jnp.append(values, jnp.zeros((), values.dtype))


def with_rest(counts, total):
    """Append the rest of the budget as the count of the padding graph."""
    return jnp.append(counts, total - counts.sum()).astype(jnp.int32)
