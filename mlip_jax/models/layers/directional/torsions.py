"""Sums over triplets with angles and torsions, as in SphereNet (Liu et al., ICLR 2022).

A triplet is an edge j -> i and another edge k -> j. Its torsion f is the angle from k to the next
neighbor n of j, counter-clockwise about the axis from j to i. Neighbors on the axis, within the
angle _ON_AXIS, are skipped, and so are k and neighbors at its azimuth, within _SAME_AZIMUTH: whether
they come next would depend on rounding. If no neighbor is left, f = 2 pi. Of several neighbors at
the same azimuth, the nearest one is n; forces depend on this.

The loop over the neighbors of each edge's sender takes BLOCK of them at a time; no array grows with
the number of triplets. Harmonics are polynomials of cos a and of sin a exp(i f), with the angle a
between the edges at j. No inverse trigonometric function is needed.
"""

from __future__ import annotations

from math import factorial, pi, sqrt
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlip_jax.models.layers.basic import gather, safe_norm
from mlip_jax.models.layers.directional.edges import EdgesOfAtoms
from mlip_jax.models.layers.directional.slot_sums import slot_sum

BLOCK = 4
_SEARCH_BLOCK = 8
# _ON_AXIS: sine of the angle to the axis. _SAME_AZIMUTH: difference of diamond angles. _TURN: diamond
# angle of a full turn.
_ON_AXIS, _SAME_AZIMUTH = 3e-5, 1e-5
_TURN = 4.0
_EXACT = jax.lax.Precision.HIGHEST


class TripletFilters(NamedTuple):
    """Filters of the features of edges k -> j.

    Attributes:
      angular: Coefficients of Y_l0(a), (E, L, Q).
      angular_kernel: Second layer of these, (Q, C).
      torsional: Coefficients of Y_lm(a, f), (E, L * L, Q); for their order see `harmonics`.
      torsional_kernel: Second layer of these, (Q, C).
    """

    angular: jax.Array
    angular_kernel: jax.Array
    torsional: jax.Array
    torsional_kernel: jax.Array


def sum_with_torsions(
    b: jax.Array,
    units: jax.Array,
    distances: jax.Array,
    filters: TripletFilters,
    edges: EdgesOfAtoms,
) -> jax.Array:
    """Sum b_kj * angular filter * torsional filter over the neighbors k of each edge's sender.

    Args:
      b: Features of the edges, (E, C).
      units: Directions of the edges, from sender to receiver, (E, 3).
      distances: Lengths of the edges in units of the cutoff, (E,).
      filters: Filters.
      edges: Edges of each atom.

    Returns:
      Sums, (E, C); the reversed edge of each edge is left out.
    """
    num = (jnp.max(edges.count, initial=0) + BLOCK - 1) // BLOCK
    distances = jax.lax.stop_gradient(distances)
    return slot_sum(_block, num, edges, (b, units, distances, filters))


def _block(slot, edges: EdgesOfAtoms, values):
    """Return the sum over BLOCK neighbors, (E, C)."""
    b, units, distances, filters = values
    slots = slot * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
    k, valid = edges.into_senders(slots)  # (E, BLOCK)
    chosen, exists = _next_neighbors(jax.lax.stop_gradient(units), distances, edges, k)
    y = harmonics(*_angles(units, k, chosen, exists), filters.angular.shape[1])
    zonal = jnp.stack([y[l * l] for l in range(filters.angular.shape[1])], axis=-1)
    angular = jnp.einsum("ekl,eklq->ekq", zonal, gather(filters.angular, k), precision=_EXACT)
    torsional = jnp.einsum(
        "ekh,ekhq->ekq", jnp.stack(y, axis=-1), gather(filters.torsional, k), precision=_EXACT
    )
    message = (
        gather(b, k)
        * jnp.matmul(angular, filters.angular_kernel, precision=_EXACT)
        * jnp.matmul(torsional, filters.torsional_kernel, precision=_EXACT)
    )
    return jnp.sum(jnp.where(valid[..., None], message, 0.0), axis=1)


def _angles(units, k, chosen, exists):
    """Return cos a, and real and imaginary part of sin a exp(i f), (E, BLOCK) each.

    Args:
      units: Directions of the edges, (E, 3).
      k: Indices of edges k -> j, (E, BLOCK).
      chosen: Indices of edges n -> j to the next neighbors, (E, BLOCK).
      exists: Whether there is a next neighbor, (E, BLOCK).
    """
    axis = units[:, None, :]
    to_k, to_n = -gather(units, k), -gather(units, chosen)
    cosine, cosine_n = _dot(axis, to_k), _dot(axis, to_n)
    normal = jnp.cross(axis, to_n)
    squared = jnp.where(exists, _dot(normal, normal), 1.0)
    inverse = jax.lax.rsqrt(jnp.where(exists, squared, 1.0))
    real = (_dot(to_k, to_n) - cosine * cosine_n) * inverse
    imaginary = _dot(to_k, normal) * -inverse
    cross = jnp.cross(axis, to_k)
    off_axis = jax.lax.stop_gradient(_dot(cross, cross)) > _ON_AXIS**2
    alone = safe_norm(jnp.where(off_axis[..., None], cross, 0.0))
    real, imaginary = jnp.where(exists, real, alone), jnp.where(exists, imaginary, 0.0)
    return cosine, jnp.where(off_axis, real, 0.0), jnp.where(off_axis, imaginary, 0.0)


