"""Structures that stay on the device with their edges, and padded batches made of them there.

`gather` makes of the places of some structures the very arrays that `batch.build_batch` makes on the host. What a
step is then sent is a few integers, and the neighbours of a structure are found once in a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.graphs.batch import each_geometry, subtract_references
from mlip_jax.graphs.neighbors import long_range_list, neighbor_list
from mlip_jax.graphs.shapes import PaddingBudget, Sizes

# Rows that int32 can number, which is what devices index with.
_MOST = np.iinfo(np.int32).max
# Structures of a piece, where they come as one.
_PIECE = 4096


class DeviceDataset(NamedTuple):
    """Structures end to end: s owns the atoms first_atom[s]:first_atom[s + 1], and its edges and pairs likewise.

    Atoms and edges are numbered from 0 in each structure, in the smallest type of integer that holds them.

    Attributes:
      positions, forces: (A, 3), Å and eV/Å. numbers: (A,) uint8.
      energy, charge: (S,), eV (less the reference energies) and e.
      first_atom, first_edge: (S + 1,) int32.
      receivers, senders, pair_order: (E,), see graphs/neighbors.py.
      cell: (S, 3, 3) Å. shifts: (E, 3). Both None where nothing is periodic.
      first_pair: (S + 1,) int32. pair_receivers, pair_senders: (P,). pair_shifts: (P, 3). The long-range pairs;
        None where there are none, pair_shifts also where nothing is periodic.
    """

    positions: np.ndarray | jax.Array
    numbers: np.ndarray | jax.Array
    forces: np.ndarray | jax.Array
    energy: np.ndarray | jax.Array
    charge: np.ndarray | jax.Array
    first_atom: np.ndarray | jax.Array
    first_edge: np.ndarray | jax.Array
    receivers: np.ndarray | jax.Array
    senders: np.ndarray | jax.Array
    pair_order: np.ndarray | jax.Array
    cell: np.ndarray | jax.Array | None = None
    shifts: np.ndarray | jax.Array | None = None
    first_pair: np.ndarray | jax.Array | None = None
    pair_receivers: np.ndarray | jax.Array | None = None
    pair_senders: np.ndarray | jax.Array | None = None
    pair_shifts: np.ndarray | jax.Array | None = None


def num_structures(resident: DeviceDataset) -> int:
    """Structures that it holds."""
    return resident.energy.shape[0]


def nbytes(resident: DeviceDataset) -> int:
    """Bytes of all its arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(resident))


def estimate_bytes(sizes: Sizes, periodic: bool = False, dtype=np.float32) -> int:
    """`nbytes` of what `collect` makes of structures of these sizes, before it is made.

    Exact, if no shift along a lattice vector is beyond 127 of them.
    """
    item, atoms, edges, num = np.dtype(dtype).itemsize, _total(sizes.n_node), _total(sizes.n_edge), len(sizes.n_node)
    index = _smallest(sizes.n_node.max(initial=1) - 1).itemsize
    order = _smallest(max(sizes.n_edge.max(initial=1) - 1, 0)).itemsize
    total = atoms * (6 * item + 1) + edges * (2 * index + order + 3 * periodic) + 2 * 4 * (num + 1)
    total += num * (2 + 9 * periodic) * item
    if sizes.n_pair is not None:
        total += _total(sizes.n_pair) * (2 * index + 3 * periodic) + 4 * (num + 1)
    return total


def indexable(sizes: Sizes) -> bool:
    """Whether atoms, edges and pairs are few enough to be numbered by int32, which `collect` asks for."""
    return all(_total(size) <= _MOST for size in sizes if size is not None)


def collect(columns: Columns | Iterable[Columns], cutoff: float, reference: np.ndarray | None = None,
            long_range_cutoff: float | None = None, dtype=np.float32) -> DeviceDataset:
    """Structures, in order, with their neighbours: NumPy arrays, ready for jax.device_put.

    Args:
      columns: All structures, or the pieces of them; no more than a piece is held beside the result.
      cutoff, reference, long_range_cutoff, dtype: As for `build_batch`.

    Raises:
      ValueError: No structures; more atoms, edges or pairs than int32 can number; positions that are not finite, or an
        infinite long-range cutoff for a periodic structure.
    """
    pieces, totals = [], np.zeros(3, np.int64)
    for piece in _pieces(columns):
        pieces.append(_collected(piece, cutoff, reference, long_range_cutoff, np.dtype(dtype)))
        totals += [pieces[-1][name].sum(dtype=np.int64) for name in ("n_atom", "n_edge", "n_pair")]
        if (totals > _MOST).any():
            raise ValueError(
                "the structures, or those of them that were counted, have {} atoms, {} edges and {} long-range pairs; "
                "at most {} of each can stay on a device, whose indices are int32. Keep these structures on the host, "
                "or give fewer.".format(*totals, _MOST))
    if not pieces:
        raise ValueError("there are no structures to collect")
    return _joined(pieces)


