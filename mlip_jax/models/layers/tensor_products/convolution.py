"""Equivariant convolution: weighted products of neighbors' features and spherical harmonics.

    out_i[path, c, u] = sum_j w_ij[path, u] sum_ab C_abc x_j[a, u] Y_b(r_ij)

A path couples an input irrep and a degree of the harmonics to an output irrep, with a weight per
edge and channel. Weights are computed once per undirected pair, from the last hidden layer of a
radial network.
"""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.graphs.graph import Pairs, pairs, slot_geometry
from mlip_jax.graphs.slot_sums import SlotIndex
from mlip_jax.models.layers.tensor_products import cuequivariance_products
from mlip_jax.models.layers.tensor_products.chunks import PathGroup, Spec
from mlip_jax.models.layers.tensor_products.irreps import Features, Irrep, Irreps, product
from mlip_jax.models.layers.tensor_products.linear import PathWeights
from mlip_jax.models.layers.tensor_products.primitives import convolve_blocks
from mlip_jax.target_device import target_platform

# Edges per block: on a CPU, their intermediate values fit into the cache of a core; elsewhere, large
# blocks keep the device busy, and bound the memory.
_CPU_BLOCK, _BLOCK = 512, 2**16
# _MAX_IN_SLOTS: number of slots up to which edges are in slots, where graphs have slots. They are in
# one block, so that more of them need much memory.
_MAX_IN_SLOTS = 2**19


class Path(NamedTuple):
    """Coupling of an input irrep and a degree of the harmonics to an output irrep.

    Attributes:
      source: Input irrep.
      degree: Degree of the harmonics.
      target: Output irrep.
      channels: Number of channels, those of the source.
      start: Index of its first weight.
    """

    source: Irrep
    degree: int
    target: Irrep
    channels: int
    start: int


def convolution_paths(
    sources: Irreps, harmonics: list[Irrep], wanted: Container[Irrep], sort_weights: bool = False
) -> tuple[Path, ...]:
    """Return the paths of a convolution, in the order of the output.

    The output is sorted by irrep. Within an irrep, the channels of paths follow each other in the
    order of the loops: sources, then harmonics.

    Args:
      sources: Irreps of the input.
      harmonics: Irreps of the harmonics, one for each degree from 0 on.
      wanted: Irreps of the output; other paths are left out.
      sort_weights: Whether the weights are in the order of the output (MACE, SevenNet from 0.11
        on) instead of the order of the loops (NequIP).
    """
    loops = [
        (source, b, target, channels)
        for channels, source in sources
        for b in range(len(harmonics))
        for target in product(source, harmonics[b])
        if target in wanted
    ]
    order = sorted(range(len(loops)), key=lambda k: loops[k][2])
    start, starts = 0, {}
    for k in order if sort_weights else range(len(loops)):
        starts[k] = start
        start += loops[k][3]
    return tuple(Path(*loops[k], starts[k]) for k in order)


