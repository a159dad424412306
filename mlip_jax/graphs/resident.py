"""Data sets that stay on the device with their edges, and padded batches that are built there.

`collect` finds the neighbors of every structure once per run. `gather` builds, from indices of
structures, the same arrays that `batch.build_batch` builds on the host. So each training step only
transfers a few integers to the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.near_origin import move_near_origin
from mlip_jax.graphs.batch import each_geometry, subtract_references
from mlip_jax.graphs.neighbors import long_range_list, neighbor_list
from mlip_jax.graphs.row_index import RowIndex, graph_of_rows, index_rows, take_rows
from mlip_jax.graphs.shapes import PaddingBudget, Sizes

# _MAX_INDEX: largest number of rows that int32 can index; devices use int32 indices.
_MAX_INDEX = np.iinfo(np.int32).max
# _PIECE_SIZE: structures per piece if `collect` gets all of them at once.
_PIECE_SIZE = 4096


class DeviceDataset(NamedTuple):
    """Concatenated structures with their edges.

    Structure s owns the atoms first_atom[s]:first_atom[s + 1], and its edges and pairs likewise.
    Atoms and edges are numbered from 0 in each structure, in the smallest integer type that can
    represent them.

    Attributes:
      positions: Positions (Å), shape (A, 3).
      numbers: Atomic numbers, shape (A,), uint8.
      forces: Forces (eV/Å), shape (A, 3).
      energy: Total energies minus reference energies (eV), shape (S,).
      charge: Total charges (e), shape (S,).
      first_atom: Index of the first atom of each structure, then A; shape (S + 1,), int32.
      first_edge: Index of the first edge of each structure, then E; shape (S + 1,), int32.
      receivers: Receiving atoms of edges, shape (E,), see graphs/neighbors.py.
      senders: Sending atoms of edges, shape (E,).
      pair_order: Edges in the order of pairs, shape (E,).
      cell: Lattice vectors (Å), shape (S, 3, 3); None if no structure is periodic.
      spin: Numbers of unpaired electrons, shape (S,); None if all are zero.
      shifts: Lattice translations of edges, shape (E, 3); None if no structure is periodic.
      first_pair: Index of the first long-range pair of each structure, then P; shape (S + 1,),
        int32. None without long-range pairs.
      pair_receivers: Receiving atoms of long-range pairs, shape (P,); None without such pairs.
      pair_senders: Sending atoms of long-range pairs, shape (P,); None without such pairs.
      pair_shifts: Lattice translations of long-range pairs, shape (P, 3); None without such pairs
        or if no structure is periodic.
      properties: Labels of structures by name, shape (S, ...); None if there are none.
      atom_properties: Labels of atoms by name, shape (A, ...); None if there are none.
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
    spin: np.ndarray | jax.Array | None = None
    shifts: np.ndarray | jax.Array | None = None
    first_pair: np.ndarray | jax.Array | None = None
    pair_receivers: np.ndarray | jax.Array | None = None
    pair_senders: np.ndarray | jax.Array | None = None
    pair_shifts: np.ndarray | jax.Array | None = None
    properties: dict[str, np.ndarray | jax.Array] | None = None
    atom_properties: dict[str, np.ndarray | jax.Array] | None = None


def num_structures(resident: DeviceDataset) -> int:
    """Return the number of structures."""
    return resident.energy.shape[0]


