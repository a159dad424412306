"""SphereNet: spherical message passing (Liu et al., ICLR 2022, arXiv:2102.05013).

As DimeNet++, but the sum over the neighbors k of j also depends on a torsion f,

    x_ji = sum_k b_kj * W sbf(d_kj, a_kji) * V tbf(d_kj, a_kji, f_kji),  k != i,

where tbf are products of spherical Bessel functions of the distance and spherical harmonics of the
angle a and the torsion f. f is the angle from k to the next neighbor of j about the axis from j to
i (layers/directional/torsions.py).

Two properties of the published method remain:

- The energy is not continuous: a torsion jumps where two neighbors of an atom pass each other about
  a bond, and where a neighbor comes within the cutoff. Forces are the gradient between the jumps.
- The energy of a mirror image differs.

The model agrees with the implementation in DIG for the same weights, except that DIG does not
exclude n = k from the neighbors after k. There, rounding decides whether f is zero.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlip_jax.models.layers.basic import unit_vectors
from mlip_jax.models.layers.directional.blocks import DirectionalMessages, glorot_orthogonal
from mlip_jax.models.layers.directional.edges import DirectedEdges, EdgesOfAtoms
from mlip_jax.models.layers.directional.torsions import TripletFilters, sum_with_torsions
from mlip_jax.models.layers.spherical_bessel import spherical_bessel


class _TorsionBases(NamedTuple):
    """Bases of the sums over triplets.

    Attributes:
      bessel: R_ln, (E, L, num_radial).
      units: Directions of the edges, (E, 3).
      distances: Lengths of the edges in units of the cutoff, (E,).
      edges: Edges of each atom.
    """

    bessel: jax.Array
    units: jax.Array
    distances: jax.Array
    edges: EdgesOfAtoms


class Model(DirectionalMessages):
    """SphereNet with the published defaults.

    Attributes:
      num_features: Number of features of an edge, F.
      num_layers: Number of interaction blocks.
      cutoff: Cutoff radius (Å).
      num_radial: Number of radial functions.
      max_degree: Largest degree l of the spherical harmonics.
      num_triplet_features: Number of features of the sums over triplets, C.
      num_basis_features: Width between the two linear layers of each basis.
      energy_width: Width of the hidden layers of the energy blocks.
      num_energy_layers: Number of hidden layers of each energy block.
      num_before_skip: Number of residual layers before the skip connection of an interaction.
      num_after_skip: Number of residual layers after it.
      envelope_exponent: Exponent p - 1 of the envelope of the radial functions.
      energy_bias: Whether the first layer of an energy block has a bias, as published.
      rounded_bessel: Whether constants of the spherical Bessel functions are rounded to single
        precision, as in DIG.
      zero_init: Whether the last kernels of the energy blocks start at zero.
      learned_shift: Whether the energy has a trainable shift per element.
    """

    energy_bias: bool = True

    smooth = False  # torsions jump
    mirror_symmetric = False

    def bases(self, edge: DirectedEdges, distances, envelope, num_atoms: int) -> _TorsionBases:
        """Compute the bases of the edges; only the radial functions have an envelope."""
        distances = edge.directed(distances)
        lengths = distances / self.cutoff
        bessel = spherical_bessel(
            lengths, self.max_degree + 1, self.num_radial, self.rounded_bessel
        )
        edges = EdgesOfAtoms.of(edge, distances < self.cutoff, num_atoms)
        return _TorsionBases(bessel, unit_vectors(edge.vectors, distances), lengths, edges)

    def sum_triplets(
        self, n: int, b: jax.Array, bases: _TorsionBases, edge: DirectedEdges
    ) -> jax.Array:
        """Sum over the edges into the sender of each edge, without the reversed edge: (E, C)."""
        degrees, narrow, width = self.max_degree + 1, self.num_basis_features, b.shape[-1]

        def kernel(name, *shape):
            return self.param(f"{name}_{n}", glorot_orthogonal, shape).astype(b.dtype)

        # The first layer of each basis acts on products of radial and angular functions. Its sum
        # over radial functions is a function of the edge.
        inner = kernel("sbf_1", degrees * self.num_radial, narrow)
        inner = inner.reshape(degrees, self.num_radial, narrow)
        angular = jnp.einsum("eln,lnq->elq", bases.bessel, inner)
        # harmonics in a square table; as published, the radial degree is that of its columns
        inner = kernel("torsion_1", degrees**2 * self.num_radial, narrow)
        inner = inner.reshape(degrees, degrees, self.num_radial, narrow)
        torsional = jnp.einsum("eln,hlnq->ehlq", bases.bessel, inner)
        torsional = torsional.reshape(len(b), degrees**2, narrow)
        filters = TripletFilters(
            angular, kernel("sbf_2", narrow, width), torsional, kernel("torsion_2", narrow, width)
        )
        return sum_with_torsions(b, bases.units, bases.distances, filters, bases.edges)
