"""Padded graphs made on the device from molecules that lie in slots of equal size.

    M   slots            n   atoms that a slot holds

Atoms move and molecules come and go between two evaluations, and the shape of the graph stays the same: the neighbours
are found anew each time, and slots take part in their order as long as there is room for their atoms, edges and
pairs. The others wait for a later evaluation, so that no neighbour is ever left out.
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
      numbers: (M, n) int32. count: Atoms, (M,) int32; 0: nothing is there.
      charge, spin: (M,), e and number of unpaired electrons.
    """

    numbers: jax.Array
    count: jax.Array
    charge: jax.Array
    spin: jax.Array


class Box(NamedTuple):
    """Periodic boundaries of slots, of which each pair of atoms has one image within the cutoffs: the nearest.

    It is that if the planes of the lattice stand more than twice the longest cutoff apart, see `heights`.

    Attributes:
      cell: Lattice vectors as rows, Å, with vectors that span space where a direction is not periodic, (M, 3, 3).
      periodic: (M, 3) bool.
    """

    cell: jax.Array
    periodic: jax.Array

    def translations(self, vectors: jax.Array, slot: jax.Array) -> jax.Array:
        """Lattice translations (..., 3) that make vectors (..., 3) in slots (...) as short as can be, whole numbers."""
        fractions = jnp.einsum("...x,...xc->...c", vectors, jnp.linalg.inv(self.cell)[slot],
                               precision=jax.lax.Precision.HIGHEST)
        return jnp.where(self.periodic[slot], -jnp.round(fractions), 0.0)


def heights(cell: np.ndarray, periodic: np.ndarray) -> np.ndarray:
    """Distances between the planes of lattices (..., 3, 3), Å, (..., 3); inf where not periodic."""
    return np.where(periodic, 1 / np.linalg.norm(np.linalg.inv(cell), axis=-2), np.inf)


class SlotBatch(NamedTuple):
    """A padded graph of the slots that take part.

    Attributes:
      graph: Laid out as graphs/graph.py says; graph m is slot m, without atoms if it does not take part.
      takes_part: (M,) bool.
      nearest: Distance of the closest two atoms of each slot, Å, (M,); inf below two atoms.
      loneliest: Distance from its nearest atom of the atom that is farthest from its nearest, Å, (M,); 0 below two.
      begin: First atom of each slot in the graph, (M,).
      n_edge, n_pair: Edges and long-range pairs of each slot, whether it takes part or not, (M,). A slot that alone
        has more than there is room for never takes part: it needs a larger budget.
    """

    graph: jraph.GraphsTuple
    takes_part: jax.Array
    nearest: jax.Array
    loneliest: jax.Array
    begin: jax.Array
    n_edge: jax.Array
    n_pair: jax.Array


def build(slots: Slots, positions: jax.Array, budget: PaddingBudget, cutoff: float,
          long_range_cutoff: float | None = None, box: Box | None = None) -> SlotBatch:
    """The padded graph of the slots, with all pairs closer than the cutoffs. Pure; call it under jit.

    Args:
      positions: (M, n, 3) Å.
      budget: Static shape: more than n atoms, and an even number of edges.
      long_range_cutoff: Of the list of pairs, inf for all; None for no list.
      box: Of periodic structures; the graph has shifts and cells then. None: all are open.

    Raises:
      ValueError: Such a budget cannot be filled.
    """
    size = slots.numbers.shape[1]
    if budget.n_node <= size or budget.n_edge % 2:
        raise ValueError(f"a graph of slots with {size} atoms needs room for more than {size} atoms and an even number "
                         f"of edges, received {budget}")
    here = jnp.arange(size) < slots.count[:, None]
    both = here[:, :, None] & here[:, None, :] & ~jnp.eye(size, dtype=bool)
    squared = jnp.where(both, _squared_distances(positions, box), jnp.inf)
    close = squared < cutoff * cutoff
    upper = jnp.triu(jnp.ones((size, size), bool), 1)
    n_edge, n_pair = close.sum((1, 2)), jnp.zeros_like(slots.count)
    fits = (jnp.cumsum(slots.count) < budget.n_node) & (jnp.cumsum(n_edge) <= budget.n_edge)
    if long_range_cutoff is not None:
        far = both & upper & (squared < long_range_cutoff * long_range_cutoff)
        n_pair = far.sum((1, 2))
        fits &= jnp.cumsum(n_pair) <= budget.n_pair
    takes_part = fits & (slots.count > 0)
    count = jnp.where(takes_part, slots.count, 0)
    begin = jnp.cumsum(count) - count
    close &= takes_part[:, None, None]
    nodes = _nodes(slots, positions, count, begin, budget.n_node)
    receivers, senders, order = _edges(close, begin, count.sum(), budget.n_edge)
    edges = {"pair_order": order}
    if long_range_cutoff is not None:
        edges["long_range"] = _long_range(far & takes_part[:, None, None], begin, count.sum(), budget.n_pair)
    graph_globals = {"charge": _padded(slots.charge), "spin": _padded(slots.spin)}
    if box is not None:
        graph_globals["cell"] = jnp.concatenate([box.cell, jnp.zeros((1, 3, 3), box.cell.dtype)])
        edges["shifts"] = _shifts(box, nodes["positions"], receivers, senders, begin + count)
        if long_range_cutoff is not None:
            far = edges["long_range"]
            far["shifts"] = _shifts(box, nodes["positions"], far["receivers"], far["senders"], begin + count)
    graph = jraph.GraphsTuple(
        nodes=nodes, edges=edges, receivers=receivers, senders=senders, globals=graph_globals,
        n_node=jnp.append(count, budget.n_node - count.sum()).astype(jnp.int32),
        n_edge=_with_rest(jnp.where(takes_part, n_edge, 0), budget.n_edge))
    nearest_of_atom = squared.min(2)
    nearest = nearest_of_atom.min(1)
    loneliest = jnp.where(here & jnp.isfinite(nearest_of_atom), nearest_of_atom, 0.0).max(1)
    return SlotBatch(graph, takes_part, jnp.sqrt(nearest), jnp.sqrt(loneliest), begin, n_edge, n_pair)