def nbytes(resident: DeviceDataset) -> int:
    """Return the size of all arrays in bytes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(resident))


def estimate_bytes(
    sizes: Sizes, periodic: bool = False, dtype=np.float32, spin: bool = False
) -> int:
    """Return the `nbytes` of the data set that `collect` would build from these sizes.

    The result is exact if no shift exceeds 127 lattice vectors. It excludes labels of `properties`.

    Args:
      sizes: Sizes of the structures.
      periodic: Whether there are cells and shifts.
      dtype: Floating-point type of the arrays.
      spin: Whether a structure has unpaired electrons.
    """
    item, num = np.dtype(dtype).itemsize, len(sizes.n_node)
    atoms, edges = _total(sizes.n_node), _total(sizes.n_edge)
    index = _smallest_type(sizes.n_node.max(initial=1) - 1).itemsize
    order = _smallest_type(max(sizes.n_edge.max(initial=1) - 1, 0)).itemsize
    total = atoms * (6 * item + 1) + edges * (2 * index + order + 3 * periodic) + 2 * 4 * (num + 1)
    total += num * (2 + spin + 9 * periodic) * item
    if sizes.n_pair is not None:
        total += _total(sizes.n_pair) * (2 * index + 3 * periodic) + 4 * (num + 1)
    return total


def indexable(sizes: Sizes) -> bool:
    """Return whether int32 can index all atoms, edges and pairs.

    `collect` raises ValueError otherwise.
    """
    return all(_total(size) <= _MAX_INDEX for size in sizes if size is not None)


def collect(
    columns: Columns | Iterable[Columns],
    cutoff: float,
    reference: np.ndarray | None = None,
    long_range_cutoff: float | None = None,
    dtype=np.float32,
    properties: Sequence[str] = (),
) -> DeviceDataset:
    """Concatenate structures, in order, with their neighbors.

    Args:
      columns: All structures, or an iterable of pieces. Only one piece is kept in memory in
        addition to the result.
      cutoff, reference, long_range_cutoff, dtype, properties: See `build_batch`.

    Returns:
      Data set of NumPy arrays, ready for jax.device_put.

    Raises:
      ValueError: There are no structures, more atoms, edges or pairs than int32 can index,
        positions that are not finite, or an infinite long-range cutoff for a periodic structure.
    """
    pieces, labels, totals = [], [], np.zeros(3, np.int64)
    for piece in _pieces(columns):
        pieces.append(_collect_piece(piece, cutoff, reference, long_range_cutoff, np.dtype(dtype)))
        labels.append(_labels(piece, properties, dtype))
        totals += [pieces[-1][name].sum(dtype=np.int64) for name in ("n_atom", "n_edge", "n_pair")]
        if (totals > _MAX_INDEX).any():
            raise ValueError(
                "the structures (or the counted sample of them) have {} atoms, {} edges and {} "
                "long-range pairs; a device holds at most {} of each, because indices are "
                "int32. Keep the structures on the host, or select fewer.".format(
                    *totals, _MAX_INDEX
                )
            )
    if not pieces:
        raise ValueError("cannot build a device data set: there are no structures")
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *labels)
    return _concatenate(pieces)._replace(**joined)


def _labels(columns: Columns, names: Sequence[str], dtype) -> dict[str, dict[str, np.ndarray]]:
    """Return the fields of labels, only those that the structures have."""
    fields = {}
    for field in ("properties", "atom_properties"):
        available = getattr(columns, field)
        labels = {name: available[name].astype(dtype) for name in names if name in available}
        fields |= {field: labels} if labels else {}
    return fields


def _pieces(columns: Columns | Iterable[Columns]) -> Iterator[Columns]:
    """Yield the structures in pieces that are not empty."""
    if isinstance(columns, Columns):
        for start in range(0, len(columns), _PIECE_SIZE):
            yield columns.take(np.arange(start, min(start + _PIECE_SIZE, len(columns))))
    else:
        yield from (piece for piece in columns if len(piece))


def _collect_piece(
    columns: Columns, cutoff, reference, long_range_cutoff, dtype
) -> dict[str, np.ndarray]:
    """Return the fields of a piece, with counts in place of first indices.

    Fields that the piece does not need are omitted.
    """
    columns = move_near_origin(columns)
    geometry = list(each_geometry(columns))
    neighbors = [neighbor_list(positions, cutoff, *box) for positions, *box in geometry]
    fields = {
        "positions": columns.positions.astype(dtype),
        "numbers": columns.numbers.astype(np.uint8),
        "forces": columns.forces.astype(dtype),
        "energy": subtract_references(columns, reference).astype(dtype),
        "charge": columns.charge.astype(dtype),
        "n_atom": columns.n_atoms,
        "n_edge": np.array([len(nb.senders) for nb in neighbors], np.int64),
        "n_pair": np.zeros(0, np.int64),
    }
    for name in ("receivers", "senders", "pair_order"):
        fields[name] = _compact(getattr(nb, name) for nb in neighbors)
    if columns.spin is not None:
        fields["spin"] = columns.spin.astype(dtype)
    if columns.cell is not None:
        fields |= {
            "cell": columns.cell.astype(dtype),
            "shifts": _compact_shifts((nb.shifts for nb in neighbors), fields["n_edge"]),
        }
    if long_range_cutoff is not None:
        receivers, senders, shifts = zip(
            *(long_range_list(x, long_range_cutoff, *box) for x, *box in geometry)
        )
        fields |= {
            "n_pair": np.array([len(r) for r in receivers], np.int64),
            "pair_receivers": _compact(receivers),
            "pair_senders": _compact(senders),
        }
        if columns.cell is not None:
            fields["pair_shifts"] = _compact_shifts(shifts, fields["n_pair"])
    return fields


def _concatenate(pieces: list[dict[str, np.ndarray]]) -> DeviceDataset:
    """Concatenate the pieces; each of their fields is freed when it is concatenated."""

    def first(name):
        counts = np.concatenate([piece[name] for piece in pieces])
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

    starts = {"first_atom": first("n_atom"), "first_edge": first("n_edge")}
    names = {name for piece in pieces for name in piece}
    if "pair_receivers" in names:
        starts["first_pair"] = first("n_pair")
    # if one piece has cells, shifts or spins, all others get zeros
    for name, rows, tail in (
        ("cell", "energy", (3, 3)),
        ("spin", "energy", ()),
        ("shifts", "receivers", (3,)),
        ("pair_shifts", "pair_receivers", (3,)),
    ):
        for piece in pieces if name in names else ():
            if name not in piece:
                dtype = piece["positions"].dtype if name in ("cell", "spin") else np.int8
                piece[name] = np.zeros((len(piece[rows]), *tail), dtype)
    fields = {
        name: np.concatenate([piece.pop(name) for piece in pieces])
        for name in DeviceDataset._fields
        if name in names
    }
    return DeviceDataset(**starts, **fields)


def _compact(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Concatenate indices of atoms or edges in the smallest sufficient integer type."""
    indices = np.concatenate(list(arrays))
    return indices.astype(_smallest_type(indices.max(initial=0)))


