"""Building blocks of terms that are sums over pairs of atoms."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlip_jax.graphs.graph import Pairs
from mlip_jax.models.layers.basic import segment_sum

# _END: distance from either end, as a fraction, within which the switch is set to 1 or 0. It
# differs by at most exp(-99) there, and its derivatives would overflow in float32.
_END = 0.01


def switch_off(distances: jax.Array, start: float, end: float) -> jax.Array:
    """Compute a switch that is 1 up to `start` and 0 from `end`.

    It is infinitely differentiable everywhere. With c from 0 at `start` to 1 at `end` it is
    f(1 - c) / (f(1 - c) + f(c)), f(x) = exp(-1 / x).
    """
    c = (distances - start) / (end - start)
    between = (c > _END) & (c < 1 - _END)
    c_safe = jnp.where(between, c, 0.5)
    return jnp.where(
        between, jax.nn.sigmoid(1.0 / c_safe - 1.0 / (1.0 - c_safe)), (c < 0.5).astype(c.dtype)
    )


def share_among_atoms(energies: jax.Array, edge: Pairs, num: int) -> jax.Array:
    """Assign half of the energy of each pair to each of its atoms: (P,) -> (num,)."""
    half = 0.5 * energies
    total = segment_sum(half, edge.receivers, num)
    # a directed list contains each pair twice, so each receiver gets its half
    return total + segment_sum(half, edge.senders, num) if edge.undirected else total


def positive(distances: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Replace distances of 0 by 1; padding pairs have distance zero.

    Returns:
      The new distances, and whether each of them was zero.
    """
    zero = distances == 0
    return jnp.where(zero, 1.0, distances), zero
