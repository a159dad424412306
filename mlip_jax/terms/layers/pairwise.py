"""What terms that are sums over pairs of atoms share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mlip_jax.graphs.graph import Pairs
from mlip_jax.models.layers.basic import segment_sum

# Nearer to either end the switch is 0 or 1 to within exp(-99), and its derivatives would overflow in float32.
_END = 0.01


def switch_off(distances: jax.Array, start: float, end: float) -> jax.Array:
    """1 up to `start`, 0 from `end` on, and infinitely differentiable between them and at both ends.

    With c from 0 at `start` to 1 at `end` it is f(1 - c) / (f(1 - c) + f(c)), f(x) = exp(-1 / x).
    """
    c = (distances - start) / (end - start)
    between = (c > _END) & (c < 1 - _END)
    c_safe = jnp.where(between, c, 0.5)
    return jnp.where(between, jax.nn.sigmoid(1.0 / c_safe - 1.0 / (1.0 - c_safe)), (c < 0.5).astype(c.dtype))


def share_among_atoms(energies: jax.Array, edge: Pairs, num: int) -> jax.Array:
    """Half of each pair's energy for each of its atoms: (P,) -> (num,)."""
    half = 0.5 * energies
    total = segment_sum(half, edge.receivers, num)
    # a directed list holds each pair twice, and receivers take their half from each
    return total + segment_sum(half, edge.senders, num) if edge.undirected else total


def positive(distances: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Distances with 1 in place of 0, and which they were: padding pairs have length zero."""
    zero = distances == 0
    return jnp.where(zero, 1.0, distances), zero
