"""ComENet: complete and efficient message passing (Wang et al., NeurIPS 2022, arXiv:2206.08515).

Messages depend on the distance of an edge j -> i, on the polar angle theta and the azimuth phi of j
in a frame of the two nearest neighbors of i, and on the torsion tau about the edge of the nearest
other neighbors of i and j. All of this is known after two passes over the edges; there are no
triplets.

Properties of the published method remain:

- The energy is not continuous: it jumps where the order of two neighbors by distance changes, and
  where phi or tau change their sign, since negative values are replaced by the angle plus pi. At the
  cutoff, forces jump. Forces are the gradient between the jumps.
- Features are normalized over the atoms of a structure, so the energy is not extensive.
- The energy of a mirror image differs.
- In symmetric molecules, such as methane, the nearest neighbors are equally far, and the order of
  the atoms or rounding decides which ones are used.

phi is undefined if j is one of the two nearest neighbors of i, and tau if both other neighbors are
the same atom, or one is on the axis. Both are then zero. The published implementation evaluates
them there, and rounding decides their values. Otherwise the model agrees with the implementation in
DIG for the same weights.
"""

from __future__ import annotations

from math import pi, sqrt
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph

from mlip_jax.models.layers.basic import (
    Dense,
    activation,
    gather,
    safe_norm,
    segment_sum,
    unit_vectors,
)
from mlip_jax.models.layers.directional.edges import DirectedEdges, directed_edges
from mlip_jax.models.layers.directional.torsions import harmonics, legendre
from mlip_jax.models.layers.frames import GraphNorm
from mlip_jax.models.layers.gated_energy import xavier
from mlip_jax.models.layers.heads import AtomOutputs, embed_elements, scale_and_shift
from mlip_jax.models.layers.spherical_bessel import spherical_bessel

_silu = activation("silu")
# _ON_AXIS: squared sine of the angle to the axis. _FLAT: sine of an azimuth or torsion that counts
# as zero, so that rounding does not decide its sign in planar molecules. _SAME: squared distance of
# an atom to itself (Å²).
_ON_AXIS, _FLAT, _SAME = 1e-9, 1e-5, 1e-2


class _References(NamedTuple):
    """Edges that define the frames of each edge j -> i; all are indices of edges, (E,).

    Attributes:
      nearest: Edge into i from its nearest neighbor.
      second: Edge into i from its second nearest neighbor.
      of_receiver: Edge into i from its nearest neighbor that is not j.
      of_sender: Edge into j from its nearest neighbor that is not i.
      reverse: Edge i -> j.
    """

    nearest: jax.Array
    second: jax.Array
    of_receiver: jax.Array
    of_sender: jax.Array
    reverse: jax.Array


def _nearest_edges(edge: DirectedEdges, distances, num_atoms):
    """Return the shortest and second shortest edge into each atom, (N,) each.

    If an atom has one neighbor, both are the same edge. `distances` are infinite for edges that do
    not count.
    """
    index = jnp.arange(len(distances), dtype=jnp.int32)

    def shortest(lengths):
        least = jax.ops.segment_min(lengths, edge.receivers, num_atoms)
        is_least = (lengths == gather(least, edge.receivers)) & jnp.isfinite(lengths)
        found = jnp.where(is_least, index, len(index))
        return jax.ops.segment_min(found, edge.receivers, num_atoms)

    first = shortest(distances)
    rest = jnp.where(index == gather(first, edge.receivers), jnp.inf, distances)
    second = shortest(rest)
    second = jnp.where(second < len(index), second, first)
    last = len(index) - 1
    return jnp.minimum(first, last), jnp.minimum(second, last)


