"""Gated nonlinearity of equivariant features: scalars are activated, other irreps are scaled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax.numpy as jnp

from mlip_jax.models.layers.tensor_products.irreps import (
    EVEN,
    SCALAR,
    Features,
    Irrep,
    Irreps,
    merge,
    reachable,
)
from mlip_jax.models.layers.tensor_products.linear import NORMALIZATION, normalized_activation


class Gate(NamedTuple):
    """Layout of a gate.

    Attributes:
      output: Irreps of the output: scalars first, then gated irreps.
      inputs: Irreps of the input, sorted. The block of the gates' parity has the scalars first, then
        a scalar for each channel of the gated irreps, in the order of the output.
      parity: Parity of the gates.
      factors: Normalization constants of the activations.
    """

    output: Irreps
    inputs: Irreps
    parity: int
    factors: Mapping[str, float] = NORMALIZATION

    def __call__(self, features: Features) -> Features:
        """Apply the gate: silu to even scalars, tanh to odd ones, normalized as in e3nn."""
        act = {
            parity: normalized_activation("silu" if parity == EVEN else "tanh", self.factors)
            for parity in (1, -1)
        }
        out, gates = {}, None
        gate_irrep = Irrep(0, self.parity)
        widths = dict((irrep, channels) for channels, irrep in self.output)
        if any(irrep.degree for irrep in widths):
            gates = act[self.parity](features[gate_irrep][..., widths.get(gate_irrep, 0) :])
        start = 0
        for channels, irrep in self.output:
            if irrep.degree == 0:
                out[irrep] = act[irrep.parity](features[irrep][..., :channels])
                continue
            out[irrep] = features[irrep] * gates[..., start : start + channels]
            start += channels
        return out


def gate_for(
    wanted: Irreps,
    sources: Iterable[Irrep],
    filters: Iterable[Irrep],
    factors: Mapping[str, float] = NORMALIZATION,
) -> Gate:
    """Return the gate with the irreps of `wanted` that products of sources and filters reach.

    Gates are even scalars if these are reached, and odd ones otherwise.
    """
    reached = reachable(sources, filters)
    kept = [(channels, irrep) for channels, irrep in wanted if irrep in reached]
    output = merge([b for b in kept if b[1].degree == 0] + [b for b in kept if b[1].degree > 0])
    parity = EVEN if SCALAR in reached else -EVEN
    gates = [(channels, Irrep(0, parity)) for channels, irrep in output if irrep.degree > 0]
    inputs = tuple(sorted(merge([*output, *gates]), key=lambda block: block[1]))
    return Gate(output, inputs, parity, factors)


def layout(features: Features, max_degree: int, has_parity: bool):
    """Join features to e3x's layout, shape (N, 1 or 2, (max_degree + 1)**2, F).

    Irreps with fewer channels than the widest one, or absent ones, are filled with zeros.

    Args:
      features: Features of the atoms.
      max_degree: Largest degree of the layout.
      has_parity: Whether to keep both parities apart, even first; otherwise each degree must appear
        once.
    """
    some = next(iter(features.values()))
    width = max(values.shape[-1] for values in features.values())

    def block(irrep):
        values = features.get(irrep)
        if values is None:
            return jnp.zeros((len(some), irrep.size, width), some.dtype)
        return jnp.pad(values, ((0, 0), (0, 0), (0, width - values.shape[-1])))

    if has_parity:
        sides = [[Irrep(l, parity) for l in range(max_degree + 1)] for parity in (1, -1)]
    else:
        by_degree = {irrep.degree: irrep for irrep in features}
        sides = [[by_degree.get(l, Irrep(l, (-1) ** l)) for l in range(max_degree + 1)]]
    return jnp.stack(
        [jnp.concatenate([block(irrep) for irrep in side], axis=1) for side in sides], axis=1
    )