def _pieces(columns: Columns | Iterable[Columns]) -> Iterator[Columns]:
    if isinstance(columns, Columns):
        for start in range(0, len(columns), _PIECE):
            yield columns.take(np.arange(start, min(start + _PIECE, len(columns))))
    else:
        yield from (piece for piece in columns if len(piece))


def _collected(columns: Columns, cutoff, reference, long_range_cutoff, dtype) -> dict[str, np.ndarray]:
    """The fields of a piece, with counts instead of where structures begin; without those of no use to it."""
    geometry = list(each_geometry(columns))
    found = [neighbor_list(positions, cutoff, *box) for positions, *box in geometry]
    made = {"positions": columns.positions.astype(dtype), "numbers": columns.numbers.astype(np.uint8),
            "forces": columns.forces.astype(dtype), "energy": subtract_references(columns, reference).astype(dtype),
            "charge": columns.charge.astype(dtype), "n_atom": columns.n_atoms,
            "n_edge": np.array([len(nb.senders) for nb in found], np.int64), "n_pair": np.zeros(0, np.int64)}
    for name in ("receivers", "senders", "pair_order"):
        made[name] = _compact(getattr(nb, name) for nb in found)
    if columns.cell is not None:
        made |= {"cell": columns.cell.astype(dtype),
                 "shifts": _compact_shifts((nb.shifts for nb in found), made["n_edge"])}
    if long_range_cutoff is not None:
        receivers, senders, shifts = zip(*(long_range_list(x, long_range_cutoff, *box) for x, *box in geometry))
        made |= {"n_pair": np.array([len(r) for r in receivers], np.int64),
                 "pair_receivers": _compact(receivers), "pair_senders": _compact(senders)}
        if columns.cell is not None:
            made["pair_shifts"] = _compact_shifts(shifts, made["n_pair"])
    return made


def _joined(pieces: list[dict[str, np.ndarray]]) -> DeviceDataset:
    """The pieces as one; each field of theirs is let go when it is joined."""
    def first(name):
        counts = np.concatenate([piece[name] for piece in pieces])
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

    starts = {"first_atom": first("n_atom"), "first_edge": first("n_edge")}
    names = {name for piece in pieces for name in piece}
    if "pair_receivers" in names:
        starts["first_pair"] = first("n_pair")
    # What is periodic in one piece is there, and zero, in all others.
    for name, rows, tail in (("cell", "energy", (3, 3)), ("shifts", "receivers", (3,)),
                             ("pair_shifts", "pair_receivers", (3,))):
        for piece in pieces if name in names else ():
            if name not in piece:
                dtype = piece["positions"].dtype if name == "cell" else np.int8
                piece[name] = np.zeros((len(piece[rows]), *tail), dtype)
    fields = {name: np.concatenate([piece.pop(name) for piece in pieces])
              for name in DeviceDataset._fields if name in names}
    return DeviceDataset(**starts, **fields)