def _references(edge: DirectedEdges, distances, num_atoms) -> _References:
    index = jnp.arange(len(distances), dtype=jnp.int32)
    reverse = edge.reversed(index)
    first, second = _nearest_edges(edge, distances, num_atoms)

    def other_than(atoms, excluded):
        nearest = gather(first, atoms)
        return jnp.where(nearest == excluded, gather(second, atoms), nearest)

    return _References(
        gather(first, edge.receivers),
        gather(second, edge.receivers),
        other_than(edge.receivers, index),
        other_than(edge.senders, reverse),
        reverse,
    )


def _dot(a, b):
    return jnp.sum(a * b, axis=-1)


def _half_turn(axis, a, b, defined):
    """Return cosine and sine of the angle from a to b about the axis, modulo pi and at least 0.

    Args:
      axis, a, b: Unit vectors, (E, 3).
      defined: Whether the angle is wanted, (E,). It is zero elsewhere, and if a or b is on the axis.
    """
    # squared lengths of the parts of a and b that are perpendicular to the axis
    a_axis, b_axis = _dot(a, axis), _dot(b, axis)
    a_rest, b_rest = a - a_axis[:, None] * axis, b - b_axis[:, None] * axis
    a_squared, b_squared = _dot(a_rest, a_rest), _dot(b_rest, b_rest)
    defined = defined & (a_squared > _ON_AXIS) & (b_squared > _ON_AXIS)
    scale = jax.lax.rsqrt(jnp.where(defined, a_squared * b_squared, 1.0))
    cosine = jnp.where(defined, _dot(a_rest, b_rest) * scale, 1.0)
    sine = jnp.where(defined, _dot(axis, jnp.cross(a_rest, b_rest)) * scale, 0.0)
    sign = jnp.where(sine < -_FLAT, -1.0, 1.0).astype(sine.dtype)
    return sign * cosine, sign * sine