def _compact_shifts(arrays: Iterable[np.ndarray | None], counts: np.ndarray) -> np.ndarray:
    """Concatenate shifts, zeros for None, in the smallest signed integer type."""
    joined = np.concatenate(
        [np.zeros((n, 3), np.int32) if a is None else a for a, n in zip(arrays, counts)]
    )
    return joined.astype(
        np.result_type(
            np.int8,
            np.min_scalar_type(joined.min(initial=0)),
            np.min_scalar_type(-joined.max(initial=0) - 1),
        )
    )


def _smallest_type(largest: int) -> np.dtype:
    """Return the smallest integer type that can represent `largest`."""
    return np.min_scalar_type(int(largest))


def _total(counts: np.ndarray) -> int:
    """Return the sum of counts, without overflow."""
    return int(np.sum(counts, dtype=np.int64))


def gather(resident: DeviceDataset, indices: jax.Array, budget: PaddingBudget) -> jraph.GraphsTuple:
    """Build the padded batch of some structures, with arrays equal to those of `build_batch`.

    The function is pure; call it under jit. If the structures do not fit into the budget all
    positions are NaN, since an error cannot be raised under jit. Plan batches so that they fit.

    Args:
      resident: Data set on the device. If it has long-range pairs, so has the batch.
      indices: Indices of the structures, shape (budget.n_graph - 1,), int32; -1 after the last one.
      budget: Static shape of the batch.

    Raises:
      ValueError: `indices` has another shape.
    """
    if indices.shape != (budget.n_graph - 1,):
        raise ValueError(
            f"expected the indices of {budget.n_graph - 1} structures for {budget}, with -1 "
            f"after the last, received shape {indices.shape}"
        )
    resident = jax.tree.map(jnp.asarray, resident)
    real = indices >= 0  # (G - 1,)
    structure = jnp.clip(indices, 0, num_structures(resident) - 1).astype(jnp.int32)
    atoms = index_rows(resident.first_atom, structure, real, budget.n_node)
    edges = index_rows(resident.first_edge, structure, real, budget.n_edge)
    fit = (
        (indices < num_structures(resident)).all()
        & (atoms.total < budget.n_node)
        & (edges.total <= budget.n_edge)
    )
    listed = {"pair_order": _pair_order(resident, edges, structure, budget.n_edge)}
    if resident.shifts is not None:
        listed["shifts"] = edges.take(resident.shifts).astype(jnp.int32)
    if resident.first_pair is not None:
        pairs = index_rows(resident.first_pair, structure, real, budget.n_pair)
        listed["long_range"] = {
            "receivers": pairs.take_atoms(resident.pair_receivers, atoms),
            "senders": pairs.take_atoms(resident.pair_senders, atoms),
        }
        if resident.pair_shifts is not None:
            listed["long_range"]["shifts"] = pairs.take(resident.pair_shifts).astype(jnp.int32)
        fit &= pairs.total <= budget.n_pair
    nodes = {
        name: atoms.take(getattr(resident, name)) for name in ("positions", "numbers", "forces")
    }
    nodes["numbers"] = nodes["numbers"].astype(jnp.int32)
    nodes["positions"] = jnp.where(fit, nodes["positions"], jnp.nan)
    if resident.atom_properties is not None:
        nodes["properties"] = {k: atoms.take(x) for k, x in resident.atom_properties.items()}
    globals_ = {
        name: _take_graphs(getattr(resident, name), structure, real)
        for name in ("energy", "charge", "spin", "cell")
        if getattr(resident, name) is not None
    }
    if resident.properties is not None:
        globals_["properties"] = {
            k: _take_graphs(x, structure, real) for k, x in resident.properties.items()
        }
    # n_node and n_edge assign all padding rows to the first padding graph
    return jraph.GraphsTuple(
        nodes=nodes,
        edges=listed,
        globals=globals_,
        n_node=atoms.per_graph(real),
        n_edge=edges.per_graph(real),
        senders=edges.take_atoms(resident.senders, atoms),
        receivers=edges.take_atoms(resident.receivers, atoms),
    )


