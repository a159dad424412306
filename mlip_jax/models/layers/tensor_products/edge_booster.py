"""Equivariant features of edges, as in PACE, and their messages.

PACE multiplies the harmonics of an edge with themselves. All factors belong to the same direction,
so every product is a multiple of the harmonics of its degree: an edge has a number per degree and
channel, and the message of degree l is that number times Y_l.
"""

from __future__ import annotations

import functools
from math import sqrt
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.graphs.graph import Pairs
from mlip_jax.models.layers.basic import gather
from mlip_jax.models.layers.tensor_products.chunks import PathGroup
from mlip_jax.models.layers.tensor_products.convolution import sum_products
from mlip_jax.models.layers.tensor_products.couplings import coupling, opposite
from mlip_jax.models.layers.tensor_products.irreps import Features, Irrep, natural, product
from mlip_jax.models.layers.tensor_products.linear import (
    PathWeights,
    ScalarNetwork,
    element_index,
    normalized_activation,
    table_rows,
)


class SummedPath(NamedTuple):
    """Path whose products are added to those of other paths to the same irrep.

    Attributes:
      source: Irrep of the first factor.
      degree: Degree of the second factor.
      target: Irrep of the product.
      scale: One over the root of the number of paths to the target.
    """

    source: Irrep
    degree: int
    target: Irrep
    scale: float


@functools.cache
def summed_paths(source_degree: int, max_degree: int) -> tuple[SummedPath, ...]:
    """Return the paths of irreps (-1)^l, in the order of PACE's weights.

    Args:
      source_degree: Largest degree of the first factor.
      max_degree: Largest degree of the second factor and of the product.
    """
    wanted = natural(max_degree)
    found = [
        (source, degree, target)
        for source in natural(source_degree)
        for degree in range(max_degree + 1)
        for target in product(source, wanted[degree])
        if target in wanted
    ]
    counts = {irrep: sum(target == irrep for *_, target in found) for irrep in wanted}
    return tuple(SummedPath(*path, 1 / sqrt(counts[path[2]])) for path in found)


class Direction(NamedTuple):
    """One direction of the pairs.

    Attributes:
      edge: Directed pairs.
      harmonics: Spherical harmonics of the vectors from sender to receiver, one array per degree.
    """

    edge: Pairs
    harmonics: list[jax.Array]


def directions(edge: Pairs, harmonics: list[jax.Array]) -> list[Direction]:
    """Return the directions in which the pairs send messages, one or two.

    Args:
      edge: Pairs.
      harmonics: Spherical harmonics of edge.displacements, which point to the senders.
    """
    forward = Direction(edge._replace(undirected=False), opposite(harmonics))
    if not edge.undirected:
        return [forward]
    back = Pairs(edge.senders, edge.receivers, -edge.displacements, False)
    return [forward, Direction(back, harmonics)]


class ElementPairNetwork(nn.Module):
    """Perceptron of the elements of both atoms of an edge, in the form of linear.ScalarNetwork.

    Attributes:
      widths: Widths of the layers, the last one of the output.
      elements: Atomic numbers with weights; None for all.
    """

    widths: tuple[int, ...]
    elements: tuple[int, ...] | None

    def setup(self):
        """Create the tables of the first layer and the other layers."""
        num = element_index(np.zeros(1, np.int32), self.elements)[1]
        init = nn.initializers.normal(sqrt(0.5))
        shape = (num, self.widths[0])
        self.tables = [self.param(name, init, shape) for name in ("sender", "receiver")]
        self.network = ScalarNetwork(self.widths[1:])

    def path_weights(self, way: Direction, numbers: jax.Array, dtype) -> PathWeights:
        """Compute the last hidden layer of each edge, and return it with the last kernel."""
        index, num = element_index(numbers, self.elements)
        sender, receiver = (table.astype(dtype) for table in self.tables)
        first, second = (gather(index, atoms) for atoms in (way.edge.senders, way.edge.receivers))
        act = normalized_activation("silu")
        if num * num > len(first):
            return self.network.path_weights(act(_of_both(sender, receiver, index, way.edge)))
        # fewer pairs of elements than edges
        pairs = (sender[:, None] + receiver[None]).reshape(num * num, -1)
        hidden, kernel = self.network.path_weights(act(pairs))
        return PathWeights(table_rows(hidden, first * num + second), kernel)


def _of_both(sender, receiver, index, edge: Pairs):
    """Add the rows of the elements of both atoms of each edge: (Z, W) each -> (P, W)."""
    of_senders, of_receivers = table_rows(sender, index), table_rows(receiver, index)
    return gather(of_senders, edge.senders) + gather(of_receivers, edge.receivers)