class Model(nn.Module):
    """ComENet with the published defaults.

    Attributes:
      num_features: Number of features of an atom, F.
      num_layers: Number of interaction blocks.
      cutoff: Cutoff radius (Å).
      num_radial: Number of radial functions.
      max_degree: Largest degree l of the spherical harmonics.
      num_basis_features: Width between the two linear layers of each basis.
      num_dense_layers: Number of dense layers in each block, and in the energy head.
      rounded_bessel: Whether constants of the spherical Bessel functions are rounded to single
        precision, as in DIG.
      zero_init: Whether the last kernel of the energy head starts at zero.
      learned_shift: Whether the energy has a trainable shift per element.
    """

    num_features: int = 256
    num_layers: int = 4
    cutoff: float = 8.0
    num_radial: int = 3
    max_degree: int = 1
    num_basis_features: int = 64
    num_dense_layers: int = 3
    rounded_bessel: bool = False
    zero_init: bool = True
    learned_shift: bool = True

    smooth = False  # frames jump
    extensive = False  # features are normalized over the structure
    local = False  # likewise, atoms without neighbors depend on other atoms
    mirror_symmetric = False

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        numbers, edge = graph.nodes["numbers"], directed_edges(graph)
        filters = self._filters(edge, len(numbers))
        x = _silu(embed_elements(self, numbers, self.num_features, edge.vectors.dtype))
        for n in range(self.num_layers):
            x = self._interaction(n, x, filters, edge, graph)
        for k in range(self.num_dense_layers):
            x = _silu(self._dense(self.num_features, f"energy_layer_{k}")(x))
        init = nn.initializers.zeros if self.zero_init else xavier
        energies = Dense(1, kernel_init=init, name="energy_final")(x)[:, 0]
        energies = scale_and_shift(self, energies, numbers, False, self.learned_shift)
        return AtomOutputs(energies, x[:, None, None, :])

    def _dense(self, width, name, use_bias=True):
        return Dense(width, use_bias, kernel_init=xavier, name=name)

    def _filters(self, edge, num_atoms):
        """Return bases of distance, theta and phi, and of distance and tau: (E, ...) each."""
        distances = safe_norm(edge.vectors)
        within = distances < self.cutoff
        units = unit_vectors(edge.vectors, distances)  # from j to i
        lengths = jnp.where(within, jax.lax.stop_gradient(distances), jnp.inf)
        use = _references(edge, lengths, num_atoms)
        theta, phi, tau = _angles(edge, units, use)
        degrees = self.max_degree + 1
        bessel = spherical_bessel(
            distances / self.cutoff,
            degrees,
            self.num_radial,
            self.rounded_bessel,
            half_integer=False,
        )
        bessel = jnp.where(within[:, None, None], bessel, 0.0)  # (E, L, num_radial)
        # without the sign of Condon and Shortley
        y = harmonics(theta[0], -theta[1] * phi[0], -theta[1] * phi[1], degrees)
        degree_of = [l for l in range(degrees) for _ in range(2 * l + 1)]
        frame = jnp.stack(y, axis=-1)[..., None] * bessel[:, jnp.array(degree_of)]
        p = legendre(tau, degrees)
        zonal = [sqrt((2 * l + 1) / (4 * pi)) * p[l, 0] for l in range(degrees)]
        torsion = jnp.stack(zonal, axis=-1)[..., None] * bessel
        return frame.reshape(len(distances), -1), torsion.reshape(len(distances), -1)

    def _interaction(self, n, x, filters, edge, graph):
        """Update the features of atoms, (N, F)."""
        width = self.num_features
        x = _silu(self._dense(width, f"in_{n}")(x))
        parts = []
        for name, basis in zip(("frame", "torsion"), filters):
            narrow = self._dense(self.num_basis_features, f"{name}_basis_1_{n}", False)(basis)
            weights = self._dense(width, f"{name}_basis_2_{n}", False)(narrow)
            sums = segment_sum(weights * gather(x, edge.senders), edge.receivers, len(x))
            h = self._dense(width, f"{name}_neighbors_{n}")(sums)
            h = h + self._dense(width, f"{name}_own_{n}", False)(x)
            parts.append(_silu(self._dense(width, f"{name}_out_{n}")(h)))
        h = self._dense(width, f"join_{n}")(jnp.concatenate(parts, axis=-1)) + x
        for k in range(self.num_dense_layers):
            h = _silu(self._dense(width, f"layer_{k}_{n}")(h)) + h
        return self._dense(width, f"out_{n}")(GraphNorm(name=f"norm_{n}")(h, graph))


def _angles(edge, units, use: _References):
    """Return cosine and sine of theta and of phi, and the cosine of tau; (E,) each.

    Args:
      edge: Edges.
      units: Directions of the edges, from sender to receiver, (E, 3).
      use: Edges that define the frames.
    """
    index = jnp.arange(len(units), dtype=jnp.int32)
    to_nearest, to_second = -gather(units, use.nearest), -gather(units, use.second)
    is_nearest, is_second = use.nearest == index, use.second == index
    cosine = jnp.where(is_nearest, -1.0, _dot(units, to_nearest))
    cross = jnp.cross(units, to_nearest)
    # the axis is from i to j, opposite to `units`
    phi = _half_turn(-units, to_nearest, to_second, ~is_nearest & ~is_second)
    # vectors from i and from j to the other neighbors, and the distance of these
    v = edge.vectors
    apart = gather(v, use.of_receiver) - v - gather(v, use.of_sender)
    same = gather(edge.senders, use.of_receiver) == gather(edge.senders, use.of_sender)
    same = same & (jax.lax.stop_gradient(_dot(apart, apart)) < _SAME)
    defined = ~same & (use.of_receiver != index) & (use.of_sender != use.reverse)
    tau = _half_turn(-units, gather(units, use.of_sender), -gather(units, use.of_receiver), defined)
    on_axis = jax.lax.stop_gradient(_dot(cross, cross)) <= _ON_AXIS
    sine = safe_norm(jnp.where(on_axis[:, None], 0.0, cross))
    return (cosine, sine), phi, tau[0]