def convolution_pairs(graph: jraph.GraphsTuple, undirected: bool) -> Pairs:
    """Return the edges of a graph for convolutions.

    If the graph has slots (graphs/neighbor_slots.py) and is not large, the edges are its slots, both
    indices are `SlotIndex`, and no sum has atomic additions.

    Args:
      graph: Graph.
      undirected: Whether to list each pair once, if the edges are not slots.
    """
    slots = graph.edges.get("slots")
    if slots is None or slots.senders.size > _MAX_IN_SLOTS:
        return pairs(graph, undirected)
    num, capacity = slots.senders.shape
    places = jnp.arange(num * capacity, dtype=jnp.int32).reshape(num, capacity)
    receivers = SlotIndex(places.ravel() // capacity, places, slots.used)
    vectors = slot_geometry(graph).displacements.reshape(-1, 3)
    return Pairs(receivers, slots.slot_senders(), vectors, False)


def num_weights(paths: tuple[Path, ...]) -> int:
    """Return the number of weights per edge."""
    return sum(path.channels for path in paths)


def output_irreps(paths: tuple[Path, ...]) -> Irreps:
    """Return the irreps of the convolution's output."""
    channels: dict[Irrep, int] = {}
    for path in paths:
        channels[path.target] = channels.get(path.target, 0) + path.channels
    return tuple((count, irrep) for irrep, count in channels.items())


def convolve(
    features: Features,
    harmonics: list[jax.Array],
    weights: PathWeights,
    edge: Pairs,
    paths: tuple[Path, ...],
    old_signs: bool = False,
) -> Features:
    """Sum the messages of the neighbors of each atom.

    Args:
      features: Features of the atoms, shape (N, 2l + 1, channels) per irrep.
      harmonics: Spherical harmonics of edge.displacements, shape (P, 2l + 1) per degree.
      weights: Weights of the paths for each pair.
      edge: Pairs.
      paths: Paths of `convolution_paths`.
      old_signs: Take the couplings of e3nn 0.4.4.

    Returns:
      Features, shape (N, 2l + 1, channels of all paths) per irrep.
    """
    groups = _groups(paths)
    hidden = _pad(weights.hidden, _num_rows(edge))
    x = [
        jnp.concatenate([features[source] for source in group.sources], axis=-1) for group in groups
    ]
    w = [[hidden @ _columns(weights.kernel, paths) for paths in group.paths] for group in groups]
    parts = tuple(PathGroup(group.degree, group.triples) for group in groups)
    return _by_irrep(paths, groups, sum_products(parts, x, harmonics, w, edge, old_signs))


def sum_products(
    groups: tuple[PathGroup, ...],
    x,
    harmonics: list[jax.Array],
    w,
    edge: Pairs,
    old_signs: bool = False,
):
    """Sum the products of features, harmonics and weights, an array (N, c, U) per group and path.

    Args:
      groups: Groups of paths.
      x: Features of each group, shape (N, a, U).
      harmonics: Spherical harmonics of the messages to edge.receivers, one array for each degree.
      w: Weights of each group and path, shape (P, U), or more rows of zeros.
      edge: Pairs.
      old_signs: Take the couplings of e3nn 0.4.4.
    """
    max_degree = max(degree for group in groups for degree, _ in group.paths)
    y = jnp.concatenate(harmonics[: max_degree + 1], axis=-1)
    num, rows = len(y), _num_rows(edge)
    if cuequivariance_products.is_chosen():
        w = [[values[:num] for values in group] for group in w]
        senders, receivers = _atoms(edge.senders), _atoms(edge.receivers)
        return cuequivariance_products.sum_products(
            groups, x, y, w, senders, receivers, edge.undirected, old_signs
        )
    spec = Spec(
        groups,
        edge.undirected,
        old_signs,
        _block(edge),
        compact=num <= _CPU_BLOCK,
        stored=target_platform() == "cpu",
    )
    if isinstance(edge.senders, SlotIndex):
        return convolve_blocks(spec, x, y, w, edge.senders, None)
    y = _pad(y, rows)
    w = [[_pad(values, rows) for values in group] for group in w]  # padding has no weight
    return convolve_blocks(spec, x, y, w, _pad(edge.senders, rows), _pad(edge.receivers, rows))


def _atoms(index: jax.Array | SlotIndex) -> jax.Array:
    """Return the atom of each edge."""
    return index.atoms if isinstance(index, SlotIndex) else index


def _num_rows(edge: Pairs) -> int:
    """Return the number of edges in whole blocks."""
    num = len(_atoms(edge.senders))
    return -(-num // _block(edge)) * _block(edge)


def _block(edge: Pairs) -> int:
    """Return the number of edges of a block; slots are in one."""
    num = len(_atoms(edge.senders))
    if isinstance(edge.senders, SlotIndex):
        return num
    return min(_CPU_BLOCK if target_platform() == "cpu" else _BLOCK, num)


class _Group(NamedTuple):
    """Sources of one degree that have the same paths, joined along their channels.

    Attributes:
      degree: Degree of the sources.
      sources: Irreps of the sources.
      triples: Degrees of the harmonics and of the output of each path.
      paths: Path of each source, for each triple.
    """

    degree: int
    sources: list[Irrep]
    triples: tuple[tuple[int, int], ...]
    paths: list[list[Path]]


def _groups(paths: tuple[Path, ...]) -> list[_Group]:
    """Group the sources of paths."""
    of_source: dict[Irrep, dict[tuple[int, int], Path]] = {}
    for path in paths:
        of_source.setdefault(path.source, {})[path.degree, path.target.degree] = path
    joined: dict[tuple, list[Irrep]] = {}
    for source in sorted(of_source):
        joined.setdefault((source.degree, tuple(sorted(of_source[source]))), []).append(source)
    return [
        _Group(
            degree,
            sources,
            triples,
            [[of_source[source][triple] for source in sources] for triple in triples],
        )
        for (degree, triples), sources in joined.items()
    ]


def _columns(kernel: jax.Array, paths: list[Path]) -> jax.Array:
    """Return the columns of paths in slices, whose transpose has no scatter operation."""
    parts = [kernel[:, path.start : path.start + path.channels] for path in paths]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _by_irrep(paths: tuple[Path, ...], groups: list[_Group], summed) -> Features:
    """Order the sums of groups: the channels of all paths of an irrep, in the order of `paths`."""
    found, out = {}, {}
    for group, values in zip(groups, summed):
        for triple, value in zip(group.triples, values):
            channels = {path.source: path.channels for path in paths}
            ends = np.cumsum([channels[source] for source in group.sources])
            for source, part in zip(group.sources, jnp.split(value, ends[:-1], axis=-1)):
                found[source, *triple] = part
    for path in paths:
        out.setdefault(path.target, []).append(found[path.source, path.degree, path.target.degree])
    return {irrep: jnp.concatenate(parts, axis=-1) for irrep, parts in out.items()}


def _pad(values: jax.Array, size: int) -> jax.Array:
    """Append rows of zeros, up to `size` rows."""
    return jnp.pad(values, ((0, size - len(values)), *[(0, 0)] * (values.ndim - 1)))