class EdgeBooster(nn.Module):
    """Number of each edge per degree and channel, from the distance and both elements.

    Half of the channels have one factor Y, the others the product with a second one.

    Attributes:
      max_degree: Largest degree.
      width: Number of channels, even.
      radial_network: Widths of the hidden layers of the networks.
      elements: Atomic numbers with weights; None for all.
    """

    max_degree: int
    width: int
    radial_network: tuple[int, ...]
    elements: tuple[int, ...] | None

    @nn.compact
    def __call__(self, ways: list[Direction], radial: jax.Array, numbers: jax.Array):
        """Compute the numbers.

        Args:
          ways: Directions of the pairs.
          radial: Radial functions of the pairs with the envelope, shape (P, num_radial).
          numbers: Atomic numbers, shape (N,).

        Returns:
          For each direction a list over degrees of arrays (P, width).
        """
        half, degrees = self.width // 2, range(self.max_degree + 1)
        paths = summed_paths(self.max_degree, self.max_degree)
        filters = ScalarNetwork((*self.radial_network, half * len(degrees)), name="filter")(radial)
        filters = jnp.split(filters, len(degrees), axis=1)
        widths = (*self.radial_network, half * len(paths))
        by_radius = ScalarNetwork(widths, name="radial").path_weights(radial)
        by_elements = ElementPairNetwork(widths, self.elements, name="elements")
        initial = PairEmbedding(half, self.elements, name="embedding")
        # sums over the second factor act on the kernels
        kernel = self._combine(by_radius.kernel, paths)
        mixed = {key: by_radius.hidden @ values for key, values in kernel.items()}
        boosted = []
        for way in ways:
            h = initial(way, numbers, radial.dtype)
            first = [h * values for values in filters]
            pair = by_elements.path_weights(way, numbers, radial.dtype)
            kernel = self._combine(pair.kernel, paths)
            second = [
                sum(
                    first[k] * (mixed[k, l] + pair.hidden @ kernel[k, l])
                    for k in degrees
                    if (k, l) in kernel
                )
                for l in degrees
            ]
            boosted.append([jnp.concatenate(both, axis=1) for both in zip(first, second)])
        return boosted

    def _combine(self, kernel, paths):
        """Add the kernels of the paths from degree k to degree l: {(k, l): (hidden, half)}."""
        combined: dict[tuple[int, int], jax.Array] = {}
        for path, part in zip(paths, jnp.split(kernel, len(paths), axis=1)):
            key = (path.source.degree, path.target.degree)
            part = part * (path.scale * product_of_harmonics(key[0], path.degree, key[1]))
            combined[key] = combined[key] + part if key in combined else part
        return combined


@functools.cache
def product_of_harmonics(l1: int, l2: int, l3: int) -> float:
    """Return the factor of Y_l3 in the coupling of Y_l1 and Y_l2 of the same direction."""
    # along z only the last component of Y_l is not zero, sqrt(2l + 1)
    return float(
        coupling(l1, l2, l3)[-1, -1, -1] * sqrt((2 * l1 + 1) * (2 * l2 + 1) / (2 * l3 + 1))
    )


class PairEmbedding(nn.Module):
    """Two layers with a layer norm, of the elements of both atoms of an edge: (P, width).

    Attributes:
      width: Number of features.
      elements: Atomic numbers with weights; None for all.
    """

    width: int
    elements: tuple[int, ...] | None

    def setup(self):
        """Create the parameters."""
        num = element_index(np.zeros(1, np.int32), self.elements)[1]
        init = nn.initializers.normal(sqrt(1 / 6))
        self.tables = [self.param(name, init, (num, self.width)) for name in ("sender", "receiver")]
        self.scale = self.param("scale", nn.initializers.ones, (self.width,))
        self.bias = self.param("bias", nn.initializers.zeros, (self.width,))
        self.kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.width,) * 2)

    def __call__(self, way: Direction, numbers: jax.Array, dtype) -> jax.Array:
        """Compute the features of each edge in one direction."""
        index, num = element_index(numbers, self.elements)
        sender, receiver = (table.astype(dtype) for table in self.tables)
        first, second = (gather(index, atoms) for atoms in (way.edge.senders, way.edge.receivers))
        if num * num > len(first):
            return self._features(_of_both(sender, receiver, index, way.edge))
        pairs = (sender[:, None] + receiver[None]).reshape(num * num, -1)
        return table_rows(self._features(pairs), first * num + second)

    def _features(self, x):
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        x = x * self.scale.astype(x.dtype) + self.bias.astype(x.dtype)
        return jax.nn.silu(x) @ self.kernel.astype(x.dtype)


def sum_edges(ways: list[Direction], edges, num: int) -> Features:
    """Sum the features of the edges at their receivers: (N, 2l + 1, C) per irrep (-1)^l.

    Args:
      ways: Directions of the pairs.
      edges: Output of `EdgeBooster`.
      num: Number of atoms.
    """
    degrees = range(len(edges[0]))
    ones = jnp.ones((num, 1, edges[0][0].shape[-1]), edges[0][0].dtype)
    group = PathGroup(0, tuple((l, l) for l in degrees))
    sums = [
        sum_products((group,), [ones], way.harmonics, [values], way.edge)[0]
        for way, values in zip(ways, edges)
    ]
    return {natural(l)[l]: sum(parts[l] for parts in sums) for l in degrees}


def sum_messages(features: Features, ways: list[Direction], edges, weights, paths) -> Features:
    """Sum the products of the senders' features and the features of the edges at the receivers.

    Args:
      features: Features of the atoms, shape (N, 2l + 1, C) per irrep.
      ways: Directions of the pairs.
      edges: Output of `EdgeBooster`.
      weights: For each direction, a function of the index of a path that returns (P, C).
      paths: Paths of `summed_paths`.

    Returns:
      Features, shape (N, 2l + 1, C) per irrep.
    """
    indices = [[k for k, path in enumerate(paths) if path.source == s] for s in sorted(features)]
    groups = tuple(
        PathGroup(
            paths[group[0]].source.degree,
            tuple((paths[k].degree, paths[k].target.degree) for k in group),
        )
        for group in indices
    )
    x, totals = [features[source] for source in sorted(features)], {}
    for way, values, weigh in zip(ways, edges, weights):
        w = [[weigh(k) * values[paths[k].degree] for k in group] for group in indices]
        for group, sums in zip(indices, sum_products(groups, x, way.harmonics, w, way.edge)):
            for k, value in zip(group, sums):
                target, value = paths[k].target, paths[k].scale * value
                totals[target] = totals[target] + value if target in totals else value
    return dict(sorted(totals.items()))