def _dot(a, b):
    return jnp.sum(a * b, axis=-1)


def _next_neighbors(units, distances, edges, k):
    """Return the edge from the next neighbor after each k, and whether there is one: (E, BLOCK)."""
    first, second = _perpendicular(units)
    azimuth_k, _ = _azimuths(units, first, second, k)

    def step(state):
        block, gap, chosen = state
        slots = block * _SEARCH_BLOCK + jnp.arange(_SEARCH_BLOCK, dtype=jnp.int32)
        n, valid = edges.into_senders(slots)
        azimuth, off_axis = _azimuths(units, first, second, n)
        gaps = azimuth[:, None, :] - azimuth_k[:, :, None]  # (E, BLOCK, _SEARCH_BLOCK)
        gaps = jnp.where(gaps < 0, gaps + _TURN, gaps)
        same = (gaps <= _SAME_AZIMUTH) | (gaps >= _TURN - _SAME_AZIMUTH)
        usable = (valid & off_axis)[:, None, :] & ~same
        # the shorter edge of two with the same azimuth
        gaps = gaps + _SAME_AZIMUTH * gather(distances, n)[:, None, :]
        gaps = jnp.where(usable, gaps, _TURN)
        best = jnp.argmin(gaps, axis=-1)
        new_gap = jnp.min(gaps, axis=-1)
        new = jnp.take_along_axis(n, best, axis=1)
        is_closer = new_gap < gap
        return block + 1, jnp.where(is_closer, new_gap, gap), jnp.where(is_closer, new, chosen)

    num = (jnp.max(edges.count, initial=0) + _SEARCH_BLOCK - 1) // _SEARCH_BLOCK
    start = (jnp.zeros((), jnp.int32), jnp.full(k.shape, _TURN, units.dtype), jnp.zeros_like(k))
    _, gap, chosen = jax.lax.while_loop(lambda state: state[0] < num, step, start)
    return chosen, gap < _TURN


def _perpendicular(units):
    """Return two vectors that form a right-handed frame with each unit vector, (E, 3) each."""
    smallest = jnp.argmin(jnp.abs(units), axis=-1)
    other = jax.nn.one_hot(smallest, 3, dtype=units.dtype)
    first = jnp.cross(units, other)
    squared = jnp.sum(first * first, axis=-1, keepdims=True)
    first = first * jax.lax.rsqrt(jnp.where(squared > 0, squared, 1.0))
    return first, jnp.cross(units, first)


def _azimuths(units, first, second, neighbors):
    """Return the azimuth of each neighbor about the axis, and whether it is off the axis."""
    to_neighbor = -gather(units, neighbors)
    x, y = _dot(to_neighbor, first[:, None, :]), _dot(to_neighbor, second[:, None, :])
    return _diamond_angle(x, y), x * x + y * y > _ON_AXIS**2


def _diamond_angle(x, y):
    """Return a monotonic function of the polar angle, from -1 to 3."""
    length = jnp.abs(x) + jnp.abs(y)
    ratio = y / jnp.where(length > 0, length, 1.0)
    return jnp.where(x >= 0, ratio, 2.0 - ratio)


def harmonics(
    cosine: jax.Array, real: jax.Array, imaginary: jax.Array, num_degrees: int
) -> list[jax.Array]:
    """Compute real spherical harmonics with the sign of Condon and Shortley.

    Args:
      cosine: cos a.
      real: sin a cos f.
      imaginary: sin a sin f.
      num_degrees: Number of degrees l, from 0.

    Returns:
      Y_lm(a, f) in the order l = 0, 1, ..., and in it m = 0, 1, ..., l, -l, ..., -1.
    """
    polynomials = legendre(cosine, num_degrees)
    powers = [(jnp.ones_like(cosine), jnp.zeros_like(cosine))]
    for _ in range(1, num_degrees):
        x, y = powers[-1]
        powers.append((x * real - y * imaginary, x * imaginary + y * real))
    values = []
    for l in range(num_degrees):
        for m in [*range(l + 1), *range(-l, 0)]:
            k = abs(m)
            norm = sqrt((2 * l + 1) * factorial(l - k) / (4 * pi * factorial(l + k)))
            part = powers[k][0 if m >= 0 else 1]
            values.append((norm * (sqrt(2.0) if m else 1.0)) * polynomials[l, k] * part)
    return values


def legendre(x: jax.Array, num_degrees: int) -> dict[tuple[int, int], jax.Array]:
    """Compute the associated Legendre polynomials of x = cos a over sin^m a, by (l, m)."""
    p = {(0, 0): jnp.ones_like(x)}
    for m in range(num_degrees):
        if m:
            p[m, m] = (1 - 2 * m) * p[m - 1, m - 1]
        if m + 1 < num_degrees:
            p[m + 1, m] = (2 * m + 1) * x * p[m, m]
        for l in range(m + 2, num_degrees):
            p[l, m] = ((2 * l - 1) * x * p[l - 1, m] - (l + m - 1) * p[l - 2, m]) / (l - m)
    return p
