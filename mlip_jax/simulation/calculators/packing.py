"""One padded structure as two flat arrays: every array that a compiled function is handed costs time on the host."""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jraph
import numpy as np

from mlip_jax.graphs.neighbors import Neighbors
from mlip_jax.graphs.shapes import SizeBucket


class _ArrayLayout(NamedTuple):
    """What a flat array holds: (name, places, shape) of each part."""

    total: int
    places: tuple[tuple[str, slice, tuple[int, ...]], ...]


def pack(numbers: np.ndarray, positions: np.ndarray, neighbors: Neighbors, bucket: SizeBucket, dtype, *,
         charge: float = 0.0, spin: float = 0.0, cell: np.ndarray | None = None, long_range=None
         ) -> tuple[np.ndarray, np.ndarray]:
    """All that is floating and all integers of the padded graph that `unpack` makes of them.

    Args:
      numbers, positions: (n_atoms,) and (n_atoms, 3) in Å.
      neighbors: Of these positions.
      bucket: Holds n_atoms + 1 atoms, all edges and all pairs.
      dtype: Of all that is floating.
      charge: e. spin: Number of unpaired electrons.
      cell: (3, 3) in Å, if the bucket is periodic.
      long_range: What `long_range_list` gives, if the bucket has long-range pairs.
    """
    n, e, budget = len(numbers), len(neighbors.senders), bucket.budget
    floats, ints = np.zeros(_floats(bucket).total, dtype), np.zeros(_ints(bucket).total, np.int32)
    graph = unpack(bucket, floats, ints)  # views: what is written into them stands in the flat arrays
    graph.nodes["positions"][:n] = positions
    graph.nodes["numbers"][:n] = numbers
    _pad_into(graph.senders, neighbors.senders, n)
    _pad_into(graph.receivers, neighbors.receivers, n)
    # the reverse of the padding edge at place p of the first half stands at place p of the second
    half, middle, order = e // 2, budget.n_edge // 2, graph.edges["pair_order"]
    order[:half], order[middle:middle + half] = neighbors.pair_order[:half], neighbors.pair_order[half:]
    order[half:middle], order[middle + half:] = np.arange(e, budget.n_edge, 2), np.arange(e + 1, budget.n_edge, 2)
    graph.globals["charge"][0], graph.globals["spin"][0] = charge, spin
    graph.n_node[:], graph.n_edge[:] = (n, budget.n_node - n), (e, budget.n_edge - e)
    if bucket.periodic:
        graph.edges["shifts"][:e] = neighbors.shifts
        graph.globals["cell"][0] = cell
    if bucket.long_range:
        receivers, senders, shifts = long_range
        pairs = graph.edges["long_range"]
        _pad_into(pairs["receivers"], receivers, n)
        _pad_into(pairs["senders"], senders, n)
        if bucket.periodic:
            pairs["shifts"][:len(shifts)] = shifts
    return floats, ints


def _pad_into(out: np.ndarray, values: np.ndarray, fill: int) -> None:
    out[:len(values)] = values
    out[len(values):] = fill


def unpack(bucket: SizeBucket, floats, ints) -> jraph.GraphsTuple:
    """The structure and a padding graph as graphs/graph.py says; NumPy arrays (views) or traced ones."""
    real, whole = _split(_floats(bucket), floats), _split(_ints(bucket), ints)
    edges = {name: whole[name] for name in ("pair_order", "shifts") if name in whole}
    if bucket.long_range:
        edges["long_range"] = {name: whole[f"pair_{name}"] for name in ("receivers", "senders", "shifts")
                               if f"pair_{name}" in whole}
    return jraph.GraphsTuple(
        nodes={"positions": real["positions"], "numbers": whole["numbers"]}, edges=edges,
        globals={name: real[name] for name in ("charge", "spin", "cell") if name in real},
        senders=whole["senders"], receivers=whole["receivers"], n_node=whole["n_node"], n_edge=whole["n_edge"])


@functools.lru_cache(maxsize=256)
def _floats(bucket: SizeBucket) -> _ArrayLayout:
    cell = {"cell": (2, 3, 3)} if bucket.periodic else {}
    return _parts({"positions": (bucket.budget.n_node, 3), "charge": (2,), "spin": (2,), **cell})


@functools.lru_cache(maxsize=256)
def _ints(bucket: SizeBucket) -> _ArrayLayout:
    budget = bucket.budget
    edges, pairs = budget.n_edge, budget.n_pair
    shapes = {"numbers": (budget.n_node,), "n_node": (2,), "n_edge": (2,), "senders": (edges,), "receivers": (edges,),
              "pair_order": (edges,)}
    if bucket.periodic:
        shapes["shifts"] = (edges, 3)
    if bucket.long_range:
        shapes |= {"pair_receivers": (pairs,), "pair_senders": (pairs,)}
        if bucket.periodic:
            shapes["pair_shifts"] = (pairs, 3)
    return _parts(shapes)


def _parts(shapes: dict[str, tuple[int, ...]]) -> _ArrayLayout:
    ends = itertools.accumulate((math.prod(part) for part in shapes.values()), initial=0)
    slices = [slice(*pair) for pair in itertools.pairwise(ends)]
    return _ArrayLayout(slices[-1].stop, tuple(zip(shapes, slices, shapes.values())))


def _split(parts: _ArrayLayout, flat) -> dict:
    return {name: flat[places].reshape(part) for name, places, part in parts.places}