def _compact(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Numbers of atoms or edges end to end."""
    joined = np.concatenate(list(arrays))
    return joined.astype(_smallest(joined.max(initial=0)))


def _compact_shifts(arrays: Iterable[np.ndarray | None], counts: np.ndarray) -> np.ndarray:
    joined = np.concatenate([np.zeros((n, 3), np.int32) if a is None else a for a, n in zip(arrays, counts)])
    return joined.astype(np.result_type(np.int8, np.min_scalar_type(joined.min(initial=0)),
                                        np.min_scalar_type(-joined.max(initial=0) - 1)))


def _smallest(largest: int) -> np.dtype:
    return np.min_scalar_type(int(largest))


def _total(counts: np.ndarray) -> int:
    return int(np.sum(counts, dtype=np.int64))


def gather(resident: DeviceDataset, places: jax.Array, budget: PaddingBudget) -> jraph.GraphsTuple:
    """The padded batch of some structures, array for array what `build_batch` makes of them. Pure; call it under jit.

    Positions are NaN if the structures do not fit into the budget, so that this is not overlooked: what is given has
    to be planned.

    Args:
      resident: On the device. With long-range pairs, the batch has them too.
      places: Of the structures, (budget.n_graph - 1,) int32; after the last of them -1.
      budget: Static shape of the batch.

    Raises:
      ValueError: Another number of places.
    """
    if places.shape != (budget.n_graph - 1,):
        raise ValueError(f"expected the places of {budget.n_graph - 1} structures for {budget}, -1 after the last, "
                         f"received shape {places.shape}")
    resident = jax.tree.map(jnp.asarray, resident)
    real = places >= 0
    place = jnp.clip(places, 0, num_structures(resident) - 1).astype(jnp.int32)
    atoms = _rows(resident.first_atom, place, real, budget.n_node)
    edges = _rows(resident.first_edge, place, real, budget.n_edge)
    fit = (places < num_structures(resident)).all() & (atoms.total < budget.n_node) & (edges.total <= budget.n_edge)
    listed = {"pair_order": _pair_order(resident, edges, place, real, budget.n_edge)}
    if resident.shifts is not None:
        listed["shifts"] = edges.take(resident.shifts).astype(jnp.int32)
    if resident.first_pair is not None:
        pairs = _rows(resident.first_pair, place, real, budget.n_pair)
        listed["long_range"] = {"receivers": pairs.take_atoms(resident.pair_receivers, atoms),
                                "senders": pairs.take_atoms(resident.pair_senders, atoms)}
        if resident.pair_shifts is not None:
            listed["long_range"]["shifts"] = pairs.take(resident.pair_shifts).astype(jnp.int32)
        fit &= pairs.total <= budget.n_pair
    nodes = {name: atoms.take(getattr(resident, name)) for name in ("positions", "numbers", "forces")}
    nodes["numbers"] = nodes["numbers"].astype(jnp.int32)
    nodes["positions"] = jnp.where(fit, nodes["positions"], jnp.nan)
    globals_ = {name: _of_graphs(getattr(resident, name), place, real) for name in ("energy", "charge", "cell")
                if getattr(resident, name) is not None}
    return jraph.GraphsTuple(
        nodes=nodes, edges=listed, globals=globals_, n_node=atoms.per_graph(real), n_edge=edges.per_graph(real),
        senders=edges.take_atoms(resident.senders, atoms), receivers=edges.take_atoms(resident.receivers, atoms))


class _RowIndex(NamedTuple):
    """The atoms, edges or pairs of a batch of G graphs.

    Attributes:
      count, begin: Of each graph but the last, which is padding, and in the batch, (G - 1,).
      graph: Of each row, (N,); G - 1 in padding. source: In the resident array, (N,); 0 in padding.
    """

    count: jax.Array
    begin: jax.Array
    graph: jax.Array
    source: jax.Array

    @property
    def total(self) -> jax.Array:
        return self.begin[-1] + self.count[-1]

    def take(self, array: jax.Array) -> jax.Array:
        """The rows of a resident array, zero in padding."""
        taken = _at(array, self.source)
        used = self.graph < len(self.count)
        return jnp.where(used.reshape(-1, *[1] * (array.ndim - 1)), taken, jnp.zeros((), array.dtype))

    def take_atoms(self, array: jax.Array, atoms: _RowIndex) -> jax.Array:
        """Numbers of atoms in the batch; in padding that of the first padding atom."""
        return self.take(array).astype(jnp.int32) + _at(jnp.append(atoms.begin, atoms.total), self.graph)

    def per_graph(self, real: jax.Array) -> jax.Array:
        """Rows of each graph, (G,): the first one that is padding has all that are left."""
        left = len(self.graph) - self.total
        return jnp.where(jnp.arange(len(real) + 1) == real.sum(), left, jnp.append(self.count, 0))


def _rows(first: jax.Array, place: jax.Array, real: jax.Array, length: int) -> _RowIndex:
    start = first[place]
    count = jnp.where(real, first[place + 1] - start, 0)
    end = jnp.cumsum(count)
    begin, row = end - count, jnp.arange(length, dtype=jnp.int32)
    graph = _graph_of(end, row)
    return _RowIndex(count, begin, graph, jnp.where(row < end[-1], row + _at(jnp.append(start - begin, 0), graph), 0))


def _graph_of(end: jax.Array, row: jax.Array) -> jax.Array:
    """The graph of each row, given where the rows of each end."""
    return jnp.searchsorted(end, row, side="right", method="compare_all").astype(jnp.int32)


def _pair_order(resident: DeviceDataset, edges: _RowIndex, place, real, length: int) -> jax.Array:
    """Every other edge of the padding is the reverse of the one before it."""
    row = jnp.arange(-(-length // 2), dtype=jnp.int32)
    half, end = edges.count // 2, (edges.begin + edges.count) // 2
    graph = _graph_of(end, row)
    used = row < end[-1]
    offset = jnp.append(resident.first_edge[place] - edges.begin // 2, 0)
    source = jnp.where(used, row + _at(offset, graph), 0)
    begin, half = _at(jnp.append(edges.begin, 0), graph), _at(jnp.append(half, 0), graph)
    forward = _at(resident.pair_order, source).astype(jnp.int32) + begin
    backward = _at(resident.pair_order, source + half).astype(jnp.int32) + begin
    return jnp.concatenate([jnp.where(used, forward, 2 * row),
                            jnp.where(used, backward, 2 * row + 1)[:length // 2]])


def _of_graphs(array: jax.Array, place: jax.Array, real: jax.Array) -> jax.Array:
    """Of each graph, (G, ...), zero for those that are padding."""
    taken = jnp.where(real.reshape(-1, *[1] * (array.ndim - 1)), array[place], jnp.zeros((), array.dtype))
    return jnp.concatenate([taken, jnp.zeros((1, *array.shape[1:]), array.dtype)])


def _at(array: jax.Array, index: jax.Array) -> jax.Array:
    """array[index] without a look at the bounds, which the callers keep."""
    if not array.shape[0]:  # no structure has an edge
        return jnp.zeros((*index.shape, *array.shape[1:]), array.dtype)
    return array.at[index].get(mode="promise_in_bounds")