def to_slots(batch: SlotBatch, values: jax.Array, size: int) -> jax.Array:
    """Values of atoms of the graph (N, ...) as (M, n, ...), zero where a slot has no atom or takes no part."""
    count = batch.graph.n_node[:-1, None]
    place = jnp.arange(size)
    index = jnp.where(place < count, batch.begin[:, None] + place, 0)
    taken = values.at[index].get(mode="promise_in_bounds")
    used = (place < count).reshape(*index.shape, *[1] * (values.ndim - 1))
    return jnp.where(used, taken, jnp.zeros((), values.dtype))


def _squared_distances(positions, box):
    # Differences, not the Gram matrix: |a|²+|b|²-2ab loses digits right at the cutoff.
    d = [positions[:, :, None, x] - positions[:, None, :, x] for x in range(3)]
    if box is not None:
        vectors, slot = jnp.stack(d, -1), jnp.arange(len(positions))[:, None, None]
        vectors += jnp.einsum("mijc,mcx->mijx", box.translations(vectors, slot), box.cell,
                              precision=jax.lax.Precision.HIGHEST)
        d = [vectors[..., x] for x in range(3)]
    return d[0] * d[0] + d[1] * d[1] + d[2] * d[2]


def _nodes(slots, positions, count, begin, length):
    end = begin + count
    row = jnp.arange(length, dtype=jnp.int32)
    slot = jnp.searchsorted(end, row, side="right", method="compare_all")
    used = row < end[-1]
    slot = jnp.where(used, slot, 0)
    local = jnp.where(used, row - begin[slot], 0)
    return {"positions": jnp.where(used[:, None], positions[slot, local], 0.0),
            "numbers": jnp.where(used, slots.numbers[slot, local], 0).astype(jnp.int32)}


def _shifts(box, positions, receivers, senders, end):
    """Translations of the senders; padding edges, which join an atom to itself, have none."""
    slot = jnp.searchsorted(end, receivers, side="right", method="compare_all").clip(max=len(end) - 1)
    return box.translations(positions[senders] - positions[receivers], slot).astype(jnp.int32)


def _places(mask, length):
    """Places in the flat mask of its first `length` true values, and how many values are true."""
    places = jnp.nonzero(mask.ravel(), size=length, fill_value=0)[0].astype(jnp.int32)
    return places, mask.sum()


def _edges(close, begin, num_atoms, length):
    """Receivers, senders and pair order; padding edges join the first padding atom to itself."""
    num, size, _ = close.shape
    places, total = _places(close, length)
    row, column = places // size, places % size
    slot = row // size
    used = jnp.arange(length) < total
    receivers = jnp.where(used, begin[slot] + row % size, num_atoms).astype(jnp.int32)
    senders = jnp.where(used, begin[slot] + column, num_atoms).astype(jnp.int32)
    # an edge and its reverse have the same place in its list as their marks among those set
    rank = jnp.cumsum(close.ravel()) - 1
    forward, _ = _places(receivers < senders, length // 2)
    reverse = rank[(slot[forward] * size + column[forward]) * size + row[forward] % size]
    pad = 2 * jnp.arange(length // 2)  # the number of edges is even, so that what is left is pairs
    real = pad < total
    order = jnp.concatenate([jnp.where(real, forward, pad), jnp.where(real, reverse, pad + 1)])
    return receivers, senders, order.astype(jnp.int32)


def _long_range(far, begin, num_atoms, length):
    size = far.shape[1]
    places, total = _places(far, length)
    row, column = places // size, places % size
    used = jnp.arange(length) < total
    first = begin[row // size]
    return {"receivers": jnp.where(used, first + row % size, num_atoms).astype(jnp.int32),
            "senders": jnp.where(used, first + column, num_atoms).astype(jnp.int32)}


def _padded(values):
    return jnp.append(values, jnp.zeros((), values.dtype))


def _with_rest(counts, total):
    return jnp.append(counts, total - counts.sum()).astype(jnp.int32)
