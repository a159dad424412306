"""DimeNet++: directional message passing (Gasteiger et al., arXiv:2003.03123 and 2011.14115).

Every directed edge j -> i has features m_ji. An interaction sums over the neighbors k of j,

    x_ji = sum_k b_kj * W sbf(d_kj, angle_kji),  k != i,

where b_kj are features of the edge k -> j and sbf is a product of spherical Bessel functions of the
distance and Legendre polynomials P_l of the angle. The published implementations list all triplets
(k, j, i). Here, the sum needs no triplets: with P_l(u . v) = 4 pi / (2l + 1) Y_l(u) . Y_l(v), it is
a product of Y_l of edge j -> i with moments of atom j, sums over its edges that are computed once
per atom. The term k = i is subtracted. The results are the same.

The model agrees with PyTorch Geometric 2.8.1 (angle="turning") and with the implementation in DIG
(angle="bond", energy_bias=True) for the same weights. These have at most 32 neighbors per atom by
default; here, an atom has all neighbors within the cutoff.
"""

from __future__ import annotations

from math import pi, sqrt
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlip_jax.models.layers.basic import gather, unit_vectors
from mlip_jax.models.layers.directional.blocks import (
    DirectionalMessages,
    dense_of_block,
    glorot_orthogonal,
)
from mlip_jax.models.layers.directional.edges import DirectedEdges, EdgesOfAtoms
from mlip_jax.models.layers.directional.moments import AtomEdges, moments, project
from mlip_jax.models.layers.spherical_bessel import spherical_bessel
from mlip_jax.models.layers.tensor_products.couplings import spherical_harmonics


class _MomentBases(NamedTuple):
    """Bases of the sums over triplets.

    Attributes:
      bessel: R_ln times the envelope of each undirected pair, (P, L, num_radial).
      harmonics: 4 pi Y_l of each degree, (E, 2 l + 1).
      into: Edges into each atom.
      out_of: Edges out of each atom.
    """

    bessel: jax.Array
    harmonics: list[jax.Array]
    into: AtomEdges
    out_of: AtomEdges


class Model(DirectionalMessages):
    """DimeNet++ with the published defaults.

    Attributes:
      num_features: Number of features of an edge, F.
      num_layers: Number of interaction blocks.
      cutoff: Cutoff radius (Å).
      num_radial: Number of radial functions.
      max_degree: Largest degree l of the Legendre polynomials.
      num_triplet_features: Number of features of the sums over triplets, C.
      num_basis_features: Width between the two linear layers of each basis.
      energy_width: Width of the hidden layers of the energy blocks.
      num_energy_layers: Number of hidden layers of each energy block.
      num_before_skip: Number of residual layers before the skip connection of an interaction.
      num_after_skip: Number of residual layers after it.
      envelope_exponent: Exponent p - 1 of the envelope (arXiv:2003.03123, eq. 8).
      angle: "turning": angle between the edges k -> j and j -> i, as in PyTorch Geometric; "bond":
        the bond angle, as in the paper and in DIG. Weights for one give other energies with the
        other.
      energy_bias: Whether the first layer of an energy block has a bias, as in DIG.
      rounded_bessel: Whether constants of the spherical Bessel functions are rounded to single
        precision, as in both implementations.
      zero_init: Whether the last kernels of the energy blocks start at zero.
      learned_shift: Whether the energy has a trainable shift per element.
    """

    angle: str = "turning"

    def __post_init__(self):
        super().__post_init__()
        if self.angle not in ("turning", "bond"):
            raise ValueError(f'angle: expected "turning" or "bond", received {self.angle!r}')

    def bases(self, edge: DirectedEdges, distances, envelope, num_atoms: int) -> _MomentBases:
        """Compute the bases of the edges."""
        bessel = envelope[..., None] * spherical_bessel(
            distances / self.cutoff, self.max_degree + 1, self.num_radial, self.rounded_bessel
        )
        distances = edge.directed(distances)
        units = unit_vectors(edge.vectors, distances)
        within = distances < self.cutoff
        # zero for edges that are in no sum
        harmonics = [
            jnp.where(within[:, None], y, 0.0) for y in spherical_harmonics(units, self.max_degree)
        ]
        edges = EdgesOfAtoms.of(edge, within, num_atoms)
        into = AtomEdges(edge.receivers, edges.order, edges.first, edges.count)
        out_of = AtomEdges(edge.senders, gather(edges.reverse, edges.order), *into[2:])
        return _MomentBases(bessel, harmonics, into, out_of)

    def sum_triplets(
        self, n: int, b: jax.Array, bases: _MomentBases, edge: DirectedEdges
    ) -> jax.Array:
        """Sum over the edges into the sender of each edge, without the reversed edge: (E, C)."""
        # the two layers act on all l and n together; without activation, they can act on each l
        narrow = self.num_basis_features
        inner = self.param(
            f"sbf_1_{n}", glorot_orthogonal, ((self.max_degree + 1) * self.num_radial, narrow)
        ).reshape(self.max_degree + 1, self.num_radial, narrow)
        basis = jnp.einsum("pln,lnq->lpq", bases.bessel, inner.astype(b.dtype))
        angular = dense_of_block(n)(self.num_triplet_features, "sbf_2", False)(basis)
        total, of_reversed = jnp.zeros_like(b), jnp.zeros_like(angular[0])
        for l, y in enumerate(bases.harmonics):
            # P_l changes its sign between the angle and its supplement for odd l
            sign = (-1) ** l if self.angle == "bond" else 1
            scale = sign / sqrt(4.0 * pi * (2 * l + 1))
            sums = moments(y, edge.times(b, angular[l]), bases.into)
            total = total + project(scale * y, sums, bases.out_of)
            # Y_l . Y_l of opposite unit vectors, with squared norm 2 l + 1
            of_reversed = of_reversed + scale * (2 * l + 1) * (-1) ** l * angular[l]
        return total - edge.times(edge.reversed(b), of_reversed)
