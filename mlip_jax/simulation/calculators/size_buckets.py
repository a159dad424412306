"""Few static shapes for structures of many sizes: each is compiled once and serves all that it holds."""

from __future__ import annotations

import numpy as np

from mlip_jax.simulation.calculators.packing import Shape

_GROWTH = 1.25
_NODE_MULTIPLE, _EDGE_MULTIPLE = 8, 64
# Edges and pairs come and go while atoms move: a new shape has room for some more of them.
_ROOM = 1.1
# A compiled shape serves structures down to this share of it; smaller ones are worth a program of their own.
_MAX_WASTE = 3


class Buckets:
    """The shapes that are in use so far.

    Args:
      long_range_cutoff: Å, inf for all pairs, None for a force field without long-range pairs.
    """

    def __init__(self, long_range_cutoff: float | None):
        self._long_range_cutoff = long_range_cutoff
        self._shapes: set[Shape] = set()

    def choose(self, n_node: int, n_edge: int, n_pair: int | None, periodic: bool) -> Shape:
        """The tightest shape in use that holds the structure and is not far too large, or else a new one.

        Args:
          n_node: Atoms, without padding. n_edge: Directed edges. n_pair: Long-range pairs, None if there is no list.
          periodic: It has a cell.
        """
        nodes = n_node + 1
        fitting = [s for s in self._shapes if s.periodic == periodic and nodes <= s.nodes <= _MAX_WASTE * nodes
                   and n_edge <= s.edges <= _MAX_WASTE * n_edge
                   and (n_pair is None or n_pair <= s.pairs <= _MAX_WASTE ** 2 * n_pair)]
        if fitting:
            return min(fitting, key=lambda s: (s.edges, s.pairs or 0, s.nodes))
        nodes, edges = bucket(nodes, _NODE_MULTIPLE), int(np.ceil(n_edge * _ROOM))
        if not periodic:
            edges = min(edges, n_node * (n_node - 1))
        shape = Shape(nodes, bucket(edges, _EDGE_MULTIPLE), self._room_for_pairs(n_node, nodes, n_pair, periodic),
                      periodic)
        self._shapes.add(shape)
        return shape

    def _room_for_pairs(self, n_node, nodes, n_pair, periodic) -> int | None:
        if n_pair is None:
            return None
        if np.isinf(self._long_range_cutoff):
            pairs = (nodes - 1) * (nodes - 2) // 2  # of any structure that there are atoms for
        else:
            pairs = int(np.ceil(n_pair * _ROOM))
            pairs = pairs if periodic else min(pairs, n_node * (n_node - 1) // 2)
        return bucket(pairs, _EDGE_MULTIPLE)


def bucket(size: int, multiple: int) -> int:
    """The smallest bucket that holds `size`; buckets are multiples of `multiple` that grow by about 1.25."""
    edge = multiple
    while edge < size:
        edge = -(-max(int(edge * _GROWTH), edge + 1) // multiple) * multiple
    return edge
