"""Rows of a batch in the concatenated arrays of a data set. Pure."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RowIndex(NamedTuple):
    """Index of the atoms, edges or pairs of a batch of G graphs.

    Attributes:
      count: Number of rows of each graph except the last one, which is padding; shape (G - 1,).
      begin: First row of each graph in the batch, shape (G - 1,).
      graph: Graph of each row, shape (N,); G - 1 in padding.
      source: Row in the array of the data set, shape (N,); 0 in padding.
    """

    count: jax.Array
    begin: jax.Array
    graph: jax.Array
    source: jax.Array

    @property
    def total(self) -> jax.Array:
        """Return the number of rows without padding."""
        return self.begin[-1] + self.count[-1]

    def take(self, array: jax.Array) -> jax.Array:
        """Return the rows of an array of the data set, zero in padding."""
        taken = take_rows(array, self.source)
        used = self.graph < len(self.count)
        return jnp.where(
            used.reshape(-1, *[1] * (array.ndim - 1)), taken, jnp.zeros((), array.dtype)
        )

    def take_atoms(self, array: jax.Array, atoms: RowIndex) -> jax.Array:
        """Convert atom indices of structures to atom indices of the batch.

        In padding the result is the index of the first padding atom.
        """
        return self.take(array).astype(jnp.int32) + take_rows(
            jnp.append(atoms.begin, atoms.total), self.graph
        )

    def per_graph(self, real: jax.Array) -> jax.Array:
        """Return the number of rows of each graph, shape (G,).

        The first padding graph has all remaining rows.
        """
        left = len(self.graph) - self.total
        return jnp.where(jnp.arange(len(real) + 1) == real.sum(), left, jnp.append(self.count, 0))


def index_rows(first: jax.Array, structure: jax.Array, real: jax.Array, length: int) -> RowIndex:
    """Compute the index of the rows of a batch.

    Args:
      first: First row of each structure of the data set, then the number of rows, shape (S + 1,).
      structure: Structure of each graph of the batch except the last one, shape (G - 1,).
      real: Whether the graph is not padding, shape (G - 1,).
      length: Number of rows of the batch, including padding.
    """
    start = first[structure]
    count = jnp.where(real, first[structure + 1] - start, 0)
    end = jnp.cumsum(count)
    begin, row = end - count, jnp.arange(length, dtype=jnp.int32)
    graph = graph_of_rows(end, row)
    return RowIndex(
        count,
        begin,
        graph,
        jnp.where(row < end[-1], row + take_rows(jnp.append(start - begin, 0), graph), 0),
    )


def graph_of_rows(end: jax.Array, row: jax.Array) -> jax.Array:
    """Return the graph of each row, given the end of the rows of each graph."""
    return jnp.searchsorted(end, row, side="right", method="compare_all").astype(jnp.int32)


def take_rows(array: jax.Array, index: jax.Array) -> jax.Array:
    """Return array[index] without bounds checks; callers ensure that indices are valid."""
    if not array.shape[0]:  # no structure has an edge
        return jnp.zeros((*index.shape, *array.shape[1:]), array.dtype)
    return array.at[index].get(mode="promise_in_bounds")
