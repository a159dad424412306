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

from mlip_jax.graphs.graph import Pairs
from mlip_jax.models.layers.basic import gather, segment_sum
from mlip_jax.models.layers.tensor_products.couplings import coupling, nonzero, opposite
from mlip_jax.models.layers.tensor_products.irreps import Features, Irrep, Irreps, product
from mlip_jax.models.layers.tensor_products.linear import PathWeights


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
    num = len(next(iter(features.values())))
    out: dict[Irrep, list[jax.Array]] = {}
    for path in paths:
        weight = (
            weights.hidden @ weights.kernel[:, path.start : path.start + path.channels]
        )  # (P, channels)
        terms = nonzero(coupling(path.source.degree, path.degree, path.target.degree, old_signs))

        def send(source, target, angular, path=path, weight=weight, terms=terms):
            x = [gather(features[path.source][:, a], source) for a in range(path.source.size)]
            messages = [jnp.zeros_like(x[0])] * path.target.size
            for a, b, c, value in terms:
                messages[c] = messages[c] + (value * angular[path.degree][:, b, None]) * x[a]
            return jnp.stack([segment_sum(weight * m, target, num) for m in messages], axis=1)

        total = send(edge.senders, edge.receivers, harmonics)
        if edge.undirected:
            total = total + send(edge.receivers, edge.senders, opposite(harmonics))
        out.setdefault(path.target, []).append(total)
    return {irrep: jnp.concatenate(parts, axis=-1) for irrep, parts in out.items()}
