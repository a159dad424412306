"""Padded batches of molecular graphs: heavy atoms and bonds of SMILES.

    nodes   {"atom_features": (N, 9) int32, "numbers": (N,) int32, "positions": (N, 3) Å,
            "properties": labels of atoms, or absent}
    edges   {"bond_features": (E, 3) int32}
    globals {"charge": (G,) e, "properties": see build_batch, or absent}

The features are those of datasets/smiles/bond_graph.py. Each bond is two edges. Padding is as in
graphs/batch.py. The nodes are not the atoms of the structures, which include hydrogens. Positions
are NaN in structures whose first atoms are not the heavy atoms in the order of the SMILES.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import jraph
import numpy as np
from ase.data import covalent_radii

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.smiles.bond_graph import BondGraph, bond_graph
from mlip_jax.graphs.batch import batch_labels, pad_rows
from mlip_jax.graphs.shapes import PaddingBudget, Sizes

# Largest length of a bond in units of the sum of the covalent radii. Distances of atoms that are
# two bonds apart are longer, 1.6 in propane.
_LONGEST_BOND = 1.4


def bond_sizes(smiles: Iterable[str]) -> Sizes:
    """Count heavy atoms and edges of the molecular graph of each SMILES.

    Raises:
      ValueError: A SMILES cannot be read.
    """
    graphs = [_graph(text) for text in smiles]
    return Sizes(
        np.array([len(g.atoms) for g in graphs], np.int64),
        np.array([len(g.senders) for g in graphs], np.int64),
    )


def build_bond_batch(
    columns: Columns, budget: PaddingBudget, *, dtype=np.float32, properties: Sequence[str] = ()
) -> jraph.GraphsTuple:
    """Build one padded batch of the molecular graphs of all structures of `columns`.

    Args:
      columns: Structures of the batch. Only their SMILES and labels are used.
      budget: Static shape of the batch.
      dtype: Floating-point type of the labels; models compute in it.
      properties: Names of the labels, see `build_batch`. Labels of atoms are those of the nodes.

    Raises:
      ValueError: A SMILES cannot be read, or the graphs do not fit into the budget.
    """
    graphs = [_graph(text) for text in columns.smiles]
    n_node = np.array([len(g.atoms) for g in graphs], np.int64)
    n_edge = np.array([len(g.senders) for g in graphs], np.int64)
    if (
        n_node.sum() > budget.n_node - 1
        or n_edge.sum() > budget.n_edge
        or len(graphs) > budget.n_graph - 1
    ):
        raise ValueError(
            f"{len(graphs)} molecular graphs with {n_node.sum()} atoms and {n_edge.sum()} edges "
            f"do not fit into {budget}"
        )
    first = np.concatenate([[0], np.cumsum(n_node)]).astype(np.int32)
    padding = np.full(budget.n_edge - n_edge.sum(), first[-1], np.int32)
    atoms = np.concatenate([np.zeros((0, 9), np.int32), *(g.atoms for g in graphs)])
    bonds = np.concatenate([np.zeros((0, 3), np.int32), *(g.bonds for g in graphs)])
    positions = _of_nodes(columns, graphs, columns.positions)
    of_graphs = dataclasses.replace(columns, atom_properties={})
    graph_labels, _ = batch_labels(of_graphs, budget, properties, dtype)
    node_labels = {
        name: pad_rows(_of_nodes(columns, graphs, values).astype(dtype), budget.n_node)
        for name, values in columns.atom_properties.items()
        if name in properties
    }
    empty = np.zeros(budget.n_graph - len(graphs) - 1)
    return jraph.GraphsTuple(
        nodes={
            "atom_features": pad_rows(atoms.astype(np.int32), budget.n_node),
            "numbers": pad_rows(atoms[:, 0].astype(np.int32) + 1, budget.n_node),
            "positions": pad_rows(positions.astype(dtype), budget.n_node),
            **({"properties": node_labels} if node_labels else {}),
        },
        edges={"bond_features": pad_rows(bonds.astype(np.int32), budget.n_edge)},
        senders=np.concatenate([*(g.senders + a for g, a in zip(graphs, first)), padding]),
        receivers=np.concatenate([*(g.receivers + a for g, a in zip(graphs, first)), padding]),
        globals={"charge": pad_rows(columns.charge.astype(dtype), budget.n_graph), **graph_labels},
        n_node=np.concatenate([n_node, [budget.n_node - n_node.sum()], empty]).astype(np.int32),
        n_edge=np.concatenate([n_edge, [budget.n_edge - n_edge.sum()], empty]).astype(np.int32),
    )


def is_in_order(columns: Columns, s: int, graph: BondGraph) -> bool:
    """Return whether the first atoms of structure s are the nodes of its graph, in this order.

    Atoms that are bonded in the graph must also be bonded by their distance, which is checked for
    finite positions.
    """
    atoms = slice(columns.offsets[s], columns.offsets[s + 1])
    numbers = columns.numbers[atoms][: len(graph.atoms)]
    if not np.array_equal(numbers, graph.atoms[:, 0].astype(int) + 1):
        return False
    positions = columns.positions[atoms]
    lengths = np.linalg.norm(positions[graph.senders] - positions[graph.receivers], axis=-1)
    radii = covalent_radii[numbers]
    limit = _LONGEST_BOND * (radii[graph.senders] + radii[graph.receivers])
    return not (lengths > limit).any()


def _of_nodes(columns: Columns, graphs: Sequence[BondGraph], values: np.ndarray) -> np.ndarray:
    """Return values of the atoms of structures, (A, ...), for the nodes of their graphs, (N, ...).

    They are NaN if the first atoms of a structure do not have the elements of the nodes.
    """
    parts = [np.zeros((0, *values.shape[1:]))]
    for s, graph in enumerate(graphs):
        atoms = slice(columns.offsets[s], columns.offsets[s + 1])
        first = columns.numbers[atoms][: len(graph.atoms)]
        if np.array_equal(first, graph.atoms[:, 0].astype(int) + 1):
            parts.append(values[atoms][: len(graph.atoms)])
        else:
            parts.append(np.full((len(graph.atoms), *values.shape[1:]), np.nan))
    return np.concatenate(parts)


def _graph(smiles: str) -> BondGraph:
    """Return the molecular graph of a SMILES. Raise ValueError if it cannot be read."""
    graph = bond_graph(str(smiles))
    if graph is None:
        raise ValueError(
            f"no molecular graph for the SMILES {str(smiles)[:80]!r}: models of bonds require a "
            "SMILES that RDKit can read"
        )
    return graph
