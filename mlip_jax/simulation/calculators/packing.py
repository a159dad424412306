"""One padded structure as two flat arrays: every array that a compiled function is handed costs time on the host."""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jraph
import numpy as np

from mlip_jax.graphs.neighbors import Neighbors


class Shape(NamedTuple):
    """Static shape of a padded structure.

    Attributes:
      nodes: Atoms, the padding atom included. edges: Directed edges, an even number.
      pairs: Long-range pairs, or None if there is no list of them.
      periodic: It has a cell, and shifts.
    """

    nodes: int
    edges: int
    pairs: int | None = None
    periodic: bool = False


class _Parts(NamedTuple):
    """What a flat array holds: (name, places, shape) of each part."""

    total: int
    places: tuple[tuple[str, slice, tuple[int, ...]], ...]


def pack(numbers: np.ndarray, positions: np.ndarray, neighbors: Neighbors, shape: Shape, dtype, *, charge: float = 0.0,
         spin: float = 0.0, cell: np.ndarray | None = None, long_range=None) -> tuple[np.ndarray, np.ndarray]:
    """All that is floating and all integers of the padded graph that `unpack` makes of them.

    Args:
      numbers, positions: (n_atoms,) and (n_atoms, 3) in Å.
      neighbors: Of these positions.
      shape: Holds n_atoms + 1 atoms, all edges and all pairs.
      dtype: Of all that is floating.
      charge: e. spin: Number of unpaired electrons.
      cell: (3, 3) in Å, if the shape is periodic.
      long_range: What `long_range_list` gives, if the shape has pairs.
    """
    n, e = len(numbers), len(neighbors.senders)
    floats, ints = np.zeros(_floats(shape).total, dtype), np.zeros(_ints(shape).total, np.int32)
    graph = unpack(shape, floats, ints)  # views: what is written into them stands in the flat arrays
    graph.nodes["positions"][:n] = positions
    graph.nodes["numbers"][:n] = numbers
    _pad_into(graph.senders, neighbors.senders, n)
    _pad_into(graph.receivers, neighbors.receivers, n)
    # the reverse of the padding edge at place p of the first half stands at place p of the second
    half, middle, order = e // 2, shape.edges // 2, graph.edges["pair_order"]
    order[:half], order[middle:middle + half] = neighbors.pair_order[:half], neighbors.pair_order[half:]
    order[half:middle], order[middle + half:] = np.arange(e, shape.edges, 2), np.arange(e + 1, shape.edges, 2)
    graph.globals["charge"][0], graph.globals["spin"][0] = charge, spin
    graph.n_node[:], graph.n_edge[:] = (n, shape.nodes - n), (e, shape.edges - e)
    if shape.periodic:
        graph.edges["shifts"][:e] = neighbors.shifts
        graph.globals["cell"][0] = cell
    if shape.pairs is not None:
        receivers, senders, shifts = long_range
        pairs = graph.edges["long_range"]
        _pad_into(pairs["receivers"], receivers, n)
        _pad_into(pairs["senders"], senders, n)
        if shape.periodic:
            pairs["shifts"][:len(shifts)] = shifts
    return floats, ints


def _pad_into(out: np.ndarray, values: np.ndarray, fill: int) -> None:
    out[:len(values)] = values
    out[len(values):] = fill


def unpack(shape: Shape, floats, ints) -> jraph.GraphsTuple:
    """The structure and a padding graph as graphs/graph.py says; NumPy arrays (views) or traced ones."""
    real, whole = _split(_floats(shape), floats), _split(_ints(shape), ints)
    edges = {name: whole[name] for name in ("pair_order", "shifts") if name in whole}
    if shape.pairs is not None:
        edges["long_range"] = {name: whole[f"pair_{name}"] for name in ("receivers", "senders", "shifts")
                               if f"pair_{name}" in whole}
    return jraph.GraphsTuple(
        nodes={"positions": real["positions"], "numbers": whole["numbers"]}, edges=edges,
        globals={name: real[name] for name in ("charge", "spin", "cell") if name in real},
        senders=whole["senders"], receivers=whole["receivers"], n_node=whole["n_node"], n_edge=whole["n_edge"])


@functools.lru_cache(maxsize=256)
def _floats(shape: Shape) -> _Parts:
    cell = {"cell": (2, 3, 3)} if shape.periodic else {}
    return _parts({"positions": (shape.nodes, 3), "charge": (2,), "spin": (2,), **cell})


@functools.lru_cache(maxsize=256)
def _ints(shape: Shape) -> _Parts:
    edges, pairs = shape.edges, shape.pairs
    shapes = {"numbers": (shape.nodes,), "n_node": (2,), "n_edge": (2,), "senders": (edges,), "receivers": (edges,),
              "pair_order": (edges,)}
    if shape.periodic:
        shapes["shifts"] = (edges, 3)
    if pairs is not None:
        shapes |= {"pair_receivers": (pairs,), "pair_senders": (pairs,)}
        if shape.periodic:
            shapes["pair_shifts"] = (pairs, 3)
    return _parts(shapes)


def _parts(shapes: dict[str, tuple[int, ...]]) -> _Parts:
    ends = itertools.accumulate((math.prod(part) for part in shapes.values()), initial=0)
    slices = [slice(*pair) for pair in itertools.pairwise(ends)]
    return _Parts(slices[-1].stop, tuple(zip(shapes, slices, shapes.values())))


def _split(parts: _Parts, flat) -> dict:
    return {name: flat[places].reshape(part) for name, places, part in parts.places}