def _pair_order(resident: DeviceDataset, edges: RowIndex, structure, length: int) -> jax.Array:
    """Build the pair order of a batch.

    In padding, every other edge is the reverse of the one before it.
    """
    row = jnp.arange(-(-length // 2), dtype=jnp.int32)
    half, end = edges.count // 2, (edges.begin + edges.count) // 2
    graph = graph_of_rows(end, row)
    used = row < end[-1]
    offset = jnp.append(resident.first_edge[structure] - edges.begin // 2, 0)
    source = jnp.where(used, row + take_rows(offset, graph), 0)
    begin, half = (
        take_rows(jnp.append(edges.begin, 0), graph),
        take_rows(jnp.append(half, 0), graph),
    )
    forward = take_rows(resident.pair_order, source).astype(jnp.int32) + begin
    backward = take_rows(resident.pair_order, source + half).astype(jnp.int32) + begin
    return jnp.concatenate(
        [jnp.where(used, forward, 2 * row), jnp.where(used, backward, 2 * row + 1)[: length // 2]]
    )


def _take_graphs(array: jax.Array, structure: jax.Array, real: jax.Array) -> jax.Array:
    """Return one row per graph, shape (G, ...), zero for padding graphs."""
    taken = jnp.where(
        real.reshape(-1, *[1] * (array.ndim - 1)), array[structure], jnp.zeros((), array.dtype)
    )
    return jnp.concatenate([taken, jnp.zeros((1, *array.shape[1:]), array.dtype)])
