"""Packing of one padded structure into two flat arrays, one of floats and one of integers.

Each array that is passed to a compiled function costs time on the host, so two are passed instead
of one per field of the graph.
"""

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
    """Layout of a flat array.

    Attributes:
      total: Length of the array.
      fields: (name, slice, shape) of each field.
    """

    total: int
    fields: tuple[tuple[str, slice, tuple[int, ...]], ...]


def pack(
    numbers: np.ndarray,
    positions: np.ndarray,
    neighbors: Neighbors,
    bucket: SizeBucket,
    dtype,
    *,
    charge: float = 0.0,
    spin: float = 0.0,
    cell: np.ndarray | None = None,
    long_range=None,
) -> tuple[np.ndarray, np.ndarray]:
    """Pack a structure into a float and an integer array, see `unpack`.

    Args:
      numbers: Atomic numbers, (n_atoms,).
      positions: Positions (Å), (n_atoms, 3).
      neighbors: Neighbor list of these positions.
      bucket: Size bucket with space for n_atoms + 1 atoms, all edges and all pairs.
      dtype: Dtype of the float array.
      charge: Total charge (e).
      spin: Number of unpaired electrons.
      cell: Lattice vectors (Å), (3, 3), if the bucket is periodic.
      long_range: Result of `long_range_list`, if the bucket has long-range pairs.
    """
    n, e, budget = len(numbers), len(neighbors.senders), bucket.budget
    floats, ints = np.zeros(_floats(bucket).total, dtype), np.zeros(_ints(bucket).total, np.int32)
    graph = unpack(bucket, floats, ints)  # views: writing to the graph writes to the flat arrays
    graph.nodes["positions"][:n] = positions
    graph.nodes["numbers"][:n] = numbers
    _pad_into(graph.senders, neighbors.senders, n)
    _pad_into(graph.receivers, neighbors.receivers, n)
    # padding edge p of the first half and padding edge p of the second half are reverse to each
    # other
    half, middle, order = e // 2, budget.n_edge // 2, graph.edges["pair_order"]
    order[:half], order[middle : middle + half] = (
        neighbors.pair_order[:half],
        neighbors.pair_order[half:],
    )
    order[half:middle], order[middle + half :] = (
        np.arange(e, budget.n_edge, 2),
        np.arange(e + 1, budget.n_edge, 2),
    )
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
            pairs["shifts"][: len(shifts)] = shifts
    return floats, ints


def _pad_into(out: np.ndarray, values: np.ndarray, fill: int) -> None:
    """Copy `values` to the beginning of `out` and fill the rest."""
    out[: len(values)] = values
    out[len(values) :] = fill


def unpack(bucket: SizeBucket, floats, ints) -> jraph.GraphsTuple:
    """Build the graph of the structure and a padding graph, in the layout of graphs/graph.py.

    The fields are views of NumPy arrays, or traced arrays inside a compiled function.
    """
    floats_by_name, ints_by_name = _split(_floats(bucket), floats), _split(_ints(bucket), ints)
    edges = {name: ints_by_name[name] for name in ("pair_order", "shifts") if name in ints_by_name}
    if bucket.long_range:
        edges["long_range"] = {
            name: ints_by_name[f"pair_{name}"]
            for name in ("receivers", "senders", "shifts")
            if f"pair_{name}" in ints_by_name
        }
    return jraph.GraphsTuple(
        nodes={"positions": floats_by_name["positions"], "numbers": ints_by_name["numbers"]},
        edges=edges,
        globals={
            name: floats_by_name[name]
            for name in ("charge", "spin", "cell")
            if name in floats_by_name
        },
        senders=ints_by_name["senders"],
        receivers=ints_by_name["receivers"],
        n_node=ints_by_name["n_node"],
        n_edge=ints_by_name["n_edge"],
    )


@functools.lru_cache(maxsize=256)
def _floats(bucket: SizeBucket) -> _ArrayLayout:
    """Return the layout of the float array."""
    cell = {"cell": (2, 3, 3)} if bucket.periodic else {}
    return _parts({"positions": (bucket.budget.n_node, 3), "charge": (2,), "spin": (2,), **cell})


@functools.lru_cache(maxsize=256)
def _ints(bucket: SizeBucket) -> _ArrayLayout:
    """Return the layout of the integer array."""
    budget = bucket.budget
    edges, pairs = budget.n_edge, budget.n_pair
    shapes = {
        "numbers": (budget.n_node,),
        "n_node": (2,),
        "n_edge": (2,),
        "senders": (edges,),
        "receivers": (edges,),
        "pair_order": (edges,),
    }
    if bucket.periodic:
        shapes["shifts"] = (edges, 3)
    if bucket.long_range:
        shapes |= {"pair_receivers": (pairs,), "pair_senders": (pairs,)}
        if bucket.periodic:
            shapes["pair_shifts"] = (pairs, 3)
    return _parts(shapes)


def _parts(shapes: dict[str, tuple[int, ...]]) -> _ArrayLayout:
    """Return the layout of a flat array that holds fields of the given shapes one after another."""
    ends = itertools.accumulate((math.prod(part) for part in shapes.values()), initial=0)
    slices = [slice(*pair) for pair in itertools.pairwise(ends)]
    return _ArrayLayout(slices[-1].stop, tuple(zip(shapes, slices, shapes.values())))


def _split(parts: _ArrayLayout, flat) -> dict:
    """Return the fields of a flat array by name, in their shapes."""
    return {name: flat[span].reshape(part) for name, span, part in parts.fields}
