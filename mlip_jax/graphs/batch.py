"""Padded batches of structures, laid out as graphs/graph.py describes.

>>> from mlip_jax.structure import Structure
>>> positions = np.array([[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
>>> water = Structure(numbers=np.array([8, 1, 1]), positions=positions)
>>> columns = Columns.from_structures([water, water])
>>> batch = build_batch(columns, PaddingBudget(n_node=8, n_edge=16, n_graph=3), cutoff=5.0)
>>> batch.n_node.tolist(), batch.n_edge.tolist()
([3, 3, 2], [6, 6, 4])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jraph
import numpy as np

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.near_origin import move_near_origin
from mlip_jax.graphs.neighbors import long_range_list, neighbor_list
from mlip_jax.graphs.shapes import PaddingBudget


def build_batch(
    columns: Columns,
    budget: PaddingBudget,
    cutoff: float,
    reference: np.ndarray | None = None,
    *,
    dtype=np.float32,
    long_range_cutoff: float | None = None,
    properties: Sequence[str] = (),
    near_origin: bool = True,
) -> jraph.GraphsTuple:
    """Build one padded batch of all structures of `columns`.

    The arrays are NumPy arrays in the layout of graphs/graph.py.

    Args:
      columns: Structures of the batch.
      budget: Static shape of the batch.
      cutoff: Cutoff radius (Å).
      reference: Reference energy of each element (eV), shape (119,); subtracted in float64.
      dtype: Floating-point type of the arrays.
      long_range_cutoff: Cutoff of long-range pairs (Å), inf for all pairs; None for a batch without
        a list of long-range pairs.
      properties: Names of labels other than energies and forces. globals["properties"] has those of
        structures, (G, ...), and nodes["properties"] those of atoms, (N, ...); NaN if a structure
        has no such label.
      near_origin: Whether to move structures far from the origin to it, see `move_near_origin`.

    Raises:
      ValueError: The structures do not fit into the budget, or the long-range cutoff is infinite
        and a structure is periodic.
    """
    if near_origin:
        columns = move_near_origin(columns)
    n_node = columns.n_atoms
    neighbors = [
        neighbor_list(positions, cutoff, *box) for positions, *box in each_geometry(columns)
    ]
    n_edge = np.array([len(nb.senders) for nb in neighbors], np.int64)
    if (
        n_node.sum() > budget.n_node - 1
        or n_edge.sum() > budget.n_edge
        or len(columns) > budget.n_graph - 1
    ):
        raise ValueError(
            f"{len(columns)} structures with {n_node.sum()} atoms and {n_edge.sum()} edges do not "
            f"fit into {budget}"
        )
    energy = subtract_references(columns, reference)
    pad = budget.n_graph - len(columns)
    columns_of_edges = _concatenate_edges(
        neighbors, n_node, n_edge, budget, columns.cell is not None
    )
    edges = {
        k: columns_of_edges[k] for k in ("pair_order", "shifts") if columns_of_edges[k] is not None
    }
    if long_range_cutoff is not None:
        edges["long_range"] = _long_range(columns, long_range_cutoff, budget)
    cell = None if columns.cell is None else pad_rows(columns.cell.astype(dtype), budget.n_graph)
    graph_labels, node_labels = batch_labels(columns, budget, properties, dtype)
    return jraph.GraphsTuple(
        nodes={
            "positions": pad_rows(columns.positions.astype(dtype), budget.n_node),
            "numbers": pad_rows(columns.numbers.astype(np.int32), budget.n_node),
            "forces": pad_rows(columns.forces.astype(dtype), budget.n_node),
            **node_labels,
        },
        edges=edges,
        senders=columns_of_edges["senders"],
        receivers=columns_of_edges["receivers"],
        globals={
            "energy": pad_rows(energy.astype(dtype), budget.n_graph),
            "charge": pad_rows(columns.charge.astype(dtype), budget.n_graph),
            **({} if cell is None else {"cell": cell}),
            **(
                {}
                if columns.spin is None
                else {"spin": pad_rows(columns.spin.astype(dtype), budget.n_graph)}
            ),
            **graph_labels,
        },
        n_node=np.concatenate([n_node, [budget.n_node - n_node.sum()], np.zeros(pad - 1)]).astype(
            np.int32
        ),
        n_edge=np.concatenate([n_edge, [budget.n_edge - n_edge.sum()], np.zeros(pad - 1)]).astype(
            np.int32
        ),
    )


def batch_labels(
    columns: Columns, budget: PaddingBudget, names: Sequence[str], dtype
) -> tuple[dict, dict]:
    """Return {"properties": ...} of the graphs and of the nodes; {} if there are none."""
    by_size = []
    for available, length in (
        (columns.properties, budget.n_graph),
        (columns.atom_properties, budget.n_node),
    ):
        labels = {
            name: pad_rows(available[name].astype(dtype), length)
            for name in names
            if name in available
        }
        by_size.append({"properties": labels} if labels else {})
    return by_size[0], by_size[1]


def subtract_references(columns: Columns, reference: np.ndarray | None) -> np.ndarray:
    """Return total energies minus the per-element reference energies, (S,) float64 eV."""
    energy = np.array(columns.energy)
    if reference is not None and len(columns):
        energy -= np.add.reduceat(reference[columns.numbers], columns.offsets[:-1])
    return energy


def each_geometry(
    columns: Columns,
) -> Iterator[tuple[np.ndarray, np.ndarray | None, np.ndarray | None]]:
    """Yield (positions, cell, pbc) of each structure; cell and pbc are None for open boundaries."""
    for s in range(len(columns)):
        atoms = slice(columns.offsets[s], columns.offsets[s + 1])
        periodic = columns.pbc is not None and columns.pbc[s].any()
        yield (
            columns.positions[atoms],
            columns.cell[s] if periodic else None,
            columns.pbc[s] if periodic else None,
        )


def _long_range(columns, cutoff, budget) -> dict[str, np.ndarray]:
    """Concatenate long-range pairs; padding pairs connect the first padding atom to itself."""
    lists = [long_range_list(positions, cutoff, *box) for positions, *box in each_geometry(columns)]
    n_pair = sum(len(pairs[0]) for pairs in lists)
    if n_pair > budget.n_pair:
        raise ValueError(
            f"{len(columns)} structures with {n_pair} long-range pairs do not fit into {budget}"
        )
    padding = np.full(budget.n_pair - n_pair, len(columns.numbers), np.int32)
    first_atom = columns.offsets.astype(np.int32)
    out = {
        name: np.concatenate([*(pairs[k] + a for pairs, a in zip(lists, first_atom)), padding])
        for k, name in enumerate(("receivers", "senders"))
    }
    if columns.cell is not None:
        rows = [
            np.zeros((len(pairs[0]), 3), np.int32) if pairs[2] is None else pairs[2]
            for pairs in lists
        ]
        out["shifts"] = pad_rows(np.concatenate([np.zeros((0, 3), np.int32), *rows]), budget.n_pair)
    return out


def pad_rows(array: np.ndarray, length: int) -> np.ndarray:
    """Append zero rows up to `length`."""
    return np.concatenate([array, np.zeros((length - len(array), *array.shape[1:]), array.dtype)])


def _concatenate_edges(neighbors, n_node, n_edge, budget, periodic) -> dict[str, np.ndarray | None]:
    """Concatenate edges; padding edges connect the first padding atom to itself, in pairs."""
    first_atom = np.concatenate([[0], np.cumsum(n_node)]).astype(np.int32)
    first_edge = np.concatenate([[0], np.cumsum(n_edge)]).astype(np.int32)
    total, atom = int(first_edge[-1]), first_atom[-1]
    padding = np.full(budget.n_edge - total, atom, np.int32)
    idle = np.arange(total, budget.n_edge, dtype=np.int32)  # indices of padding edges

    def joined(name, add):
        return [getattr(nb, name) + a for nb, a in zip(neighbors, add)]

    # pair_order lists the forward edges of all structures first, then their reverse edges
    halves = [np.split(o, 2) for o in joined("pair_order", first_edge)]
    shifts = None
    if periodic:
        rows = [
            np.zeros((len(nb.senders), 3), np.int32) if nb.shifts is None else nb.shifts
            for nb in neighbors
        ]
        shifts = pad_rows(np.concatenate([np.zeros((0, 3), np.int32), *rows]), budget.n_edge)
    return {
        "senders": np.concatenate(joined("senders", first_atom) + [padding]),
        "receivers": np.concatenate(joined("receivers", first_atom) + [padding]),
        "pair_order": np.concatenate(
            [h[0] for h in halves] + [idle[0::2]] + [h[1] for h in halves] + [idle[1::2]]
        ),
        "shifts": shifts,
    }
